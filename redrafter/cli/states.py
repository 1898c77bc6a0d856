"""`data/states.py`: store the target's hidden states of rows."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import MakeStatesConfig
from redrafter.contracts import InputError
from redrafter.processes import say

_DESCRIPTION = """\
Third stage of the data: the target's last hidden state at every position, for train/redrafter.py.

  python data/states.py --target.path MODEL --rows runs/answers --output_dir runs/states
  accelerate launch train/redrafter.py --data.stores '["runs/states"]' ...

The same by several processes, each with its own shards:
  accelerate launch --multi_gpu --num_processes 8 data/states.py ...

Says how large and how long before it writes, and goes on where it stopped after an interruption.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        MakeStatesConfig, argv, "data/states.py", _DESCRIPTION, plan="data_jobs:plan_states"
    )
    from redrafter.data.build_rows import report
    from redrafter.data.states import build_states
    from redrafter.data.store import Store
    from redrafter.evaluation.models import load_both

    rows = Store(config.rows)
    if rows.identity["kind"] not in ("answers", "texts"):
        raise InputError(
            f"{config.rows} holds {rows.identity['kind']}: give answers (data/answers.py) or texts "
            "(data/prepare.py --keep texts)"
        )
    target, _ = load_both(config)
    target.show(config.states.aux_layers or ())
    store = build_states(
        target, rows, config.states, config.output_dir, continuation=config.continuation
    )
    say(report(store))
    return 0
