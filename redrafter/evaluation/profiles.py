"""What `eval/costs.py` measures of whom, shows, and keeps as the profile of this device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.nn import Module

from redrafter.config import CostsConfig
from redrafter.contracts import InputError
from redrafter.costs import Cost, CostMeter, CostTable
from redrafter.drafters.build import Resources, build_drafter, needs, require
from redrafter.drafters.options import split_list
from redrafter.drafters.profile import profile_path, weights_digest
from redrafter.evaluation.models import load_draft
from redrafter.evaluation.prompts import number_list
from redrafter.evaluation.report import milliseconds, table, write_result
from redrafter.targets.model import Target


def check_numbers(config: CostsConfig) -> dict[str, list[int]]:
    """Where `CostMeter` is to measure. Raises InputError naming a number that makes no sense."""
    if config.rounds < 1:
        raise InputError(f"rounds: {config.rounds} must be at least 1")
    return {
        "new_tokens": number_list("new_tokens", config.new_tokens, int, 1),
        "contexts": number_list("contexts", config.contexts, int, 1),
        "batches": number_list("batch_sizes", config.batch_sizes, int, 1),
    }


def check_drafters(config: CostsConfig) -> dict[str, str]:
    """What to measure: its label -> its name for `build_drafter`. Raises InputError before any
    work."""
    given = [option for option in ("head", "draft") if getattr(config, option) is not None]
    if config.drafters is not None:
        names = {name: name for name in split_list(config.drafters) if name}
    else:
        tree = config.tree
        names = {f"head:{tree.width}x{tree.depth}:{tree.shape}": "head"} if config.head else {}
        if config.draft is not None:
            name = f"model:1x{tree.depth}"
            names[name] = name
    used = set()
    for name in names.values():
        require(name, given)
        used |= needs(name).keys()
    if config.profile:
        if not given:
            raise InputError("profile: give --head or --draft, whose folder the profile is kept in")
        for option in given:
            folder = getattr(config, option)
            if option not in used:
                raise InputError(f"profile: drafters: {config.drafters} uses no {option}; name one")
            if not Path(folder).is_dir():
                raise InputError(f"profile: {option}: {folder!r} is no folder here: download it")
            weights_digest(folder)
    return names


def measure(
    config: CostsConfig,
    where: dict[str, list[int]],
    names: dict[str, str],
    target: Target,
    head: Module | None,
) -> CostTable:
    """where: from `check_numbers`; names: from `check_drafters`"""
    resources = Resources(head=head, draft=load_draft(config), tree=config.tree)
    return CostMeter(
        target,
        **where,
        drafters={label: build_drafter(name, target, resources) for label, name in names.items()},
        temperature=config.temperature,
        loop=config.profile,
    ).run(config.rounds)


def keep_profiles(
    config: CostsConfig, names: dict[str, str], target: Target, body: dict[str, Any]
) -> None:
    """In the folder of head and draft each, what was measured of its drafters."""
    for option in ("head", "draft"):
        folder = getattr(config, option)
        if folder is None:
            continue
        own = {label for label, name in names.items() if option in needs(name)}
        kept = {
            **body,
            "drafters": [e for e in body["drafters"] if e["name"] in own],
            "loop": [e for e in body["loop"] if e["name"] in {"plain", "none", *own}],
            "of": weights_digest(folder),
        }
        path = profile_path(folder, target)
        write_result(str(path), config, target, kept)
        print(f"kept as the profile of this device: {path}")


def show(costs: CostTable) -> str:
    """Milliseconds: median [quartiles], and the ratio to one new token."""

    def quartiles(cost: Cost) -> str:
        return f"[{milliseconds(cost.q1_s)}, {milliseconds(cost.q3_s)}]"

    rows = []
    singles = {(e.context, e.batch): e.cost.median_s for e in costs.target if e.n == 1}
    for entry in costs.target:
        one = singles.get((entry.context, entry.batch))
        ratio = None if one is None else entry.cost.median_s / one
        rows.append(
            [f"target n={entry.n}", entry.context, entry.batch, milliseconds(entry.cost.median_s),
             quartiles(entry.cost), ratio]
        )  # fmt: skip
    for entry in costs.drafters:
        where = [entry.context, entry.batch]
        for level, cost in enumerate(entry.levels, start=1):
            rows.append([f"{entry.name} level {level}", *where, milliseconds(cost.median_s),
                         quartiles(cost), None])  # fmt: skip
        rows.append([f"{entry.name} whole draft", *where, milliseconds(entry.draft.median_s),
                     quartiles(entry.draft), None])  # fmt: skip
    for entry in costs.loop:
        rows.append([f"{entry.name} whole step, n={entry.n}", entry.context, entry.batch,
                     milliseconds(entry.step.median_s), quartiles(entry.step), None])  # fmt: skip
    return table(["forward", "context", "batch", "ms", "quartiles", "/ t(1)"], rows)
