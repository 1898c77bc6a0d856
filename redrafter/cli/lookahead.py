"""`eval/lookahead.py`: lookaheads beside every static length, and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import LookaheadEvalConfig

_DESCRIPTION = """\
When to stop drafting: lookaheads beside every static length and the oracle.

  python eval/lookahead.py --config configs/eval/lookahead.yaml --target.path MODEL --head HEAD
  python eval/lookahead.py --list      # every drafter and lookahead

The file says which drafters, prompt sets and temperatures, and names what earlier commands made.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not there yet, one case at a time; writes OUT/*.json, OUT/table.md and the
    pictures. Returns the exit status."""
    config = parse(
        LookaheadEvalConfig,
        argv,
        "eval/lookahead.py",
        _DESCRIPTION,
        names="describe_drafting",
        alone=True,
    )
    from redrafter.evaluation.lookaheads.cases import cases_of, check, costs_file, names_of
    from redrafter.evaluation.lookaheads.experiment import load, measure_all
    from redrafter.evaluation.lookaheads.report import write_report
    from redrafter.evaluation.methods import check_resources
    from redrafter.evaluation.models import load_both
    from redrafter.files import write_config

    cases = cases_of(config)
    names = list(dict.fromkeys(name for case in cases for name in names_of(case)))
    check(names, config)
    prices = {case.title: costs_file(case, config) for case in cases}
    check_resources(names, cases[0].speed)
    loaded = load(config, names, cases[0].speed, prices.values(), *load_both(config))
    bodies = measure_all(cases, prices, loaded)
    write_config(Path(config.out) / "config.yaml", config)
    write_report(Path(config.out), cases, bodies)
    return 0
