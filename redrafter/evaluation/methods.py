"""Ways of decoding that are compared with each other, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig

from redrafter.contracts import Drafter, Generation, InputError, Lookahead
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters import build
from redrafter.drafters.build import DRAFTERS, MISSING, Partners, describe_kinds, parse_kind
from redrafter.drafters.options import parse_name, split_list
from redrafter.drafting import (
    Plan,
    build_plan,
    describe_plans,
    foreseen,
    parse_plan,
    planner,
)
from redrafter.evaluation.references import ONE_ROW, REFERENCES, Assisted, Stock
from redrafter.evaluation.runs import Method, PromptBatch, TimedRun, TimedTarget
from redrafter.targets.model import Target

__all__ = [
    "DRAFTERS",
    "Assisted",
    "Loop",
    "Method",
    "Partners",
    "PromptBatch",
    "Stock",
    "TimedRun",
    "TimedTarget",
    "build_method",
    "check_partners",
    "describe_drafting",
    "describe_methods",
    "drafting_methods",
    "needed",
    "parse_methods",
    "plain_answers",
    "rows_at_a_time",
]  # fmt: skip


class Loop(Method):
    """Our loops: `plain`, or `speculative` with what `make_plan` makes for a batch's texts."""

    plan: Plan | None = None

    def __init__(
        self,
        name: str,
        target: Target,
        config: GenerationConfig,
        make_plan: Callable[[list[list[int]]], Plan] | None = None,
        twin: Drafter | None = None,
    ):
        super().__init__(name, target, config)
        self.make_plan, self.twin = make_plan, twin
        if make_plan is not None:
            plan = parse_plan(name)
            self.stops_early = plan.lookahead is not None
            self.law_only = plan.rule != "seeded" and bool(config.do_sample)

    def prepare(self, batch: PromptBatch) -> None:
        if self.make_plan is None:
            return
        plan = self.make_plan(batch.texts)
        self.plan = foreseen(
            plan, lambda lookahead: self._decode(self.target, batch, plan, lookahead)
        )

    @property
    def drafter(self) -> Drafter | None:
        return self.plan and self.plan.drafter

    def _run(self, batch: PromptBatch) -> TimedRun:
        timed = TimedTarget(self.target)
        if self.make_plan is None:
            made = plain(timed, batch.prompts, self.config, seeds=batch.seeds)
        else:
            made = self._decode(timed, batch, self.plan, self.plan.lookahead)
        seconds = {**made.stats.seconds, "forward": sum(timed.times_s[1:])}
        report = made.extra.get("drafter", {})
        return TimedRun(made.tokens, seconds, made.stats, timed.nodes[1:], report)

    def _decode(
        self, target: Target, batch: PromptBatch, plan: Plan, lookahead: Lookahead | None
    ) -> Generation:
        return speculative(
            target,
            batch.prompts,
            self.config,
            seeds=batch.seeds,
            drafter=plan.drafter,
            lookahead=lookahead,
            rule=plan.rule,
        )


KINDS = ("plain", *REFERENCES, *DRAFTERS)


def parse_methods(text: str) -> list[str]:
    """Names, in order and once each. Raises InputError naming one that is wrong."""
    try:
        names = list(dict.fromkeys(name for name in split_list(text) if name))
        if not names:
            raise InputError("give at least one, e.g. stock,plain,head")
        for name in names:
            needs_of(name)
    except InputError as error:
        raise InputError(f"methods: {error}") from None
    return names


def drafting_methods(text: str, else_: str) -> list[str]:
    """Names from `parse_methods`. Raises InputError for one that drafts nothing in our loop.

    else_: what is said of it
    """
    names = parse_methods(text)
    for name in names:
        if parse_name(name).kind not in DRAFTERS:
            raise InputError(f"methods: {name!r} {else_}; choose from {', '.join(DRAFTERS)}")
    return names


def needs_of(name: str) -> dict[str, int]:
    """The partners of a method, see `drafters.build.needs`. Raises InputError for a bad name."""
    kind = parse_name(name).kind
    if kind == "plain" and name != "plain":
        raise InputError(f"{name!r}: plain has no options")
    if kind == "plain":
        return {}
    if kind in REFERENCES:
        _, reference, options = parse_kind(name, REFERENCES)
        return reference.needs(options)
    if kind not in KINDS:
        raise InputError(f"{name!r} is unknown; choose from {', '.join(KINDS)}")
    return build.needs(parse_plan(name).drafter)


def needed(names: Sequence[str]) -> dict[str, int]:
    """The partners of all methods, as wide as the widest needs them."""
    found: dict[str, int] = {}
    for name in names:
        for partner, width in needs_of(name).items():
            found[partner] = max(width, found.get(partner, 0))
    return found


def check_partners(names: Sequence[str], config: Any) -> None:
    """Raises InputError, before anything is loaded, naming an option that a method lacks.

    config: SpeedConfig or LosslessConfig
    """
    for name in names:
        for partner in needs_of(name):
            # What is known, counted or measured is made here where it is not given.
            if partner not in ("bigrams", "texts", "price") and getattr(config, partner) is None:
                raise InputError(f"methods: {name!r} needs {MISSING[partner]}")
        if name.startswith("hf-") and rows_at_a_time(config) > 1:
            raise InputError("methods: " + ONE_ROW.format(name))


def rows_at_a_time(config: Any) -> int:
    """Of any configuration; those without a batch decode one row."""
    return getattr(config, "batch_size", 1) * getattr(config, "samples_per_prompt", 1)


def build_method(name: str, target: Target, config: GenerationConfig, partners: Partners) -> Method:
    """The method of a name from `parse_methods`. Raises InputError where it does not fit."""
    kind = parse_name(name).kind
    if kind == "plain":
        return Loop(name, target, config)
    if kind in REFERENCES:
        _, reference, options = parse_kind(name, REFERENCES)
        return reference.build(name, target, config, partners, **options)
    twin = None
    if "texts" not in needs_of(name):  # what knows the texts of a batch learns nothing
        twin = build_plan(name, target, partners).drafter
    return Loop(name, target, config, planner(name, target, partners), twin)


def describe_methods() -> str:
    """What a user may write for --methods."""
    outside = ["Without drafting of ours:", "  plain   our own loop", describe_kinds(REFERENCES)]
    return "\n".join([describe_drafting(), *outside])


def describe_drafting() -> str:
    """Of these, what drafts in our loop."""
    lines = [
        "Methods, each kind:part:part...; a part is key=value or, in order, what stands in [].",
        "Drafting:",
        describe_kinds(DRAFTERS),
        "Beside a drafter's own parts:",
        describe_plans(),
    ]
    return "\n".join(lines)


def plain_answers(
    target: Target,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    batch_size: int = 1,
) -> list[list[int]]:
    """Plain decoding of every prompt."""
    answers: list[list[int]] = []
    for i in range(0, len(prompts), batch_size):
        rows, own = prompts[i : i + batch_size], seeds[i : i + batch_size]
        answers += plain(target, rows, config, seeds=own).tokens
    return answers
