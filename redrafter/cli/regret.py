"""`eval/regret.py`: selectors beside their arms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import RegretConfig

_DESCRIPTION = """\
What choosing a drafter while decoding loses, or gains, against the best one in hindsight, on a
stream of prompts that changes its subject.

  python eval/regret.py --target.path MODEL --head HEAD --stream '[A.jsonl, B.jsonl]' \\
      --arms '[head:4x4, suffix:16x1]' --out regret.json
  python eval/regret.py --list     # every drafter that may be an arm
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Decodes the stream with every arm and selector, interleaved; prints, writes JSON and
    pictures. Returns the exit status."""
    config = parse(
        RegretConfig,
        argv,
        "eval/regret.py",
        _DESCRIPTION,
        names="describe_drafting",
        alone=True,
    )
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.pictures import save_pictures
    from redrafter.evaluation.regret import measure, methods_of, regret_chart, show
    from redrafter.evaluation.report import write_result

    arms, selectors = methods_of(config)
    target, head = load_both(config, measured=True)
    body = measure(config, arms, selectors, target, head)
    print(show(body))
    if config.out is not None:
        write_result(config.out, config, target, body)
        save_pictures({Path(config.out).with_suffix(""): partial(regret_chart, body)})
    return 0
