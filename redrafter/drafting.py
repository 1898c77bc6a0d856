"""How the loop is to draft, by name: a drafter's name (`drafters/build.py`) and, among its parts,

rule=RULE                             who decides what is accepted; `seeded` where it is missing
lookahead=NAME(key=value,...)         when to stop drafting; none drafts to full depth
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from redrafter.contracts import Drafter, InputError, Lookahead
from redrafter.decode.ratio import Rule
from redrafter.drafters import build
from redrafter.drafters.build import Resources
from redrafter.drafters.options import describe, options_of, parse_name, split_list
from redrafter.fetch import fetch
from redrafter.lookahead.confidence import ConfidenceLookahead
from redrafter.lookahead.disco import DiscoLookahead, check_target, load_disco
from redrafter.lookahead.draft_exit import DraftExit
from redrafter.lookahead.heuristic import HeuristicLookahead
from redrafter.lookahead.oracle import FullDepth, OracleLookahead
from redrafter.lookahead.roc import RocLookahead
from redrafter.lookahead.static import StaticLookahead
from redrafter.targets.model import Target

RULES = get_args(Rule)


def static(drafter: Drafter, *, depth: int) -> StaticLookahead:
    """Always the same number of levels.

    depth: levels, at most the drafter's own
    """
    if depth < 1:
        raise InputError(f"lookahead: static depth {depth} must be positive")
    return StaticLookahead(depth)


def exit_(
    drafter: Drafter,
    *,
    threshold: float | None = None,
    alpha: float = 0.9,
) -> DraftExit:
    """Draft & Verify's: until the drafter is unsure of a token, by a threshold that adapts.

    threshold: to begin with; 0.8 greedy, 0.5 sampled where it is missing
    alpha: the share of drafted tokens that should be accepted
    """
    return DraftExit.of(drafter, threshold=threshold, alpha=alpha)


def heuristic(
    drafter: Drafter,
    *,
    start: int = 5,
    more: int = 2,
    less: int = 1,
    keep: bool = False,
) -> HeuristicLookahead:
    """transformers': more levels after a full success, fewer after a rejection.

    start: levels at first
    more: levels added where all that were drafted were accepted
    less: levels taken away where not
    keep: from one generation to the next
    """
    return HeuristicLookahead.of(drafter, start=start, more=more, less=less, keep=keep)


def confidence(drafter: Drafter, *, threshold: float = 0.4) -> ConfidenceLookahead:
    """transformers': until the drafter is unsure of a token.

    threshold: of the drafter's own probability
    """
    return ConfidenceLookahead.of(drafter, threshold=threshold)


def roc(
    drafter: Drafter,
    *,
    threshold: float = 0.4,
    least_samples: int = 6,
    miss_weight: float = 3.0,
) -> RocLookahead:
    """transformers': the same, by the threshold that would have been best so far.

    threshold: before there is an estimate
    least_samples: tokens judged before there is one
    miss_weight: what stopping too early costs, stopping too late being 1
    """
    return RocLookahead.of(
        drafter, threshold=threshold, least_samples=least_samples, miss_weight=miss_weight
    )


def disco(
    drafter: Drafter,
    *,
    path: str | None = None,
    when: str = "level",
    rule: str = "cost",
    threshold: float | None = None,
) -> DiscoLookahead:
    """A classifier trained for this drafter with train/disco.py.

    path: its folder, here or on the Hub; None is the folder `disco` beside the drafter's head
    when: "level" after each level, "step" once per step, up front
    rule: "cost", by what levels give and cost, or the paper's "threshold"
    threshold: instead of the trained one
    """
    if path is None:
        head = getattr(drafter, "head", None)
        if head is None:
            raise InputError("lookahead disco: give its path; only a head may have it beside it")
        path = f"{head.name_or_path}/disco"
    network = load_disco(fetch(path, "lookahead disco"))
    return DiscoLookahead(network, drafter, when, rule, threshold)


def oracle(drafter: Drafter, *, strict: bool = True) -> OracleLookahead:
    """As many levels as will be accepted, for reports: decodes twice, the first time untimed.

    strict: end with an error where it does not know; false drafts to full depth there
    """
    return OracleLookahead(strict=strict)


#: To add one: a function of the drafter that it is for, and its options.
LOOKAHEADS: dict[str, Callable[..., Lookahead]] = {
    "static": static,
    "exit": exit_,
    "heuristic": heuristic,
    "confidence": confidence,
    "roc": roc,
    "oracle": oracle,
    "disco": disco,
}


@dataclass(frozen=True)
class Strategy:
    """How the loop is to draft: arguments of `speculative`."""

    drafter: Drafter
    rule: Rule = "seeded"
    lookahead: Lookahead | None = None


@dataclass(frozen=True)
class StrategyName:
    """A name taken apart. drafter: what is left for `build_drafter`; lookahead: text or None"""

    drafter: str
    rule: Rule = "seeded"
    lookahead: str | None = None


def parse_strategy(name: str) -> StrategyName:
    """Raises InputError, before anything is built, naming what is wrong with any part."""
    kept, found = [], {}
    for part in split_list(name, ":"):
        key, _, value = (item.strip() for item in part.partition("="))
        if key not in ("rule", "lookahead"):
            kept.append(part)
        elif key in found:
            raise InputError(f"{name!r}: {key} is set twice")
        else:
            found[key] = value
    strategy = StrategyName(":".join(kept), **found)
    if strategy.rule not in RULES:
        raise InputError(f"{name!r}: rule {strategy.rule!r} is not one of {', '.join(RULES)}")
    if strategy.lookahead is not None:
        make, _ = _lookahead(name, strategy.lookahead)
        if make is oracle and strategy.rule != "seeded":
            raise InputError(
                f"{name!r}: by rule {strategy.rule} the text depends on what is drafted, and no "
                "oracle foresees it: leave out the rule"
            )
    build.needs(strategy.drafter)
    return strategy


def build_strategy(name: str, target: Target, resources: Resources) -> Strategy:
    """The strategy of a name. Raises InputError naming what is wrong with it or missing."""
    strategy = parse_strategy(name)
    drafter = build.build_drafter(strategy.drafter, target, resources)
    lookahead = None
    if strategy.lookahead is not None:
        make, options = _lookahead(name, strategy.lookahead)
        lookahead = make(drafter, **options)
        if isinstance(lookahead, DiscoLookahead):
            check_target(lookahead.config, target.fingerprint())
    return Strategy(drafter, strategy.rule, lookahead)


def strategy_maker(
    name: str, target: Target, resources: Resources
) -> Callable[[list[list[int]]], Strategy]:
    """Of the texts of a batch (per row, prompt and plain answer), the strategy of a name.

    It is one strategy for all batches, so that what a drafter has learned stays, unless the drafter
    knows the texts. Raises as `build_strategy` does, at once.
    """
    first = build_strategy(name, target, replace(resources, texts=[[0]]))
    if "texts" not in build.needs(parse_strategy(name).drafter):
        return lambda texts: first
    return lambda texts: build_strategy(name, target, replace(resources, texts=texts))


def foreseen(strategy: Strategy, decode: Callable[[Lookahead], Any]) -> Strategy:
    """The strategy itself, or, of an oracle, with what it must know of a batch.

    decode: decodes the batch once with the strategy's drafter and rule and the lookahead given
    """
    if not isinstance(strategy.lookahead, OracleLookahead):
        return strategy
    seen = FullDepth()
    decode(seen)
    return replace(strategy, lookahead=OracleLookahead(seen.depths, strategy.lookahead.strict))


def _lookahead(name: str, text: str) -> tuple[Callable[..., Lookahead], dict]:
    parsed = parse_name(text)
    make = LOOKAHEADS.get(parsed.kind)
    if make is None:
        raise InputError(
            f"{name!r}: lookahead {parsed.kind!r} is not one of {', '.join(LOOKAHEADS)}"
        )
    if parsed.parts:
        raise InputError(f"{name!r}: write the lookahead's options in brackets, key=value,...")
    return make, options_of(name, parsed.members or (), make)


def describe_strategies() -> str:
    """For help texts."""
    lines = [f"  rule=RULE   {', '.join(RULES)}"]
    for name, make in LOOKAHEADS.items():
        lines += describe(f"lookahead={name}(key=value,...)", make)
    return "\n".join(lines)
