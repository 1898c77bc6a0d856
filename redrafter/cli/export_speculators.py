"""`data/export_speculators.py`: a store of states as a speculators folder."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import ExportSpeculatorsConfig

_DESCRIPTION = """\
A store of states becomes a folder of speculators 0.9 with one layer, the last: the stream that
the target's final norm turns into the stored states. For what reads that layer alone.

  python data/export_speculators.py --target.path MODEL --store runs/states --output_dir PREPARED
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        ExportSpeculatorsConfig, argv, "data/export_speculators.py", _DESCRIPTION, alone=True
    )
    from redrafter.data.speculators import export_states
    from redrafter.data.store import Store
    from redrafter.evaluation.models import load_both

    store = Store(config.store, "states")
    target, _ = load_both(config)
    n = export_states(target, store, config.output_dir)
    print(f"{config.output_dir}: {n} rows, their last layer before the target's final norm")
    return 0
