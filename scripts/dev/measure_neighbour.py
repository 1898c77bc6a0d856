#!/usr/bin/env python
"""What a busy neighbour on every core costs training and decoding.

    python scripts/dev/measure_neighbour.py --log scripts/dev/measure_neighbour.log

Two pieces of work in the quickstart's sizes, each in a process of its own that settles its threads
as the commands do: optimiser steps of a head, and plain decoding of one row. Each is run with and
without one endless loop per core beside it, in turn. Shown of each, medians over the rounds:

  processor seconds, of all threads: threads that spin while they wait for one that has lost its
      core take more of them beside the loops, threads that sleep do not
  seconds by the clock, in those that a thread which waits for nobody takes for a fixed piece of
      work under the same conditions: what other processes do to the clock divides out

Exit status 1 where either more than doubles beside the loops. The same work by threads that wait as
libgomp's do unless they are told otherwise is shown for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from redrafter import threads

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, POSITIONS, DEPTH = 40, 256, 4  # of training
NEW = 200  # tokens of the decoded row
MODEL = dict(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
_MOST = 2.0  # times its idle cost: half of a core is left to it
_LOOP = "import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"


# ---------------------------------------------------------------- the work


def training() -> Callable[[], object]:
    """Optimiser steps of a head on random states."""
    import torch

    from redrafter.config import LossConfig, OptimConfig
    from redrafter.heads.recurrent import RecurrentHead
    from redrafter.training.feed import Batch
    from redrafter.training.loop import make_optimizer
    from redrafter.training.step import StepLoss, total_weight

    target = _target()
    model = StepLoss(RecurrentHead.for_target(target), target, LossConfig())
    optimizer = make_optimizer(model.head, OptimConfig())
    tokens = torch.randint(target.vocab_size, (POSITIONS, DEPTH + 1))
    mask = torch.ones(POSITIONS, DEPTH, dtype=torch.bool)
    context = torch.randn(POSITIONS, target.hidden_size)
    batch = Batch(context, tokens[:, :-1], tokens[:, 1:], mask)

    def work() -> None:
        for _ in range(STEPS):
            model(batch, total_weight(batch, model.loss_config))[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    threads.settle()
    return work


def decoding() -> Callable[[], object]:
    """One row by the plain loop."""
    from transformers import GenerationConfig

    from redrafter.decode.plain import plain
    from redrafter.evaluation.models import _one_step

    target = _target()
    threads.settle()
    if not threads.fixed(None):
        threads.choose(lambda: _one_step(target, 1))
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1)
    return lambda: plain(target, [[1, 2, 3]], config)


def alone() -> Callable[[], object]:
    """A thread that waits for nobody."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn(256, 256)
    return lambda: [matrix @ matrix for _ in range(2_000)]


def _target():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from redrafter.targets.model import Target

    torch.manual_seed(0)
    return Target(LlamaForCausalLM(LlamaConfig(**MODEL)))


WORK = {"training": training, "decoding": decoding, "alone": alone}


def serve(name: str) -> int:
    """In a process of its own: does the work at every line it reads, and tells what it took."""
    threads.wait_asleep()
    work = WORK[name]()
    work()  # pays for what comes once

    import torch

    for _ in sys.stdin:
        began = time.perf_counter(), time.process_time()
        work()
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        print(json.dumps([*took, torch.get_num_threads()]), flush=True)
    return 0


# ---------------------------------------------------------------- its neighbours


class Worker:
    """The work of one name, in a process of its own."""

    def __init__(self, name: str, **env: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name], env={**os.environ, **env}, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def took(self) -> tuple[float, float, int]:
        """(seconds by the clock, processor seconds, threads)"""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        clock_s, processor_s, n = json.loads(self.process.stdout.readline())
        return clock_s, processor_s, n

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def loops(cores: list[int]) -> Iterator[None]:
    """An endless loop on each of these cores."""
    started = [subprocess.Popen([sys.executable, "-c", _LOOP.format(core=c)]) for c in cores]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(rounds: int, cores: list[int]) -> dict[str, dict[bool, list[tuple]]]:
    """Work -> beside the loops? -> (clock relative to `alone`'s, processor seconds, threads), by
    round."""
    kinds = {
        "training": ("training", {}), "decoding": ("decoding", {}),
        "training, threads spin": ("training", {"GOMP_SPINCOUNT": "300000"}),
        "decoding, threads spin": ("decoding", {"GOMP_SPINCOUNT": "300000"}),
    }  # fmt: skip
    found: dict[str, dict[bool, list[tuple]]] = {kind: {False: [], True: []} for kind in kinds}
    with ExitStack() as stack:
        lone = Worker("alone")
        stack.callback(lone.close)
        workers = {kind: Worker(name, **env) for kind, (name, env) in kinds.items()}
        for worker in workers.values():
            stack.callback(worker.close)
            worker.took()
        for _ in range(rounds):
            for busy in (False, True):
                with loops(cores if busy else []):
                    for kind, worker in workers.items():
                        before = lone.took()[0]
                        clock_s, processor_s, n = worker.took()
                        unit_s = (before + lone.took()[0]) / 2
                        found[kind][busy].append((clock_s / unit_s, processor_s, n))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log", help="file to write the log to, besides printing it")
    parser.add_argument("--serve", choices=WORK, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve)
    if not hasattr(os, "sched_getaffinity"):
        raise SystemExit("error: the loops are pinned to cores, which this system cannot do")
    cores = sorted(os.sched_getaffinity(0))
    lines = [
        f"# python scripts/dev/measure_neighbour.py --rounds {given.rounds}",
        f"# {platform.machine()}, {len(cores)} cores, load {os.getloadavg()[0]:.1f} before; "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        f"{'':24}{'threads':>9}{'processor s':>16}{'ratio':>7}{'clock, relative':>18}{'ratio':>7}",
    ]
    worst = 0.0
    for kind, sides in measure(given.rounds, cores).items():
        (clock, processor, n), (busy_clock, busy_processor, _) = (
            map(statistics.median, zip(*sides[busy], strict=True)) for busy in (False, True)
        )
        ratios = busy_processor / processor, busy_clock / clock
        lines.append(
            f"{kind:24}{n:9.0f}{processor:8.2f}{busy_processor:8.2f}{ratios[0]:7.2f}"
            f"{clock:9.2f}{busy_clock:9.2f}{ratios[1]:7.2f}"
        )
        worst = max(worst, *ratios) if "spin" not in kind else worst
    lines.append(f"at most {worst:.2f} times its cost without the loops; allowed: {_MOST:g}")
    print("\n".join(lines))
    if given.log:
        Path(given.log).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(worst > _MOST)


if __name__ == "__main__":
    sys.exit(main())
