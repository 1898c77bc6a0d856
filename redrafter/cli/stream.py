"""`eval/stream.py`: a stream of prompts, whose head may learn and is watched."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.chat import check_drafter
from redrafter.config import StreamConfig
from redrafter.contracts import InputError

_DESCRIPTION = """\
Decode a stream of prompts by a head, and with --learn by one that learns meanwhile, side by side:
tokens per step by window, equal texts, what learning took. The drift alarm watches both.

  redrafter stream --target.path MODEL --head HEAD --prompts PROMPTS.jsonl --learn runs/learned
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Decodes, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        StreamConfig, argv, "eval/stream.py", _DESCRIPTION, names="describe_drafting", alone=True
    )
    from transformers.utils import logging

    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.report import write_result
    from redrafter.learning.stream import Stream, show

    if config.head is None:
        raise InputError("head: give --head, the folder of the head that is watched, and may learn")
    check_drafter(config)
    logging.disable_progress_bar()  # of writing checkpoints
    target, head = load_both(config, measured=True)
    body = Stream(config, target, head).run()
    print(show(body))
    write_result(config.out, config, target, body, head)
    return 0
