"""`eval/acceptance.py`: what is accepted, beside what could be."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import AcceptanceConfig

_DESCRIPTION = """\
What is accepted of drafts, rule by rule, beside 1 - TV and the best that any rule could do. Trees
of independent draws (multi:...:how=iid) have both oracles.

  python eval/acceptance.py --target.path MODEL --head HEAD --prompts PROMPTS.jsonl \\
      --methods head:1x4,head:1x4:rule=ratio --out HEAD/acceptance.json
  python eval/acceptance.py --list     # every drafter and rule
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Decodes with every method, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        AcceptanceConfig,
        argv,
        "eval/acceptance.py",
        _DESCRIPTION,
        names="describe_drafting",
        alone=True,
    )
    from redrafter.evaluation.acceptance import measure, show
    from redrafter.evaluation.methods import check_resources, drafting_methods
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.report import write_result

    names = drafting_methods(config.methods, "drafts nothing of ours")
    check_resources(names, config)
    target, head = load_both(config, measured=True)
    body = measure(config, names, target, head)
    print(show(body, config))
    write_result(config.out, config, target, body)
    return 0
