"""`eval/lossless.py`: proves on prompts that drafting changes no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both
from redrafter.config import LosslessConfig


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints a table, writes JSON. Returns 1 if a difference stays unexplained."""
    config = parse(
        LosslessConfig,
        argv,
        "eval/lossless.py",
        "Speculative against plain decoding, token by token; every difference must be a near-tie.",
    )
    from redrafter.data.answers import generation_config
    from redrafter.drafters.recurrent import RecurrentDrafter
    from redrafter.evaluation.lossless import check_mode, ragged
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning, number_list
    from redrafter.evaluation.report import write_result

    batch_sizes = number_list("batch_sizes", config.batch_sizes, int, 1)
    temperatures = number_list("temperatures", config.temperatures, float, 0.0)
    target, head = load_both(config)
    prompts, _ = evaluation_prompts(target, config)
    rows = ragged([p.ids for p in prompts])
    warning = holdout_warning(config.head, config.prompts, prompts[0].row)
    drafter = RecurrentDrafter(head, target, config.tree)
    modes = {"greedy": 0.0}
    for temperature in temperatures:
        if temperature > 0:
            # The first one has the bare name.
            modes[f"seeded_{temperature:g}" if "seeded" in modes else "seeded"] = temperature
    results = {
        mode: check_mode(
            target,
            drafter,
            rows,
            generation_config(temperature, config.max_new_tokens),
            batch_sizes,
            config.seed,
        )
        for mode, temperature in modes.items()
    }
    print(show(results))
    if warning:
        print(f"warning: {warning}")
    body = {mode: asdict(result) for mode, result in results.items()}
    write_result(config.out, config, target, {**body, "warnings": [warning] if warning else []})
    return 1 if any(result.unexplained for result in results.values()) else 0


def show(results: dict) -> str:
    """One line per mode, then a verdict, then every unexplained difference."""
    from redrafter.evaluation.report import table

    columns = ["mode", "T", "prompts", "rows equal", "tokens", "near-ties", "unexplained",
               "max diff", "rounding"]  # fmt: skip
    rows = [
        [mode, r.temperature, r.prompts, f"{r.rows_equal}/{r.rows_compared}", r.compared_tokens,
         r.near_ties, r.unexplained, f"{r.largest_difference:.1e}", f"{r.rounding:.1e}"]
        for mode, r in results.items()
    ]  # fmt: skip
    lines = [table(columns, rows)]
    for mode, r in results.items():
        for case in r.cases:
            if not case.explained:
                lines.append(
                    f"UNEXPLAINED {mode}: prompt {case.prompt}, batch {case.batch_size}, new token "
                    f"{case.position}: {case.token} instead of {case.reference_token}, "
                    f"gap {case.gap}, difference {case.difference}"
                )
        if r.far_logits:
            lines.append(
                f"warning: {mode}: the scores of {r.far_logits} positions differ by more than "
                "rounding explains, though no token did"
            )
    bad, ties = (
        sum(getattr(r, key) for r in results.values()) for key in ("unexplained", "near_ties")
    )
    if bad:
        lines.append(f"NOT lossless: {bad} unexplained differences")
    elif ties:
        lines.append(f"lossless up to rounding: {ties} near-ties, nothing unexplained")
    else:
        lines.append("lossless: every token is that of plain decoding")
    return "\n".join(lines)
