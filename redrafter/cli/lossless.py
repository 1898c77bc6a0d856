"""`eval/lossless.py`: proves on prompts that drafting changes no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners, prompts_to_count
from redrafter.config import LosslessConfig
from redrafter.contracts import InputError


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints a table, writes JSON. Returns 1 if a difference stays unexplained."""
    config = parse(
        LosslessConfig,
        argv,
        "eval/lossless.py",
        "Speculative against plain decoding, token by token; every difference must be a near-tie.",
        names="describe_drafting",
        alone=True,
    )
    from redrafter.data.answers import generation_config
    from redrafter.drafting import planner
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.lossless import ragged
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning, number_list
    from redrafter.evaluation.report import write_result

    batch_sizes = number_list("batch_sizes", config.batch_sizes, int, 1)
    temperatures = number_list("temperatures", config.temperatures, float, 0.0)
    names = drafting_methods(config.methods)
    known.check_partners(names, config)
    target, head = load_both(config, measured=True)
    more = prompts_to_count(names, config)
    prompts, others, warnings = evaluation_prompts(target, config, more)
    greedy = generation_config(0.0, config.max_new_tokens)
    partners, counted_on = load_partners(names, config, target, head, others, greedy)
    planners = {name: planner(name, target, partners) for name in names}
    rows = ragged([p.ids for p in prompts])
    warning = head and holdout_warning(head.name_or_path, config.prompts, prompts[0].row)
    results, skipped = compare(target, planners, rows, batch_sizes, modes_of(temperatures), config)
    print(show(results, skipped))
    warnings += [warning] if warning else []
    for said in warnings:
        print(f"warning: {said}")
    body = {
        "methods": {
            name: {mode: asdict(result) for mode, result in modes.items()}
            for name, modes in results.items()
        },
        "greedy_only": skipped,
        "bigram_counted_on": counted_on,
        "warnings": warnings,
    }
    write_result(config.out, config, target, body, head)
    return 1 if any(r.unexplained for modes in results.values() for r in modes.values()) else 0


def drafting_methods(text: str) -> list[str]:
    """Names from `parse_methods`. Raises InputError for one whose text says nothing of our loop."""
    from redrafter.drafters.options import parse_name
    from redrafter.evaluation.methods import DRAFTERS, parse_methods

    names = parse_methods(text)
    for name in names:
        if parse_name(name).kind not in DRAFTERS:
            raise InputError(
                f"methods: {name!r} does not draft in our loop, so there is nothing to compare "
                f"with plain decoding; choose from {', '.join(DRAFTERS)}"
            )
    return names


def modes_of(temperatures: Sequence[float]) -> dict[str, float]:
    """{mode: temperature}; the first sampled one has the bare name `seeded`."""
    modes = {"greedy": 0.0}
    for temperature in temperatures:
        if temperature > 0:
            modes[f"seeded_{temperature:g}" if "seeded" in modes else "seeded"] = temperature
    return modes


def compare(
    target: Any,
    planners: dict[str, Any],
    rows: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    modes: dict[str, float],
    config: LosslessConfig,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """{method: {mode: ModeResult}}, and the methods that were compared greedily alone: a ratio
    rule's sampled text has plain's law and is another text."""
    from redrafter.data.answers import generation_config
    from redrafter.drafting import parse_plan
    from redrafter.evaluation.lossless import check_mode, references

    results: dict[str, dict[str, Any]] = {name: {} for name in planners}
    greedy_only = [name for name in planners if parse_plan(name).rule != "seeded"]
    for mode, temperature in modes.items():
        names = [name for name in planners if temperature == 0 or name not in greedy_only]
        if not names:
            continue
        decoding = generation_config(temperature, config.max_new_tokens)
        plain_of = references(target, rows, decoding, config.seed)
        for name in names:
            results[name][mode] = check_mode(
                target, planners[name], rows, decoding, plain_of, batch_sizes, config.seed,
                name=name,
            )  # fmt: skip
    return results, greedy_only


def show(results: dict[str, dict[str, Any]], greedy_only: Sequence[str] = ()) -> str:
    """One line per method and mode, every unexplained difference, then a verdict."""
    from redrafter.evaluation.report import table

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
    bad, ties = (sum(getattr(r, key) for _, _, r in every) for key in ("unexplained", "near_ties"))
    if bad:
        lines.append(f"NOT lossless: {bad} unexplained differences")
    elif ties:
        lines.append(f"lossless up to rounding: {ties} near-ties, nothing unexplained")
    else:
        lines.append("lossless: every token is that of plain decoding")
    return "\n".join(lines)
