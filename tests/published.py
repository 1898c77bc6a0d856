"""A small run as people publish it, for the tests of publishing and of the card."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from redrafter.cli.lossless import main as lossless
from redrafter.cli.speed import main as speed
from redrafter.cli.train_redrafter import main as train
from redrafter.config import PushConfig
from redrafter.hub.push import Release, prepare

SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 24, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 24, "data.buffer_rows": 10, "optim.steps": 8,
    "optim.batch_positions": 32, "optim.depth": 3, "optim.warmup_steps": 2, "eval.prompts": 4,
    "eval.max_new_tokens": 12, "eval.every_steps": 4, "eval.tree.width": 2, "eval.tree.depth": 2,
    "save_steps": 4, "log_steps": 2, "tracker": "null", "loss.cross_entropy": 1,
}  # fmt: skip


def make_run(target: Path, out: Path) -> None:
    """Trained for a few steps and measured on a few prompts."""
    given = {
        "target.path": target, "data.source.path": target / "prompts_train.jsonl",
        "output_dir": out, **SETTINGS,
    }  # fmt: skip
    train([f"--{key}={value}" for key, value in given.items()])
    shared = [
        f"--target.path={target}", f"--head={out}", "--n_prompts=3", "--max_new_tokens=16",
        f"--prompts={target / 'prompts_heldout.jsonl'}",
    ]  # fmt: skip
    assert lossless([*shared, f"--out={out / 'lossless.json'}", "--batch_sizes=2"]) == 0
    speed([*shared, f"--out={out / 'speed.json'}", "--cost_rounds=1", "--methods=stock,plain,head"])
    (out / "notes.txt").write_text("mine alone")
    (out / "disco").mkdir()
    (out / "disco" / "config.json").write_text("{}")


def released(run: Path, draw: bool = False, **changes) -> tuple[Release, PushConfig]:
    """What would be published of it, made without a network. draw: the pictures too, which takes
    seconds"""
    config = PushConfig(head=str(run), repo="me/tiny", **changes)
    undrawn = patch("redrafter.hub.push.pictures_or_none", lambda run: {})
    with nullcontext() if draw else undrawn:
        return prepare(replace(config, dry_run=True)), config
