"""`redrafter report`: all that is known of a head, on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.verify import target_of, with_head
from redrafter.config import ReportConfig

_DESCRIPTION = """\
redrafter report RUN [--prompts PROMPTS.jsonl [--target.path MODEL]] [--out report.html]

One page that stands alone and reaches no network: speed with intervals, acceptance by depth, costs
and what they allow, exactness and the curves of the training, from the files that lie in the head's
folder; with prompts, their answers too, every token coloured by how it came. What was not measured
is not there: the command that measures it stands in its place.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Reads, decodes where prompts are given, writes the page. Returns the exit status."""
    words = with_head(sys.argv[1:] if argv is None else list(argv))
    config = parse(ReportConfig, words, "redrafter report", _DESCRIPTION, alone=True)
    from redrafter.evaluation.models import load_both
    from redrafter.fetch import fetch
    from redrafter.files import write_text
    from redrafter.report.build import build, check, place

    folder = Path(fetch(config.head, "head"))
    run, target, head = check(config, folder), None, None
    if config.prompts is not None:
        target, head = load_both(replace(config, target=target_of(config.target, folder, None)))
    write_text(place(config), build(config, run, target, head))
    print(f"{place(config)}: written; open it in a browser")
    return 0
