"""`eval/costs.py`: the cost table of a target, and of a draft head where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import CostsConfig


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        CostsConfig,
        argv,
        "eval/costs.py",
        "Seconds that the target needs for n new tokens, and a drafter for its levels; with "
        "--slowdown also which rows of guesses are worth verifying on this device.",
        alone=True,
    )
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.profiles import (
        check_drafters,
        check_numbers,
        keep_profiles,
        measure,
        show,
    )
    from redrafter.evaluation.report import write_result
    from redrafter.evaluation.slowdown_run import check_slowdown, measure_slowdown

    where = check_numbers(config)
    slowdown = check_slowdown(config)
    names = check_drafters(config)
    target, head = load_both(config, measured=True)
    costs = measure(config, where, names, target, head)
    print(show(costs))
    body = asdict(costs)
    if slowdown is not None:
        body |= measure_slowdown(config, target, *slowdown, where["contexts"])
    write_result(config.out, config, target, body)
    if config.profile:
        keep_profiles(config, names, target, body)
    return 0
