#!/usr/bin/env python
"""What this device makes of the whole project, in minutes: one JSON file and one table.

  python scripts/gpu_check.py --target MODEL --head runs/head --prompts PROMPTS.jsonl --out gpu.json

Runs on a CUDA device or a CPU, downloads nothing, and needs torch, transformers and jsonargparse
beside this clone (the parts states and training accelerate, too; without it they fail by
themselves). Part by part, each written to --out as soon as it is known:

  environment    device, memory, versions
  operations     per step of decoding: reads of the host, operations, those that are no views
  exact_fp32     drafted text against plain decoding, token by token, with every near-tie
  exact_bf16     the same in bfloat16
  tokens         tokens per step, beside the same on the CPU in float32
  costs          t(n) of the target inflated to the shape of --like (scripts/inflate_target.py)
  speed          stock generate, plain, the head's trees and suffix, interleaved, on that target
  graphs         plain and the trees there by `target.forward graphs`, beside the same without, in
                 turns; a CPU has no CUDA graphs: there what would be replayed is run again
  states         hidden states per second, what distilling from that target takes
  training       a step at --train_vocab and --train_hidden: seconds, and memory beside the plan's
  ddp            gradients under DDP of one process (NCCL, on a CPU gloo) beside those without

A part that fails says so, and the others go on; a part that would begin after --seconds is left
out. Exit status: 0, or 1 if a part failed or a text differs beyond a near-tie. Without --head an
untrained one is measured: its costs are real, it accepts nothing. Speed is that of an inflated
target: the costs of the large shape, the texts and the acceptance of the small one.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import GenerationConfig

from redrafter.config import (
    LossConfig,
    OptimConfig,
    SpeedConfig,
    StatesConfig,
    TargetConfig,
)
from redrafter.contracts import Drafter, InputError
from redrafter.costs import NEW_TOKENS, CostMeter
from redrafter.data.answers import generation_config
from redrafter.data.prompts import load_prompts
from redrafter.data.states import StateMaker
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafting import strategy_maker
from redrafter.evaluation.comparison import compare, unexplained
from redrafter.evaluation.doctor import environment, fixed_prompts
from redrafter.evaluation.methods import build_method
from redrafter.evaluation.operations import of_decoding
from redrafter.evaluation.report import milliseconds, table
from redrafter.evaluation.speed import decoding, make_batches, measure_speed
from redrafter.export.inflated_head import inflate_head
from redrafter.files import plain_values, provenance, write_json
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig
from redrafter.processes import hide_bars
from redrafter.targets.fused import choose_forward
from redrafter.targets.graphs import GraphForward
from redrafter.targets.inflation import Shape, inflate
from redrafter.targets.load import load_model_config, load_target
from redrafter.targets.model import Target
from redrafter.targets.probe import check_target
from redrafter.training.feed import Batch
from redrafter.training.step import StepLoss, total_weight

ROOT = Path(__file__).resolve().parent.parent
_STATES_ROW_TOKENS = 256
_PROBE_S = 5.0  # of repeated work
_POSITIONS, _DEPTH = 32, 3  # of the batch whose gradients are compared
_LOSS = LossConfig(kl=1.0)  # a training's default


class StandIn:
    """The part of a target that a training step touches: one random matrix, (V, H)."""

    def __init__(self, vocab: int, hidden: int, device: Any, dtype: torch.dtype):
        self.vocab_size, self.hidden_size, self.state_size = vocab, hidden, hidden
        self.device, self.dtype = torch.device(device), dtype
        self.lm_head_weight = torch.empty(vocab, hidden, device=device, dtype=dtype)
        if self.device.type != "meta":
            self.lm_head_weight.normal_(std=hidden**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.lm_head_weight)

    def project(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.lm_head_weight)


@dataclass
class Check:
    """What the parts share; each of them is a method, and returns what goes into the file."""

    args: argparse.Namespace
    small: Target

    @functools.cached_property
    def trees(self) -> list[str]:
        return [f"head:{tree}" for tree in self.args.trees.split(",")]

    @functools.cached_property
    def methods(self) -> list[str]:
        return [*self.trees, "suffix:10x1"]

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        args = self.args
        if args.prompts is None:
            return fixed_prompts(self.small, args.n_prompts, args.max_new_tokens)
        room = self.small.max_positions
        found = load_prompts(
            args.prompts, self.small.tokenizer, "auto", n=args.n_prompts, part="last",
            max_tokens=None if room is None else room - args.max_new_tokens,
        )  # fmt: skip
        return [list(p.ids) for p in found]

    @functools.cached_property
    def head(self) -> RecurrentHead:
        """Of the small target, in float32."""
        if self.args.head is not None:
            return load_head(self.args.head, self.small)
        torch.manual_seed(0)
        return RecurrentHead.for_target(self.small).eval()

    @functools.cached_property
    def large(self) -> tuple[Target, RecurrentHead]:
        """The inflated target and its head, on the device."""
        small, args = self.small, self.args
        shape = Shape.of(load_model_config(TargetConfig(args.like)).get_text_config())
        dtype = getattr(torch, args.dtype)
        name = f"{Path(small.name).name} in the shape of {Path(args.like).name}"
        model = inflate(small.model, shape, Path(small.name).name, dtype, small.device)
        check = functools.partial(choose_forward, wanted="auto", check=check_target)
        target = Target(model, small.tokenizer, name, check=check)
        return target, self._head_of(target)

    def _head_of(self, target: Target) -> RecurrentHead:
        """A copy as wide as this target, and where it is."""
        head = inflate_head(self.head, target.hidden_size)
        return head.to(target.device, target.dtype).bind(target)

    def _config(self) -> TargetConfig:
        return TargetConfig(self.args.target, device=str(self.small.device), dtype="float32")

    # ------------------------------------------------------------------------------ the parts

    def environment(self) -> dict[str, Any]:
        return environment(self.small)

    def operations(self) -> dict[str, Any]:
        resources = Resources(head=self.head)
        drafters = {name: build_drafter(name, self.small, resources) for name in self.methods}
        return of_decoding(self.small, self.prompts[0], drafters)

    def exact_fp32(self) -> dict[str, Any]:
        return self._exact(self.small)

    def exact_bf16(self) -> dict[str, Any]:
        return self._exact(load_target(replace(self._config(), dtype="bfloat16")))

    def _exact(self, target: Target) -> dict[str, Any]:
        resources = Resources(head=self._head_of(target))
        strategies = {name: strategy_maker(name, target, resources) for name in self.methods}
        modes = {"greedy": 0.0, "seeded": 1.0}
        sizes = [1, len(self.prompts)]
        results, _ = compare(
            target, strategies, self.prompts, sizes, modes,
            seed=0, max_new_tokens=self.args.max_new_tokens,
        )  # fmt: skip
        found = {name: {mode: asdict(r) for mode, r in by.items()} for name, by in results.items()}
        return {"unexplained": unexplained(results), "methods": found}

    def tokens(self) -> dict[str, Any]:
        """Tokens per step here, and on the CPU where this is none."""
        found = {str(self.small.device): self._tokens(self.small, self.head)}
        if self.small.device.type != "cpu":
            own = load_target(replace(self._config(), device="cpu"))
            found["cpu"] = self._tokens(own, self._head_of(own))
        large, head = self.large
        found["inflated"] = self._tokens(large, head)
        return found

    def _tokens(self, target: Target, head: RecurrentHead) -> dict[str, float | None]:
        settings = generation_config(0.0, self.args.max_new_tokens)
        return {
            name: speculative(
                target, self.prompts, settings,
                drafter=build_drafter(name, target, Resources(head=head)),
            ).stats.tokens_per_step
            for name in self.methods
        }  # fmt: skip

    def costs(self) -> dict[str, Any]:
        target, head = self.large
        resources = Resources(head=head)
        drafters = {name: build_drafter(name, target, resources) for name in self.methods}
        context = max(1, min(128, (target.max_positions or 1024) - 64))
        meter = CostMeter(target, new_tokens=NEW_TOKENS, contexts=[context], drafters=drafters)
        with torch.inference_mode():
            return {"target": target.name, **asdict(meter.run(self.args.rounds))}

    def speed(self) -> dict[str, Any]:
        target, head = self.large
        config = SpeedConfig(
            target=self._config(), prompts="", max_new_tokens=self.args.max_new_tokens,
            ignore_eos=True, cost_rounds=self.args.rounds,
        )  # fmt: skip
        resources = Resources(head=head)
        methods = [
            build_method(name, target, decoding(config), resources)
            for name in ("stock", "plain", *self.methods)
        ]
        batches, answers = make_batches(target, self.prompts, config)
        return {"target": target.name, **measure_speed(target, methods, batches, answers, config)}

    def graphs(self) -> dict[str, Any]:
        target, head = self.large
        if target.fused is None:
            raise InputError(f"{target.name} has no fused forward that could be recorded")
        again = None if target.device.type == "cuda" else lambda run: run
        target.fused = GraphForward(target.backbone, target.config, again)
        settings = generation_config(0.0, self.args.max_new_tokens)
        settings.eos_token_id = None
        drafters = {"plain": None} | {
            name: build_drafter(name, target, Resources(head=head)) for name in self.trees
        }
        found: dict[str, Any] = {name: {"seconds": [], "graphs_s": []} for name in drafters}
        for timed in (False, True, True, True):
            for name, drafter in drafters.items():
                texts = []
                for enabled, kept in ((False, "seconds"), (True, "graphs_s")):
                    target.fused.enabled = enabled
                    text, seconds = self._timed(target, settings, drafter)
                    texts.append(text)
                    if timed:
                        found[name][kept].append(seconds)
                pairs = zip(*texts, strict=True)
                found[name]["equal_rows"] = sum(one == other for one, other in pairs)
        for of in found.values():
            of["speedup"] = min(of["seconds"]) / min(of["graphs_s"])
        return {"recordings": target.fused.n_recorded, "methods": found}

    def _timed(
        self, target: Target, settings: GenerationConfig, drafter: Drafter | None
    ) -> tuple[list[list[int]], float]:
        """Every prompt by itself: the texts, and seconds without the prefills."""
        texts, seconds = [], 0.0
        for prompt in self.prompts:
            made = speculative(target, [prompt], settings, drafter=drafter) if drafter else plain(
                target, [prompt], settings
            )  # fmt: skip
            texts += made.tokens
            seconds += made.stats.seconds["total"] - made.stats.seconds["prefill"]
        return texts, seconds

    def states(self) -> dict[str, Any]:
        from redrafter.planning.probe import states_seconds  # needs accelerate

        target, _ = self.large
        tokens = min(_STATES_ROW_TOKENS, target.max_positions or _STATES_ROW_TOKENS)
        maker = StateMaker(target, StatesConfig(), 1)
        most = min(_PROBE_S, self.args.seconds / 20)
        return {"tokens_per_second": 1.0 / states_seconds(maker, tokens, most)}

    def training(self) -> dict[str, Any]:
        from redrafter.planning.probe import step_seconds  # needs accelerate

        args, device = self.args, self.small.device
        optim = OptimConfig(batch_positions=args.positions, depth=5)
        planned = _planned_bytes(args, optim)
        dtype = getattr(torch, args.dtype)
        if cuda := device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        target = StandIn(args.train_vocab, args.train_hidden, device, dtype)
        head = _new_head(args).to(device).train()
        most = min(_PROBE_S, args.seconds / 20)
        seconds = step_seconds(head, target, _LOSS, optim, 0, most)
        measured = torch.cuda.max_memory_allocated(device) - before if cuda else None
        return {
            "step_s": seconds,
            "planned_bytes": planned,
            "measured_bytes": measured,
            "measured_over_planned": measured / planned if measured is not None else None,
        }

    def ddp(self) -> dict[str, Any]:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        backend = "nccl" if self.small.device.type == "cuda" else "gloo"
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(
                backend, init_method=f"file://{folder}/meet", rank=0, world_size=1
            )
            try:
                alone = self._gradients(lambda loss: loss)
                shared = self._gradients(DistributedDataParallel)
            finally:
                dist.destroy_process_group()
        off = max(float((a - b).abs().max()) for a, b in zip(alone, shared, strict=True))
        return {"backend": backend, "largest_difference": off}

    def _gradients(self, wrap: Callable[[StepLoss], Any]) -> list[Tensor]:
        """Of one step of a new head for the small target's matrix."""
        torch.manual_seed(0)
        small, loss = self.small, LossConfig(cross_entropy=1.0)
        head = RecurrentHead.for_target(small).train()
        context = torch.randn(_POSITIONS, small.hidden_size, device=small.device)
        grid = (2, _POSITIONS, _DEPTH)
        tokens, labels = torch.randint(small.vocab_size, grid, device=small.device)
        batch = Batch(context, tokens, labels, torch.ones_like(tokens, dtype=torch.bool))
        value, _ = wrap(StepLoss(head, small, loss))(batch, total_weight(batch, loss))
        value.backward()
        return [p.grad for p in head.parameters()]


PARTS = ("environment", "operations", "exact_fp32", "exact_bf16", "tokens", "costs", "speed",
         "graphs", "states", "training", "ddp")  # fmt: skip


def _new_head(args: argparse.Namespace) -> RecurrentHead:
    return RecurrentHead(
        RecurrentHeadConfig(vocab_size=args.train_vocab, hidden_size=args.train_hidden)
    )


def _planned_bytes(args: argparse.Namespace, optim: OptimConfig) -> int:
    """What `--plan` adds up on the device: the frozen matrix, the head, AdamW, and the step."""
    from redrafter.planning.memory import averages_per_element, step_memory

    target = StandIn(args.train_vocab, args.train_hidden, "meta", getattr(torch, args.dtype))
    with torch.device("meta"):
        head = _new_head(args)
    weights = sum(p.numel() * p.element_size() for p in head.parameters())
    kept = weights * (1 + averages_per_element(optim)) + target.lm_head_weight.nbytes
    return kept + step_memory(head, target, _LOSS, optim).peak


def run(check: Check, names: list[str], out: str | None) -> dict[str, Any]:
    """Part by part; what is known is written after each."""
    began, args = time.monotonic(), plain_values(vars(check.args))
    body: dict[str, Any] = {"parts": {}, "provenance": provenance(config=args)}
    for name in names:
        clock = time.monotonic()
        if clock - began > check.args.seconds:
            found = {"status": "left out", "why": f"--seconds {check.args.seconds:g} had passed"}
        else:
            try:
                found = {"status": "done", "found": getattr(check, name)()}
            except Exception as error:  # whatever it is, the other parts are still worth having
                where = traceback.format_exc().splitlines()[-6:]
                found = {"status": "failed", "why": f"{type(error).__name__}: {error}",
                         "where": where}  # fmt: skip
        body["parts"][name] = {**found, "seconds": time.monotonic() - clock}
        if out is not None:
            write_json(out, plain_values(body))
        print(f"{name}: {found['status']} {found.get('why', '')}".rstrip(), flush=True)
    return body


def show(body: dict[str, Any]) -> str:
    """The table, and what speed and exactness came to."""
    parts = body["parts"]
    rows = [[name, p["status"], p["seconds"]] for name, p in parts.items()]
    lines = [table(["part", "status", "seconds"], rows)]
    done = {name: p["found"] for name, p in parts.items() if p["status"] == "done"}
    if (speed := done.get("speed")) is not None:
        rows = [
            [name, m["tokens_per_step"], m["speedup_stock"], m["speedup_plain"],
             f"{m['equal_rows']}/{speed['n_prompts']}"]
            for name, m in speed["methods"].items()
        ]  # fmt: skip
        columns = ["method", "tokens/step", "x stock", "x best plain", "= plain"]
        lines += ["", f"{speed['target']} (inflated)", table(columns, rows)]
    if (costs := done.get("costs")) is not None:
        rows = [[e["n"], milliseconds(e["cost"]["q1_s"])] for e in costs["target"]]
        lines += ["", table(["new tokens", "t(n) ms"], rows)]
    if (graphs := done.get("graphs")) is not None:
        rows = [
            [name, m["speedup"], f"{m['equal_rows']}/{body['provenance']['config']['n_prompts']}"]
            for name, m in graphs["methods"].items()
        ]
        said = table(["method", "graphs: x without", "= without"], rows)
        lines += ["", said, f"{graphs['recordings']} recordings"]
    for name in ("exact_fp32", "exact_bf16"):
        if name in done:
            ties = sum(r["near_ties"] for m in done[name]["methods"].values() for r in m.values())
            lines.append(f"{name}: {ties} near-ties, {done[name]['unexplained']} unexplained")
    return "\n".join(lines)


def passed(body: dict[str, Any]) -> bool:
    """No part failed, and every difference of a text is a near-tie."""
    found = [p.get("found") or {} for p in body["parts"].values()]
    failed = any(p["status"] == "failed" for p in body["parts"].values())
    return not failed and not any(f.get("unexplained") for f in found)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder of a small causal LM")
    for flag, text in (
        ("--head", "folder of a recurrent head that was trained for it"),
        ("--prompts", "JSON-lines file of prompts; a few fixed texts where it is missing"),
        ("--out", "JSON file to write"),
    ):
        parser.add_argument(flag, help=text)
    for flag, default, text in (
        ("--like", str(ROOT / "configs/plan/vicuna-7b"), "folder whose config.json has the shape"),
        ("--dtype", "bfloat16", "of the inflated target"),
        ("--device", "auto", "torch's name; auto: the accelerator, else the CPU"),
        ("--trees", "1x4,4x4,8x5", "of the head, WxK, comma-separated"),
        ("--parts", ",".join(PARTS), "comma-separated, in this order"),
    ):
        parser.add_argument(flag, default=default, help=f"{text} (default: %(default)s)")
    for flag, default, text in (
        ("--n_prompts", 4, "prompts"),
        ("--max_new_tokens", 64, "per prompt"),
        ("--rounds", 10, "measurements of each cost"),
        ("--train_vocab", 128_256, "V of the training step"),
        ("--train_hidden", 4096, "H of the training step"),
        ("--positions", 1024, "starts per training step"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    text = "no part begins later than that (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=420.0, help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    names = args.parts.split(",")
    if not sys.stderr.isatty():
        hide_bars()
    try:
        if unknown := set(names) - set(PARTS):
            raise InputError(f"--parts: {sorted(unknown)[0]!r} is not one of {', '.join(PARTS)}")
        if not hasattr(torch, args.dtype):
            raise InputError(f"--dtype: {args.dtype!r} is no dtype of torch; give bfloat16")
        small = load_target(TargetConfig(args.target, device=args.device, dtype="float32"))
        check = Check(args, small)
        _ = check.prompts, check.head  # what is wrong with them is said now
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    body = run(check, names, args.out)
    print(show(body))
    return 0 if passed(body) else 1


if __name__ == "__main__":
    sys.exit(main())
