"""Every way of drafting against plain decoding, at every temperature, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch.nn import Module

from redrafter.config import LosslessConfig
from redrafter.data.answers import generation_config
from redrafter.drafting import Strategy, parse_strategy, strategy_maker
from redrafter.evaluation.lossless import ModeResult, check_mode, ragged, references
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
from redrafter.evaluation.report import table
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
    prompts, others, warnings = evaluation_prompts(target, config, more)
    greedy = generation_config(0.0, config.max_new_tokens)
    resources, counted_on = load_resources(names, config, target, head, others, greedy)
    makers = {name: strategy_maker(name, target, resources) for name in names}
    rows = ragged([p.ids for p in prompts])
    warning = head and holdout_warning(head.name_or_path, config.prompts, prompts[0].row)
    results, skipped = compare(target, makers, rows, batch_sizes, modes_of(temperatures), config)
    return results, {
        "methods": {
            name: {mode: asdict(result) for mode, result in modes.items()}
            for name, modes in results.items()
        },
        "greedy_only": skipped,
        "bigram_counted_on": counted_on,
        "warnings": warnings + ([warning] if warning else []),
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
    config: LosslessConfig,
) -> tuple[Results, list[str]]:
    """Results, and the methods that were compared greedily alone: a ratio rule's sampled text has
    plain's law and is another text."""
    results: Results = {name: {} for name in makers}
    greedy_only = [name for name in makers if parse_strategy(name).rule != "seeded"]
    for mode, temperature in modes.items():
        names = [name for name in makers if temperature == 0 or name not in greedy_only]
        if not names:
            continue
        decoding = generation_config(temperature, config.max_new_tokens)
        plain_of = references(target, rows, decoding, config.seed)
        for name in names:
            results[name][mode] = check_mode(
                target, makers[name], rows, decoding, plain_of, batch_sizes, config.seed,
                name=name,
            )  # fmt: skip
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
