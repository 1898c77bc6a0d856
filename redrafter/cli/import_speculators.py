"""`data/import_speculators.py`: hidden states that speculators wrote, as a store."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import ImportSpeculatorsConfig
from redrafter.processes import say

_DESCRIPTION = """\
Hidden states of a folder of speculators 0.9 become a store to train on: tokens, masks, and the last
layer put through the target's final norm. Some rows are compared with the target's own first.

  python data/import_speculators.py --target.path MODEL --folder PREPARED --output_dir runs/states
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ImportSpeculatorsConfig, argv, "data/import_speculators.py", _DESCRIPTION)
    from redrafter.data.build_rows import report
    from redrafter.data.speculators import SpeculatorsFolder, import_states
    from redrafter.evaluation.models import load_both

    source = SpeculatorsFolder(config.folder, config.hidden_states)
    target, _ = load_both(config)
    store = import_states(
        target, source, config.states, config.output_dir, check_rows=config.check_rows
    )
    say(report(store))
    return 0
