"""`eval/lossless.py`: proves on prompts that drafting changes no token."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import LosslessConfig

_DESCRIPTION = """\
Is every token the same with drafting and without? Every row is decoded both ways, greedily and
sampled with a seed; where rounding lets a token differ, it must be a near-tie, and is counted.

  python eval/lossless.py --target.path MODEL --head HEAD --prompts PROMPTS.jsonl --n_prompts 200 \\
      --out HEAD/lossless.json
  python eval/lossless.py --list   # every drafter that --methods takes

--temperatures, --batch_sizes and --max_new_tokens say what is decoded. Exit status 1: a difference
that rounding does not explain, which is a fault of ours.

A run that was stopped goes on when the same command is given again: what was compared is kept in
OUT's journal (.journal.jsonl), until OUT is written.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints a table, writes JSON. Returns 1 if a difference stays unexplained."""
    config = parse(
        LosslessConfig,
        argv,
        "eval/lossless.py",
        _DESCRIPTION,
        names="describe_drafting",
        alone=True,
    )
    from redrafter.evaluation.comparison import journal_path, measure, show, unexplained
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
    if config.out is not None:
        journal_path(config.out).unlink()
    return 1 if unexplained(results) else 0
