"""What `eval/lookahead.py` is asked for, case by case, and what of it cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from redrafter.config import LookaheadEvalConfig, SpeedConfig
from redrafter.contracts import InputError
from redrafter.drafters.build import DRAFTERS, Resources
from redrafter.drafters.options import parse_name
from redrafter.drafting import parse_strategy, strategy_maker
from redrafter.evaluation.methods import needed, parse_methods
from redrafter.files import digest_file, digest_json
from redrafter.targets.model import Target


@dataclass(frozen=True)
class Case:
    """One drafter on one set of prompts at one temperature.

    lookaheads: name in tables -> method; speed: how they are decoded, and its `out`
    """

    title: str
    drafter: str
    lookaheads: dict[str, str]
    speed: SpeedConfig

    @property
    def file(self) -> Path:
        return Path(self.speed.out)


def cases_of(config: LookaheadEvalConfig) -> list[Case]:
    """Every drafter on every set at every temperature. Raises InputError naming a text that has a
    placeholder too many."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(LookaheadEvalConfig)}
    values = {name: getattr(config, name) for name in shared - {"out"}}
    found = []
    for key, drafter in config.drafters.items():
        for set_name, prompts in config.sets.items():
            for temperature in config.temperatures:
                put = {"drafter": key, "set": set_name, "temperature": f"{temperature:g}"}
                lookaheads: dict[str, str] = {}
                for label, text in config.lookaheads.items():
                    name = f"{drafter}:lookahead={fill(f'lookaheads: {label}', text, put)}"
                    # A classifier of another set is, on that set, the set's own.
                    if label not in config.without.get(key, ()) and name not in lookaheads.values():
                        lookaheads[label] = name
                speed = SpeedConfig(
                    **values,
                    prompts=prompts,
                    temperature=temperature,
                    methods=",".join([drafter, *lookaheads.values()]),
                    out=str(Path(config.out) / f"{key}-{set_name}-t{temperature:g}.json"),
                )
                title = f"{key}, {set_name}, T = {temperature:g}"
                found.append(Case(title, drafter, lookaheads, speed))
    return found


def fill(label: str, text: str, values: dict[str, str]) -> str:
    """The text with its placeholders replaced."""

    def value(found: re.Match) -> str:
        if found[1] not in values:
            there = ", ".join(f"{{{name}}}" for name in values)
            raise InputError(f"{label}: {found[0]} is none of {there}")
        return values[found[1]]

    return re.sub(r"\{([^{}]*)\}", value, text)


def costs_file(case: Case, config: LookaheadEvalConfig) -> str | None:
    """Where its costs are read from; None where they are measured."""
    if config.costs is None:
        return None
    return fill("costs", config.costs, {"temperature": f"{case.speed.temperature:g}"})


def names_of(case: Case) -> list[str]:
    """Methods that can be named before anything is loaded; static lengths follow."""
    return [case.drafter, *case.lookaheads.values()]


def check(names: Sequence[str], config: LookaheadEvalConfig) -> None:
    """Raises InputError for names that are none, or that cannot be compared here."""
    for key, drafter in config.drafters.items():
        try:
            if parse_name(drafter).kind not in DRAFTERS:
                raise InputError(f"{drafter!r} drafts nothing; choose from {', '.join(DRAFTERS)}")
            if parse_strategy(drafter).lookahead is not None:
                raise InputError(f"{drafter!r} has a lookahead: write it under lookaheads")
        except InputError as error:
            raise InputError(f"drafters: {key}: {error}") from None
    parse_methods(",".join(names))
    wanted = needed(names)
    if "price" in wanted:
        raise InputError("drafters: one with budget=true chooses its levels itself: leave that out")
    if "bigrams" in wanted and config.bigrams is None:
        raise InputError("bigrams: give a table made by data/bigrams.py")


def check_strategies(case: Case, target: Target, resources: Resources) -> None:
    """Raises InputError, before anything is measured, for what fits no drafter or is missing."""
    for name in names_of(case):
        drafter = strategy_maker(name, target, resources)([[0]]).drafter
        if not drafter.drafts_alike:
            raise InputError(
                f"drafters: {case.drafter!r} chooses among drafters step by step: what a level "
                "costs is not known; name the drafters one by one"
            )


def check_same(case: Case, body: dict[str, Any], costs: str | None) -> None:
    """What was measured is what is asked for: names in tables, classifiers and costs too."""
    if body.get("lookaheads") != case.lookaheads or body.get("classifiers") != classifiers(case):
        raise InputError(
            f"{case.file} was measured with lookaheads of other names, or with classifiers that "
            "have changed since: remove it, or give another out"
        )
    if body.get("priced_by") != priced_by(costs):
        raise InputError(
            f"{case.file} was priced by {body.get('priced_by') or 'costs of its own'}, not by "
            f"{priced_by(costs) or 'its own'}: remove it, or give another out"
        )


def priced_by(costs: str | None) -> str | None:
    """Name and digest of a file of costs."""
    return costs and f"{costs} ({digest_file(Path(costs))[:16]})"


def classifiers(case: Case) -> dict[str, str]:
    """Path of every folder that a lookahead is loaded from -> digest of its files."""
    found = {}
    for name in case.lookaheads.values():
        lookahead = parse_name(parse_strategy(name).lookahead)
        options = (member.partition("=") for member in lookahead.members or ())
        path = next((value.strip() for key, _, value in options if key.strip() == "path"), None)
        if lookahead.kind == "disco" and path is None and case.speed.head is not None:
            path = f"{case.speed.head}/disco"
        if path is not None and Path(path).is_dir():
            files = sorted(p for p in Path(path).iterdir() if p.is_file())
            found[path] = digest_json({p.name: digest_file(p) for p in files})[:16]
    return found
