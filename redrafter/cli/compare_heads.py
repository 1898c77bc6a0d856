"""`eval/compare_heads.py`: several heads, trained alike, measured together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import CompareConfig, TrainConfig
from redrafter.config.compare import ROW_KEYS
from redrafter.shipped import find

_DESCRIPTION = """\
Which head, or which way of training one, is best for a target: a table of rows that differ in what
they say and in nothing else. Every row learns from the same stores; its learning rate is the one of
three that is best on validation prompts; all seeds of all rows then draft the same prompts,
interleaved, beside plain decoding, a counted bigram (the floor) and a drafter that knows the answer
(the ceiling).

  python eval/compare_heads.py --config configs/ablation/kinds.yaml

compares kinds of heads at equal steps and at equal size; the other files of configs/ablation change
one ingredient of one kind per row. OUT/table.md is the table, OUT/rows.json what stands in it,
OUT/tokens.png the picture.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Trains and measures what is not there yet; writes the table. Returns the exit status."""
    config = parse(CompareConfig, argv, "eval/compare_heads.py", _DESCRIPTION, alone=True)
    trainings = {name: training_of(config, name) for name in config.rows}
    from redrafter.evaluation.methods import check_resources, parse_methods
    from redrafter.evaluation.models import load_both
    from redrafter.files import write_config
    from redrafter.planning.meta import MetaTarget
    from redrafter.studies import measure, report
    from redrafter.studies.train import rows_of, train_rows

    parse_methods(",".join(config.methods))
    check_resources(config.methods, config)
    target, _ = load_both(replace(config, head=None))
    rows = rows_of(config, trainings, MetaTarget(config.target))
    write_config(Path(config.out) / "config.yaml", config)
    runs = train_rows(config, rows)
    heads = measure.load_heads(runs, target)
    bodies = measure.measure_all(config, heads, target)
    found = report.study(rows, runs, heads, target, bodies, config.tree.depth, config.against)
    report.write(Path(config.out), found, bodies, target)
    return 0


def training_of(config: CompareConfig, name: str) -> TrainConfig:
    """The training of a row: `base`, then what the row changes. What makes no sense ends the
    program with the row and the option named."""
    changes = {key: v for key, v in config.rows[name].items() if key not in ROW_KEYS}
    words = [f"--config={base_of(config.base)}"] if config.base else []
    words += [f"--target.path={config.target.path}", f"--output_dir={config.out}"]
    words += [f"--{key}={_word(value)}" for key, value in changes.items()]
    return parse(TrainConfig, words, f"eval/compare_heads.py, row {name}: train/redrafter.py")


def base_of(name: str) -> Path:
    """A file, or one of those that come with the library. Raises InputError where it is neither."""
    given = Path(name)
    return given if given.is_file() else find(name, option="base")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
