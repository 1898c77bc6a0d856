"""`eval/lossless.py`: proves on prompts that drafting changes no token."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import LosslessConfig


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
    from redrafter.evaluation.comparison import measure, show, unexplained
    from redrafter.evaluation.methods import check_resources, drafting_methods
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.prompts import number_list
    from redrafter.evaluation.report import write_result

    batch_sizes = number_list("batch_sizes", config.batch_sizes, int, 1)
    temperatures = number_list("temperatures", config.temperatures, float, 0.0)
    names = drafting_methods(
        config.methods,
        "does not draft in our loop, so there is nothing to compare with plain decoding",
    )
    check_resources(names, config)
    target, head = load_both(config, measured=True)
    results, body = measure(config, names, batch_sizes, temperatures, target, head)
    print(show(results, body["greedy_only"]))
    for said in body["warnings"]:
        print(f"warning: {said}")
    write_result(config.out, config, target, body, head)
    return 1 if unexplained(results) else 0
