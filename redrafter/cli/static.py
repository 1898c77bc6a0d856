"""`eval/static.py`: the fixed width and depth of drafts that pays best on this device, predicted
and, where asked for, measured."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import StaticConfig

_DESCRIPTION = """\
Which fixed width W and depth K of drafts pays best on this device, predicted from recorded
acceptance and measured costs; with --measure beside what the clock says.

  python eval/static.py --target.path MODEL --head HEAD --prompts PROMPTS.jsonl --out static.json

--widths and --depth say which drafts; --costs takes a file of eval/costs.py.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Records, prices, predicts; prints, draws, writes JSON. Returns the exit status."""
    config = parse(
        StaticConfig,
        argv,
        "eval/static.py",
        _DESCRIPTION,
        alone=True,
    )
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.pictures import new_figure, save_figure, title_of
    from redrafter.evaluation.report import write_result
    from redrafter.evaluation.static import show, static_map
    from redrafter.evaluation.static_run import check, kind_of, measure

    widths, kind = check(config), kind_of(config)
    if config.plot is not None:
        new_figure(1, 1)  # without matplotlib: say so now
    target, head = load_both(config, measured=True)
    cells, body = measure(config, widths, target, head)
    print(show(cells, kind, body["comparison"]))
    for said in body["warnings"]:
        print(f"warning: {said}")
    if config.plot is not None:
        paths = save_figure(static_map(cells, title_of(target, kind)), config.plot)
        print(f"\ndrawn: {', '.join(map(str, paths))}")
    write_result(config.out, config, target, body)
    return 0
