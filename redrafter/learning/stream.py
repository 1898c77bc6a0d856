"""A stream of prompts, decoded in order by a head that learns meanwhile and by the same
head as it was; the drift alarm watches both.

Figures: tokens per step, pooled over the prompts of a window; equal texts of both; seconds and CPU
seconds of both, learning included; tokens per step on held-out prompts, which are not learned from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch.nn import Module

from redrafter.bars import Bar
from redrafter.config import StreamConfig
from redrafter.contracts import Generation, StepStats
from redrafter.data.answers import generation_config
from redrafter.data.prompts import Prompt
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import needs
from redrafter.drafting import Strategy, build_strategy, parse_strategy
from redrafter.evaluation.figures import acceptance
from redrafter.evaluation.models import load_draft
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.evaluation.report import table
from redrafter.fetch import fetch
from redrafter.heads.load import load_head
from redrafter.learning.drift import DriftAlarm, watched
from redrafter.learning.learner import Learner
from redrafter.resources import gather
from redrafter.targets.model import Target


@dataclass
class Arm:
    """One way through the stream, and what it took. stats: of each batch"""

    strategy: Strategy
    alarm: DriftAlarm | None
    stats: list[StepStats] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0

    def report(self) -> dict[str, Any]:
        depth = len(self.stats[0].drafted_at)
        drafted = [sum(s.drafted_at[k] for s in self.stats) for k in range(depth)]
        accepted = [sum(s.accepted_at[k] for s in self.stats) for k in range(depth)]
        return {
            "tokens_per_step": _tau(self.stats), "acceptance": acceptance(drafted, accepted),
            "seconds": self.seconds, "cpu_s": self.cpu_s,
            "drift": None if self.alarm is None else self.alarm.report(),
        }  # fmt: skip


def _tau(stats: Sequence[StepStats]) -> float | None:
    steps = sum(sum(s.steps) for s in stats)
    return sum(sum(s.emitted) for s in stats) / steps if steps else None


class Stream:
    """The stream of a configuration; `run` goes through it once."""

    def __init__(self, config: StreamConfig, target: Target, head: Module):
        self.config, self.target = config, target
        if config.held_out:
            own = replace(config, n_prompts=config.held_out)
            self.held_out, self.prompts, left = evaluation_prompts(target, own, config.n_prompts)
        else:
            self.prompts, self.held_out, left = evaluation_prompts(target, config)
        self.warnings = list(left)
        self.decoding = generation_config(config.temperature, config.max_new_tokens)
        self.learner: Learner | None = None
        self.arms = {"as it was": self._arm(head)}
        if config.learn is not None:
            own = load_head(fetch(config.head, "head"), target, config.allow_other_target)
            arm = self._arm(own)  # before it learns: the profile is of the head as it was
            self.learner = Learner(own, target, config.learn, config.learning)
            arm.strategy = self.learner.watching(arm.strategy)
            self.arms["learning"] = arm
        self.probes: list[dict[str, Any]] = []

    def _arm(self, head: Any) -> Arm:
        config = self.config
        given = {"head": head, "probed": config.probed, "reference": config.reference,
                 "bigrams": config.bigrams}  # fmt: skip
        wanted = needs(parse_strategy(config.drafter).drafter)
        if "draft" in wanted:
            given["draft"] = load_draft(config)
        resources = gather(wanted, self.target, given, config.tree, config.batch_size)
        strategy = build_strategy(config.drafter, self.target, resources)
        alarm = watched(config, config.drafter, strategy.drafter, head)
        if isinstance(alarm, str) and alarm not in self.warnings:
            self.warnings.append(alarm)
        return Arm(strategy, None if isinstance(alarm, str) else alarm)

    def run(self) -> dict[str, Any]:
        """Decode it all. What was learned is saved, however it ends."""
        windows, equal, size = list[dict[str, Any]](), 0, self.config.batch_size
        with ExitStack() as stack:
            if self.learner is not None:
                stack.enter_context(self.learner)
            self._probe(0)
            starts = range(0, len(self.prompts), size)
            for turn, i in enumerate(Bar(starts, desc="stream", unit="turn", leave=False)):
                batch = self.prompts[i : i + size]
                equal += self._decode(batch, i, turn)
                done = i + len(batch)
                if done % self.config.window == 0 or done == len(self.prompts):
                    windows.append(self._window(windows[-1]["last"] if windows else 0, done))
                    self._probe(done)
        return {
            "windows": windows,
            "held_out": self.probes,
            "n_prompts": len(self.prompts),
            "equal_texts": equal,
            "temperature": self.config.temperature,
            "batch_size": size,
            "arms": {name: arm.report() for name, arm in self.arms.items()},
            "learner": None if self.learner is None else self.learner.report(),
            "warnings": self.warnings,
        }

    def _window(self, first: int, last: int) -> dict[str, Any]:
        size = self.config.batch_size
        rates = {
            name: _tau(arm.stats[first // size : -(-last // size)])
            for name, arm in self.arms.items()
        }
        return {"first": first + 1, "last": last, "tokens_per_step": rates}

    def _decode(self, batch: Sequence[Prompt], first: int, turn: int) -> int:
        """A batch by every arm, in turns. Returns how many of its texts are the same by all."""
        arms = list(self.arms.values())
        turn %= len(arms)
        texts = []
        for arm in arms[turn:] + arms[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            made = self._made(arm.strategy, batch, self.config.seed + first)
            arm.seconds += time.perf_counter() - wall
            arm.cpu_s += time.process_time() - cpu
            arm.stats.append(made.stats)
            if arm.alarm and (said := arm.alarm.observe(made.stats, self.config.max_new_tokens)):
                Bar.write(said)
            texts.append(made.tokens)
        return sum(one == other for one, other in zip(texts[0], texts[-1], strict=True))

    def _made(self, strategy: Strategy, batch: Sequence[Prompt], seed: int) -> Generation:
        return speculative(
            self.target, [list(p.ids) for p in batch], self.decoding,
            seeds=[seed + i for i in range(len(batch))], drafter=strategy.drafter,
            lookahead=strategy.lookahead, rule=strategy.rule,
        )  # fmt: skip

    def _probe(self, after: int) -> None:
        """Tokens per step on the held-out prompts, with the head as it is now."""
        if not self.held_out:
            return
        strategy, size = list(self.arms.values())[-1].strategy, self.config.batch_size
        if self.learner is not None:
            strategy = replace(strategy, lookahead=strategy.lookahead.inner)
        seed = self.config.seed + len(self.prompts)
        made = [
            self._made(strategy, self.held_out[i : i + size], seed + i)
            for i in range(0, len(self.held_out), size)
        ]
        self.probes.append({"after": after, "tokens_per_step": _tau([m.stats for m in made])})


def show(body: dict[str, Any]) -> str:
    """One line per window, then what it took."""
    names = list(body["arms"])
    probes = {probe["after"]: probe["tokens_per_step"] for probe in body["held_out"]}
    rows = [["before", *[None] * len(names), probes.get(0)]] if probes else []
    for window in body["windows"]:
        rates = [window["tokens_per_step"][name] for name in names]
        label = f"prompts {window['first']}..{window['last']}"
        rows.append([label, *rates, probes.get(window["last"])])
    columns = ["tokens per step", *names, "held out, after"]
    lines = [table(columns, rows), ""]
    if (learner := body["learner"]) is not None:
        share = learner["learning_s"] / max(1e-9, learner["learning_s"] + learner["decode_s"])
        lines.append(
            f"learning: {learner['steps']} optimiser steps, {learner['skipped_steps']} left out, "
            f"{share:.1%} of the time; texts equal: {body['equal_texts']}/{body['n_prompts']}"
        )
    for name, arm in body["arms"].items():
        took = f"{name}: {arm['seconds']:.1f} s, {arm['cpu_s']:.1f} s of CPU"
        if (drift := arm["drift"]) is not None:
            after = drift["alarm_after"]
            took += f"; drift alarm: {'none' if after is None else f'after {after} batches'}"
        lines.append(took)
    return "\n".join(lines + [f"warning: {w}" for w in body["warnings"]])
