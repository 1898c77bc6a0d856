"""Does drafting pay for this target on this device, with which tree, and why? A few minutes' look:
what forwards, drafts and steps cost is measured, what is accepted is recorded on a few texts, and
from both every fixed size of draft is predicted, as `eval/static.py` does at length. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.nn import Module

from redrafter.config import DoctorConfig
from redrafter.contracts import InputError
from redrafter.costs import CostMeter
from redrafter.data.answers import generation_config
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.profile import StepCosts, step_costs
from redrafter.evaluation.operations import of_decoding
from redrafter.evaluation.prompts import evaluation_prompts, number_list
from redrafter.evaluation.report import milliseconds, table
from redrafter.evaluation.static import Cell, accepted_depths, predict
from redrafter.files import versions
from redrafter.targets.adapters import probe_tokens
from redrafter.targets.devices import device_name
from redrafter.targets.inflation import said
from redrafter.targets.model import Target
from redrafter.targets.text import encode

_TEXTS = (
    "Once upon a time there was a little girl who",
    "def main():",
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:",
    "The capital of France is",
)
_NEW_TOKENS = (1, 2, 4, 8, 16, 32)  # of the table that is shown
_SUFFIX = 1  # width of copying: a chain
_EVEN = 0.02  # a predicted gain below it is nobody's to notice


def check(config: DoctorConfig) -> list[int]:
    """The widths, ascending. Raises InputError for what makes no sense."""
    return sorted(number_list("widths", config.widths, int, 1))


def fixed_prompts(target: Target, n: int, max_new_tokens: int) -> list[list[int]]:
    """At most n token rows for a target that nobody gave prompts for."""
    if target.tokenizer is None:
        rows = [probe_tokens(target.vocab_size, k)[0].tolist() for k in (12, 5, 9, 16)]
    else:
        rows = [encode(target.tokenizer, text) for text in _TEXTS]
    room = target.max_positions
    room = None if room is None else max(1, room - max_new_tokens)
    return [row[:room] for row in rows[:n]]


def diagnose(
    config: DoctorConfig, widths: Sequence[int], target: Target, head: Module | None
) -> dict[str, Any]:
    """The whole finding, ready for JSON; its last entry, `sentence`, is for people."""
    if config.prompts is None:
        prompts = fixed_prompts(target, config.n_prompts, config.max_new_tokens)
        warnings = ["acceptance is that of a few fixed texts: give --prompts like those to come"]
    else:
        used, _, warnings = evaluation_prompts(target, config)
        prompts = [list(p.ids) for p in used]
    examined = Examination(config, widths, target, head, prompts)
    accepted = examined.accepted()
    table_, context = examined.measured(), examined.context
    cells = examined.predicted(accepted, table_)
    return {
        "environment": environment(target),
        "t": [e for e in table_["target"] if e["n"] in _NEW_TOKENS],
        "context": context,
        "operations": examined.operations(),
        "cells": {name: asdict(cell) for name, cell in cells.items()},
        "warnings": warnings,
        "sentence": sentence(cells, examined.costs(table_), head is not None),
    }


def environment(target: Target) -> dict[str, Any]:
    """What figures hang on."""
    found = {
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "target": target.name,
        "inflated": said(target.config),
        "weights": sum(p.numel() for p in target.model.parameters()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": getattr(target.config, "_attn_implementation", None),
        "forward": forward_of(target),
    }
    if target.device.type == "cuda":
        about = torch.cuda.get_device_properties(target.device)
        found |= {"memory_bytes": about.total_memory, "cuda": torch.version.cuda}
    return found


def forward_of(target: Target) -> str:
    """What makes the target's forward, in words."""
    if target.fused is None:
        return "the class's own"
    return "fused, by torch's operations" if target.fused.own_steps is None else "fused, by kernels"


class Examination:
    """The parts of it. prompts: token ids that acceptance is recorded on"""

    def __init__(
        self,
        config: DoctorConfig,
        widths: Sequence[int],
        target: Target,
        head: Module | None,
        prompts: list[list[int]],
    ):
        self.config, self.target, self.prompts = config, target, prompts
        self.resources = Resources(head=head)
        depth = config.depth
        #: name of a drafter of full depth -> its width
        self.widths = {f"head:{w}x{depth}": w for w in widths} if head is not None else {}
        self.widths[f"suffix:{depth}x{_SUFFIX}"] = _SUFFIX
        self.context = max(map(len, prompts)) + config.max_new_tokens // 2

    def _drafter(self, name: str):
        return build_drafter(name, self.target, self.resources)

    def accepted(self) -> dict[str, list[list[int]]]:
        """Per drafter and text, levels that are accepted at each position."""
        settings = generation_config(0.0, self.config.max_new_tokens)
        found = {
            name: accepted_depths(
                self.target, self._drafter(name), self.prompts, settings,
                [0] * len(self.prompts),
            )
            for name in self.widths
        }  # fmt: skip
        if not any(any(texts) for texts in found.values()):
            raise InputError("prompts: no answer has a second token; give other prompts")
        return found

    def measured(self) -> dict[str, Any]:
        """The cost table, as a dictionary: t(n), drafts, whole steps."""
        depth, limit = self.config.depth, self.target.max_positions
        sizes = {1 + w * k for w in self.widths.values() for k in range(depth + 1)}
        if limit is not None:
            room = max([*sizes, *_NEW_TOKENS, 2 * (depth + 1)]) + 1
            self.context = max(1, min(self.context, limit - room))
        meter = CostMeter(
            self.target,
            new_tokens=sorted(sizes | set(_NEW_TOKENS)),
            contexts=[self.context],
            drafters={name: self._drafter(name) for name in self.widths},
            loop=True,
        )
        return asdict(meter.run(self.config.rounds))

    def costs(self, measured: dict[str, Any]) -> dict[str, StepCosts]:
        return {name: step_costs(measured, name, None, self.context) for name in self.widths}

    def predicted(
        self, accepted: dict[str, list[list[int]]], measured: dict[str, Any]
    ) -> dict[str, Cell]:
        """By name, `plain` first."""
        found: dict[str, Cell] = {}
        for name, costs in self.costs(measured).items():
            width, texts = self.widths[name], accepted[name]
            plain_, *cells = predict({width: texts}, {width: costs}, self.config.depth)
            found.setdefault("plain", plain_)
            for cell in cells:
                size = f"{cell.depth}x{width}" if name.startswith("suffix") else cell.name
                found[f"{name.split(':')[0]}:{size}"] = cell
        return found

    def operations(self) -> dict[str, dict[str, float]]:
        """Per way of decoding, operations and reads of the host per step, of one row."""
        drafters = {name: self._drafter(name) for name in self.widths}
        return of_decoding(self.target, self.prompts[0], drafters)


def sentence(cells: dict[str, Cell], costs: dict[str, StepCosts], with_head: bool) -> str:
    """Whether drafting pays, with which tree, and why."""
    own = cells["plain"]
    drafting = {name: cell for name, cell in cells.items() if cell.depth}
    name = max(drafting, key=lambda n: drafting[n].tokens_per_s)
    cell = drafting[name]
    kind = name.split(":")[0]
    cost = next(c for n, c in costs.items() if n.startswith(kind) and _width(n) == cell.width)
    gain = cell.tokens_per_s / own.tokens_per_s
    verify, draft = cost.verify_s(cell.nodes) / cost.verify_s(1), cost.draft_s(cell.depth)
    why = (
        f"a step gives {cell.tokens_per_step:.2f} tokens and takes "
        f"{cell.step_s / own.step_s:.2f} times plain decoding's (verifying {cell.nodes} tokens "
        f"costs {verify:.2f} forwards of one, drafting is {draft / cell.step_s:.0%} of the step)"
    )
    if gain > 1 + _EVEN:
        return f"Drafting pays here: {name} is predicted at {gain:.2f} x plain decoding, as {why}."
    hint = "" if with_head else " (without a head; a head trained for the model may)"
    return (
        f"Drafting does not pay here{hint}: the best, {name}, is predicted at {gain:.2f} x plain "
        f"decoding, as {why}."
    )


def _width(name: str) -> int:
    """Of a drafter's name: W of head:WxK, and of suffix:KxW."""
    one, other = name.split(":")[1].split("x")
    return int(other if name.startswith("suffix") else one)


def show(body: dict[str, Any]) -> str:
    """Environment, t(n), operations, predictions, and the sentence at the end."""
    about = body["environment"]
    one = next(e["cost"]["q1_s"] for e in body["t"] if e["n"] == 1)
    plain_ = body["cells"]["plain"]["tokens_per_s"]
    parts = [
        f"{about['target']}: {about['weights']:,} weights in {about['dtype']} on "
        f"{about['device']}, {about['threads']} thread(s), torch {about['versions']['torch']}, "
        f"transformers {about['versions']['transformers']}; its forward is {about['forward']}",
        *([f"note: it is {about['inflated']}"] if about["inflated"] else []),
        "",
        table(["new tokens", "ms", "/ t(1)"], [
            [e["n"], milliseconds(e["cost"]["q1_s"]), e["cost"]["q1_s"] / one] for e in body["t"]
        ]),
        "",
        table(["per step", "host reads", "operations", "of them no views"], [
            [name, n["host_reads"], n["operations"], n["launches"]]
            for name, n in body["operations"].items()
        ]),
        "",
        table(["draft", "N", "tokens/step", "step ms", "x plain (predicted)"], [
            [name, c["nodes"], c["tokens_per_step"], milliseconds(c["step_s"]),
             c["tokens_per_s"] / plain_] for name, c in body["cells"].items()
        ]),
        "",
        *(f"warning: {warning}" for warning in body["warnings"]),
        body["sentence"],
    ]  # fmt: skip
    return "\n".join(parts)
