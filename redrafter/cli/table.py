"""`eval/table.py`: all methods on several prompt sets and temperatures, a table and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import TableConfig

_DESCRIPTION = """\
One table and its pictures: what eval/speed.py measures, over prompt sets, numbers of samples and
temperatures.

  python eval/table.py --target.path MODEL --head HEAD --sets.mine PROMPTS.jsonl \\
      --sets.other OTHER.jsonl --methods '[stock,plain,lookup,head]' --temperatures '[0.0, 1.0]' \\
      --n_prompts 40 --out runs/table
  python eval/table.py --list      # every name that a method may have, with its options

What OUT holds already is not measured again, so a run that was stopped goes on.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not there yet, one prompt set, number of samples and temperature at a time;
    writes OUT/*.json, OUT/table.md and the pictures. Returns the exit status."""
    config = parse(
        TableConfig,
        argv,
        "eval/table.py",
        _DESCRIPTION,
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation.methods import check_resources, parse_methods
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.prompt_sets import largest, measure_all, settings, write_table
    from redrafter.files import write_config
    from redrafter.hub.profile import profile_after

    sets = settings(config)
    names = parse_methods(",".join(config.methods))
    check_resources(names, largest(sets))
    target, head = load_both(largest(sets), measured=True)
    bodies = measure_all(sets, names, target, head)
    write_config(Path(config.out) / "config.yaml", config)
    write_table(Path(config.out), bodies)
    profile_after(config.out, config.head, head)
    return 0
