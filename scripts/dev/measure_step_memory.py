#!/usr/bin/env python
"""Measure the memory and time of one training step of a recurrent head, on random numbers.

The target is a stand-in of one frozen random (V, H) matrix, embedding and lm_head in one: the
transformer's own forward is no part of a step. A step is what `redrafter/training/loop.py` does:
loss, backward, clipping, AdamW, zero_grad. Its peak is counted above what must be there anyway:

  peak above = highest resident set during the step
               - (resident set between two steps + bytes of all gradients)

Between two steps there are the weights, the optimizer state, the frozen matrix, and the process
with its batch; what the C library keeps of freed memory is given back before. The highest resident
set is the kernel's own figure (VmHWM, reset through /proc/self/clear_refs), which misses nothing
short-lived, as sampling would. Linux only; the head is trained on the CPU, in float32.

Rule of thumb, E being 2 H: positions x depth x E x 32 bytes for the head's activations, and
chunk_rows x V x 4 bytes for each tensor of logits, of which 4 live at once with cross_entropy and
7 with any other loss. Where the second is too much, lower loss.chunk_rows in a training; where the
first is, optim.batch_positions. --accumulation above 1 adds a second gradient of the matrix (V, E).

examples:
  python scripts/dev/measure_step_memory.py --hidden 64 --vocab 32000      seconds, 1 GB of memory
  python scripts/dev/measure_step_memory.py                                minutes, 13 GB
  python scripts/dev/measure_step_memory.py --output target --loss kl --chunk_rows 128
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time

LOSSES = (
    "cross_entropy", "kl", "reverse_kl", "total_variation", "minus_log_acceptance", "lk_hybrid",
)  # fmt: skip


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the highest VmRSS since the last `forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def forget_peak() -> None:
    gc.collect()  # of an earlier measurement in this process: it would be freed during this one
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """What one step needs, in bytes and seconds."""
    import torch

    from redrafter.config import LossConfig, OptimConfig
    from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig
    from redrafter.training.feed import Batch
    from redrafter.training.loop import make_optimizer
    from redrafter.training.step import batch_loss, total_weight

    class StandIn:
        """The part of a target that a step touches."""

        lm_head_weight = torch.randn(args.vocab, args.hidden).mul_(args.hidden**-0.5)

        def embed(self, tokens):
            return torch.nn.functional.embedding(tokens, self.lm_head_weight)

        def project(self, hidden):
            return torch.nn.functional.linear(hidden, self.lm_head_weight)

    torch.manual_seed(0)
    chunk_rows = args.chunk_rows or LossConfig.chunk_rows
    loss_config = LossConfig(**{args.loss: 1.0}, chunk_rows=chunk_rows)
    target, optim = StandIn(), OptimConfig()
    shape = dict(vocab_size=args.vocab, hidden_size=args.hidden, output=args.output)
    head = RecurrentHead(RecurrentHeadConfig(**shape)).bind(target).train()
    optimizer = make_optimizer(head, optim)

    def batch(positions: int) -> Batch:
        grid = (positions, args.depth)
        tokens, labels = torch.randint(args.vocab, (2, *grid))
        context = torch.randn(positions, args.hidden)
        teacher = None if args.loss == LOSSES[0] else torch.randn(*grid, args.hidden)
        return Batch(context, tokens, labels, torch.ones(grid, dtype=torch.bool), teacher=teacher)

    def step(parts: list[Batch]) -> int:  # bytes of the gradients
        weight = sum(total_weight(part, loss_config) for part in parts)
        for part in parts:
            loss, _ = batch_loss(head, head, target, part, loss_config, weight)
            loss.backward()
        gradients = nbytes(p.grad for p in head.parameters())
        torch.nn.utils.clip_grad_norm_(head.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return gradients

    step([batch(2)])  # makes the optimizer's state, and loads what torch loads when first needed
    parts = [batch(args.positions) for _ in range(args.accumulation)]
    forget_peak()
    rest, wall, cpu = resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    gradients = step(parts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    weights, frozen = nbytes(head.parameters()), nbytes([target.lm_head_weight])
    state = nbytes(t for s in optimizer.state.values() for t in s.values())
    return {
        "weights_bytes": weights,
        "gradients_bytes": gradients,
        "optimizer_state_bytes": state,
        "frozen_target_bytes": frozen,
        "process_and_batch_bytes": rest - weights - state - frozen,
        "peak_above_bytes": resident_bytes("VmHWM") - rest - gradients,
        "step_s": wall,
        "step_cpu_s": cpu,  # the better one to compare where the machine does other things too
        "chunk_rows": chunk_rows,
        "threads": torch.get_num_threads(),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default, text in (
        ("--hidden", 2048, "H, the target's hidden width (default: 2048)"),
        ("--vocab", 128_000, "V, the target's vocabulary (default: 128000)"),
        ("--depth", 5, "K, depths trained (default: 5)"),
        ("--positions", 1024, "starts per micro-batch, each with all depths (default: 1024)"),
        ("--accumulation", 1, "micro-batches per step (default: 1)"),
        ("--chunk_rows", None, "rows of logits held at once (default: that of a training)"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    text = "whose matrix over the vocabulary: own is trained, the target's frozen (default: own)"
    parser.add_argument("--output", choices=("own", "target"), default="own", help=text)
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0], help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    for name, value in measure(parse_args(argv)).items():
        shown = f"{value / 1e9:8.3f} GB" if name.endswith("_bytes") else f"{value:8.4g}"
        print(f"{name.removesuffix('_bytes').replace('_', ' '):20} {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
