"""`eval/speed.py`: compares ways of decoding on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import SpeedConfig


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        SpeedConfig,
        argv,
        "eval/speed.py",
        "Tokens per step and speed of drafting, beside stock and plain decoding.",
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation.methods import check_resources, parse_methods
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.prompt_sets import check, measure, show
    from redrafter.evaluation.report import write_result
    from redrafter.hub.profile import profile_after

    check(config)
    names = parse_methods(config.methods)
    check_resources(names, config)
    target, head = load_both(config, measured=True)
    body = measure(config, names, target, head)
    print(show(body))
    write_result(config.out, config, target, body, head)
    profile_after(config.out, config.head, head)
    return 0
