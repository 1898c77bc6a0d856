"""`eval/costs.py`: the cost table of a target, and of a draft head where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import CostsConfig

_DESCRIPTION = """\
Seconds that the target needs for n new tokens on this device, and a drafter for its levels.

  python eval/costs.py --target.path MODEL --head HEAD --out HEAD/costs.json
  python eval/costs.py --target.path MODEL --slowdown 1,5,10x2,4,8 --out runs/costs.json
      also which k rows of w guesses are worth verifying here

--new_tokens, --contexts and --batch_sizes say for what; --profile keeps what was measured with the
head, for drafters that price their guesses (head:8x6:budget=true).
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        CostsConfig,
        argv,
        "eval/costs.py",
        _DESCRIPTION,
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
