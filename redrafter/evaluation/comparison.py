"""Every way of drafting against plain decoding, at every temperature, and the verdict.

Prompts are compared in groups, each at every temperature by every method, so that the scores of one
group alone are in memory; what a group gave is in a journal beside the result before the next one
begins, and a run that was stopped goes on behind it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.nn import Module

from redrafter.bars import Bar
from redrafter.config import LosslessConfig
from redrafter.data.answers import generation_config
from redrafter.data.day import dated, day_of
from redrafter.drafting import Strategy, parse_strategy, strategy_maker
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.lossless import ModeResult, check_mode, ragged, references
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
from redrafter.evaluation.report import table
from redrafter.files import digest_json, plain_values, versions
from redrafter.targets.devices import device_name
from redrafter.targets.model import Target

MakeStrategy = Callable[[list[list[int]]], Strategy]
Results = dict[str, dict[str, ModeResult]]  # method -> mode


def measure(
    config: LosslessConfig,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    temperatures: Sequence[float],
    target: Target,
    head: Module | None,
) -> tuple[Results, dict[str, Any]]:
    """(what was found, the same and what there is to say of it, ready for JSON).

    names: from `drafting_methods`
    """
    more = prompts_to_count(names, config)
    path = None if config.out is None else journal_path(config.out)
    begun = None if path is None else Journal.begun(path)
    day = day_of(target.tokenizer, begun)
    prompts, others, warnings = evaluation_prompts(target, config, more, day=day)
    greedy = generation_config(0.0, config.max_new_tokens)
    resources, counted_on = load_resources(names, config, target, head, others, greedy)
    makers = {name: strategy_maker(name, target, resources) for name in names}
    rows = ragged([p.ids for p in prompts])
    warning = head and holdout_warning(head.name_or_path, config.prompts, prompts[0].row)
    journal = None
    if path is not None:
        journal = Journal(
            path, dated(identity(config, target, head, rows), day), names=("first_prompt", "mode")
        )
    results, skipped = compare(
        target, makers, rows, batch_sizes, modes_of(temperatures), config.seed,
        config.max_new_tokens, journal,
    )  # fmt: skip
    return results, {
        "methods": {
            name: {mode: result.told() for mode, result in modes.items()}
            for name, modes in results.items()
        },
        "greedy_only": skipped,
        "bigram_counted_on": counted_on,
        "warnings": warnings + ([warning] if warning else []),
    }


def journal_path(out: str) -> Path:
    """Where a run keeps what it has compared, until the result is written."""
    return Path(out).with_suffix(".journal.jsonl")


def identity(
    config: LosslessConfig, target: Target, head: Module | None, rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """What must be the same for groups to belong together."""
    given = {key: value for key, value in plain_values(config).items() if key != "out"}
    return {
        **given,
        "tokens of prompts": digest_json(rows),
        "weights of target": target.fingerprint(),
        "weights of head": None if head is None else head.fingerprint(),
        "device": device_name(target.device),
        "versions": versions(),
    }


def modes_of(temperatures: Sequence[float]) -> dict[str, float]:
    """{mode: temperature}, greedy first; the first sampled one has the bare name `seeded`."""
    modes = {"greedy": 0.0}
    for temperature in temperatures:
        if temperature > 0:
            modes[f"seeded_{temperature:g}" if "seeded" in modes else "seeded"] = temperature
    return modes


def compare(
    target: Target,
    makers: Mapping[str, MakeStrategy],
    rows: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    modes: Mapping[str, float],
    seed: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> tuple[Results, list[str]]:
    """Results, and the methods that were compared greedily alone: a ratio rule's sampled text has
    plain's law and is another text."""
    greedy_only = [name for name in makers if parse_strategy(name).rule != "seeded"]
    of_mode = {
        mode: {n: maker for n, maker in makers.items() if not t or n not in greedy_only}
        for mode, t in modes.items()
    }
    of_mode = {mode: some for mode, some in of_mode.items() if some}
    size = math.lcm(*batch_sizes)  # so that batches are those of the whole
    kept = {} if journal is None else journal.entries
    passes = {mode: 1 + len(some) * len(batch_sizes) for mode, some in of_mode.items()}
    total = len(rows) * sum(passes.values())
    parts: dict[str, dict[str, list[ModeResult]]] = {name: {} for name in makers}
    with Bar(total=total, desc="compared", unit="row", leave=False) as bar:
        for start, mode in itertools.product(range(0, len(rows), size), of_mode):
            group = rows[start : start + size]
            entry = kept.get((start, mode))
            if entry is None:
                bar.set_postfix_str(mode)
                decoding = generation_config(modes[mode], max_new_tokens)
                plain_of = references(target, group, decoding, seed + start, bar.update)
                entry = {
                    name: asdict(check_mode(
                        target, make, group, decoding, plain_of, batch_sizes, seed + start,
                        first=start, advance=bar.update,
                    ))
                    for name, make in of_mode[mode].items()
                }  # fmt: skip
                if journal is not None:
                    journal.add((start, mode), entry)
            else:
                bar.initial += len(group) * passes[mode]  # what is to come is not as fast
                bar.update(len(group) * passes[mode])
            for name, found in entry.items():
                parts[name].setdefault(mode, []).append(ModeResult.from_json(found))
    results = {
        name: {mode: ModeResult.together(found) for mode, found in of.items()}
        for name, of in parts.items()
    }
    return results, greedy_only


def _rows_said(results: Sequence[ModeResult]) -> str:
    """What a row is."""
    times = max(r.rows_compared // max(1, r.prompts) for r in results)
    how = "" if times < 2 else f" {times} times, at one batch size after the other"
    return f"rows: every prompt decoded with drafting{how}, and compared with plain decoding of it"


def unexplained(results: Results) -> int:
    """Differences that no rounding explains."""
    return sum(r.unexplained for modes in results.values() for r in modes.values())


def show(results: Results, greedy_only: Sequence[str] = ()) -> str:
    """One line per method and mode, every unexplained difference, then a verdict."""
    columns = ["method", "mode", "T", "prompts", "rows equal", "tokens", "near-ties", "unexplained",
               "max diff", "rounding"]  # fmt: skip
    every = [(name, mode, r) for name, modes in results.items() for mode, r in modes.items()]
    rows = [
        [name, mode, r.temperature, r.prompts, f"{r.rows_equal}/{r.rows_compared}",
         r.compared_tokens, r.near_ties, r.unexplained, f"{r.largest_difference:.1e}",
         f"{r.rounding:.1e}"]
        for name, mode, r in every
    ]  # fmt: skip
    lines = [table(columns, rows)]
    for name, mode, r in every:
        for case in r.cases:
            if not case.explained:
                lines.append(
                    f"UNEXPLAINED {name} {mode}: prompt {case.prompt}, batch {case.batch_size}, "
                    f"new token {case.position}: {case.token} instead of {case.reference_token}, "
                    f"gap {case.gap}, difference {case.difference}"
                )
        if r.far_logits:
            lines.append(
                f"warning: {name} {mode}: the scores of {r.far_logits} positions differ by more "
                "than rounding explains, though no token did"
            )
    for name in greedy_only:
        lines.append(
            f"{name}: compared greedily only; its rule's sampled text has plain's law and is "
            "another text"
        )
    if every:
        lines.append(_rows_said([r for _, _, r in every]))
    bad, ties = (sum(getattr(r, key) for _, _, r in every) for key in ("unexplained", "near_ties"))
    if bad:
        lines.append(f"NOT lossless: {bad} unexplained differences")
    elif ties:
        lines.append(f"lossless up to rounding: {ties} near-ties, nothing unexplained")
    else:
        lines.append("lossless: every token is that of plain decoding")
    return "\n".join(lines)
