"""Ways of decoding that are compared with each other, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig

from redrafter.contracts import Drafter, Generation, InputError, Lookahead
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters import build
from redrafter.drafters.build import DRAFTERS, MISSING, Resources, describe_kinds, parse_kind
from redrafter.drafters.options import parse_name, split_list
from redrafter.drafting import (
    Strategy,
    build_strategy,
    describe_strategies,
    foreseen,
    parse_strategy,
    strategy_maker,
)
from redrafter.evaluation.references import ONE_ROW, REFERENCES, Assisted, Stock
from redrafter.evaluation.runs import Method, PromptBatch, TimedCall, TimedTarget
from redrafter.targets.model import Target

__all__ = [
    "DRAFTERS",
    "Assisted",
    "Loop",
    "Method",
    "PromptBatch",
    "Resources",
    "Stock",
    "TimedCall",
    "TimedTarget",
    "build_method",
    "check_resources",
    "describe_drafting",
    "describe_methods",
    "drafting_methods",
    "needed",
    "parse_methods",
    "plain_answers",
    "rows_at_a_time",
]  # fmt: skip


class Loop(Method):
    """Our loops: `plain`, or `speculative` with what `make_strategy` makes for a batch's texts."""

    strategy: Strategy | None = None

    def __init__(
        self,
        name: str,
        target: Target,
        config: GenerationConfig,
        make_strategy: Callable[[list[list[int]]], Strategy] | None = None,
        twin: Drafter | None = None,
    ):
        super().__init__(name, target, config)
        self.make_strategy, self.twin = make_strategy, twin
        if make_strategy is not None:
            strategy = parse_strategy(name)
            self.stops_early = strategy.lookahead is not None
            self.law_only = strategy.rule != "seeded" and bool(config.do_sample)

    def prepare(self, batch: PromptBatch) -> None:
        if self.make_strategy is None:
            return
        strategy = self.make_strategy(batch.texts)
        self.strategy = foreseen(
            strategy, lambda lookahead: self._decode(self.target, batch, strategy, lookahead)
        )

    @property
    def drafter(self) -> Drafter | None:
        return self.strategy and self.strategy.drafter

    def _run(self, batch: PromptBatch) -> TimedCall:
        timed = TimedTarget(self.target)
        if self.make_strategy is None:
            made = plain(timed, batch.prompts, self.config, seeds=batch.seeds)
        else:
            made = self._decode(timed, batch, self.strategy, self.strategy.lookahead)
        seconds = {**made.stats.seconds, "forward": sum(timed.times_s[1:])}
        report = made.extra.get("drafter", {})
        return TimedCall(made.tokens, seconds, made.stats, timed.nodes[1:], report)

    def _decode(
        self, target: Target, batch: PromptBatch, strategy: Strategy, lookahead: Lookahead | None
    ) -> Generation:
        return speculative(
            target,
            batch.prompts,
            self.config,
            seeds=batch.seeds,
            drafter=strategy.drafter,
            lookahead=lookahead,
            rule=strategy.rule,
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
    """The resources of a method, see `drafters.build.needs`. Raises InputError for a bad name."""
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
    return build.needs(parse_strategy(name).drafter)


def needed(names: Sequence[str]) -> dict[str, int]:
    """The resources of all methods, as wide as the widest needs them."""
    found: dict[str, int] = {}
    for name in names:
        for resource, width in needs_of(name).items():
            found[resource] = max(width, found.get(resource, 0))
    return found


def check_resources(names: Sequence[str], config: Any) -> None:
    """Raises InputError, before anything is loaded, naming an option that a method lacks.

    config: SpeedConfig or LosslessConfig
    """
    for name in names:
        for resource in needs_of(name):
            # What is known, counted or measured is made here where it is not given.
            if resource not in ("bigrams", "texts", "price") and getattr(config, resource) is None:
                raise InputError(f"methods: {name!r} needs {MISSING[resource]}")
        if name.startswith("hf-") and rows_at_a_time(config) > 1:
            raise InputError("methods: " + ONE_ROW.format(name))


def rows_at_a_time(config: Any) -> int:
    """Of any configuration; those without a batch decode one row."""
    return getattr(config, "batch_size", 1) * getattr(config, "samples_per_prompt", 1)


def build_method(
    name: str, target: Target, config: GenerationConfig, resources: Resources
) -> Method:
    """The method of a name from `parse_methods`. Raises InputError where it does not fit."""
    kind = parse_name(name).kind
    if kind == "plain":
        return Loop(name, target, config)
    if kind in REFERENCES:
        _, reference, options = parse_kind(name, REFERENCES)
        return reference.build(name, target, config, resources, **options)
    twin = None
    if "texts" not in needs_of(name):  # what knows the texts of a batch learns nothing
        twin = build_strategy(name, target, resources).drafter
    return Loop(name, target, config, strategy_maker(name, target, resources), twin)


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
        describe_strategies(),
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
