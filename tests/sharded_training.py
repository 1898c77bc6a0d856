"""What every process of tests/test_sharded_target.py runs: a training, and a note of what this
process held of the target and how many forwards it made. argv: the folder for notes, then the
training's arguments."""

import json
import sys
from pathlib import Path

from redrafter.cli.args import parse
from redrafter.config import TrainConfig
from redrafter.targets.sharding import ShardedBackbone
from redrafter.training.loop import Training

made = {True: 0, False: 0}  # forwards of its own; to keep step with others
say = ShardedBackbone._say


def counted(self: ShardedBackbone, works: bool) -> bool:
    anyone = say(self, works)
    made[works] += anyone
    return anyone


ShardedBackbone._say = counted
run = Training(parse(TrainConfig, sys.argv[2:], "test"))
run.train()
backbone = run.target.backbone
split = [p for p in backbone.module.parameters() if hasattr(p, "ds_shape")]
held, whole = backbone.bytes_held()
note = {
    "own": made[True], "idle": made[False], "held": held, "whole": whole,
    "matrices_in_memory": sum(p.numel() for p in split if len(p.ds_shape) > 1),
}  # fmt: skip
Path(sys.argv[1], f"{run.rank}.json").write_text(json.dumps(note))
