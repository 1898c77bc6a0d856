"""`eval/regret.py`: selectors beside their arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import RegretConfig


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Decodes the stream with every arm and selector, interleaved; prints, writes JSON and
    pictures. Returns the exit status."""
    config = parse(
        RegretConfig,
        argv,
        "eval/regret.py",
        "What a selector of drafters loses, or gains, against the best arm in hindsight.",
        names="describe_drafting",
        alone=True,
    )
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.pictures import new_figure, save_figure
    from redrafter.evaluation.regret import measure, methods_of, regret_chart, show
    from redrafter.evaluation.report import write_result

    new_figure(1, 1)  # without matplotlib: say so now
    arms, selectors = methods_of(config)
    target, head = load_both(config, measured=True)
    body = measure(config, arms, selectors, target, head)
    print(show(body))
    if config.out is not None:
        write_result(config.out, config, target, body)
        save_figure(regret_chart(body), Path(config.out).with_suffix(""))
    return 0
