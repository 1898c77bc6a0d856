"""What can end or spoil a training, each provoked: signals, a lost process, a full disk, damaged
checkpoints, a loss that is not finite."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from launching import ranks, training_argv

from redrafter.cli.args import parse
from redrafter.cli.train_redrafter import main
from redrafter.config import AnswersConfig, SourceConfig, StatesConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows
from redrafter.data.states import StateMaker, build_states
from redrafter.targets.load import load_target
from redrafter.training import checkpoint
from redrafter.training.feed import Feed
from redrafter.training.loop import Training

STEPS = 24
SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 24, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 24, "data.buffer_rows": 10, "optim.steps": STEPS,
    "optim.batch_positions": 32, "optim.depth": 3, "optim.warmup_steps": 2, "eval.prompts": 0,
    "save_steps": 8, "keep_checkpoints": 100, "log_steps": 2, "tracker": "null",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def argv(folder, tiny_target):
    return training_argv(folder, tiny_target, SETTINGS)


@pytest.fixture
def run(argv):
    return lambda *args, **changes: Training(parse(TrainConfig, argv(*args, **changes), "test"))


@pytest.fixture(scope="module")
def straight(argv, folder):
    """The run that nothing happened to."""
    Training(parse(TrainConfig, argv("straight"), "test")).train()
    return folder / "straight"


def same(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """The last checkpoints: to the bit, or to a relative tolerance."""
    steps = [checkpoint.all_steps(out / "checkpoints")[-1] for out in (one, two)]
    assert steps[0] == steps[1]
    for name in ("model", "optimizer"):
        a, b = (
            safetensors.torch.load_file(out / f"checkpoints/step-{steps[0]}/{name}.safetensors")
            for out in (one, two)
        )
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key] - b[key]).norm() <= tolerance * b[key].norm(), (name, key)


# ------------------------------------------------------------------ signals, a lost process


def test_sigterm_leaves_a_checkpoint_and_an_exit_status(
    argv, run, straight, folder, monkeypatch, capsys
):
    ours = signal.getsignal(signal.SIGTERM)

    def at_step_5(feed, step, inner=Feed.step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(feed, step)

    monkeypatch.setattr(Feed, "step", at_step_5)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(argv("term")))
    assert stop.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is ours
    told = capsys.readouterr().out
    assert str(folder / "term/checkpoints/step-6") in told and "--resume auto" in told
    assert checkpoint.all_steps(folder / "term/checkpoints") == [6]
    assert not (folder / "term/model.safetensors").exists()
    monkeypatch.undo()
    run("term", resume="auto").train()
    same(folder / "term", straight)


def wait_for(processes, folder: Path, above: int = -1) -> int:
    """The first checkpoint above a step, as soon as it is there."""
    deadline = time.monotonic() + 200
    while True:
        steps = [s for s in checkpoint.all_steps(folder) if s > above]
        if steps:
            return steps[-1]
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert all(p.poll() is None for p in processes), "it ended by itself"
        time.sleep(0.005)


def test_of_two_processes_one_is_told_to_stop_and_then_one_is_killed(argv, run, folder):
    steps = {"optim.steps": 160, "save_steps": 16}
    run("long", **steps).train()
    given = argv("pair", **steps, resume="auto")
    checkpoints = folder / "pair/checkpoints"
    both = ranks(2, "train/redrafter.py", given, folder / "stopped")
    first = wait_for(both, checkpoints)
    both[1].send_signal(signal.SIGTERM)
    assert [p.wait(60) for p in both] == [75, 75], "they disagree"
    stopped = checkpoint.all_steps(checkpoints)[-1]
    assert first <= stopped < 160
    state = json.loads((checkpoints / f"step-{stopped}/state.json").read_text())
    assert state["processes"] == 2
    assert f"step-{stopped} is written" in (folder / "stopped/rank-0.txt").read_text()

    both = ranks(2, "train/redrafter.py", given, folder / "killed")
    wait_for(both, checkpoints, above=stopped)
    both[1].kill()
    try:
        assert both[0].wait(60) == 2
    finally:
        both[0].kill()
    left = checkpoint.all_steps(checkpoints)[-1]
    assert stopped < left < 160
    told = (folder / "killed/rank-0.txt").read_text()
    assert "another of the 2 processes is gone" in told and f"goes on from step {left}" in told
    run("pair", **steps, resume="auto").train()
    same(folder / "pair", folder / "long", 1e-3)


# ------------------------------------------------------------------ the disk


def test_a_full_disk_leaves_the_checkpoint_before(run, straight, folder, monkeypatch):
    written = []

    def full(tensors, path, inner=checkpoint.save_file):
        written.append(path)
        if len(written) > 3:  # two files a checkpoint: in the middle of the second one
            Path(path).write_bytes(b"part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match="the disk is full"):
        run("full").train()
    assert [p.name for p in (folder / "full/checkpoints").iterdir()] == ["step-8"]
    assert checkpoint.fault(folder / "full/checkpoints/step-8") is None
    monkeypatch.undo()
    run("full", resume="auto").train()
    same(folder / "full", straight)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_cut_short_is_named_and_the_one_before_taken(
    run, straight, folder, capsys, name
):
    out = f"cut-{name}"
    shutil.copytree(straight / "checkpoints", folder / out / "checkpoints")
    file = folder / out / f"checkpoints/step-{STEPS}" / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(InputError, match=name):  # given by its path it is not replaced
        run(out, resume=file.parent)
    capsys.readouterr()
    resumed = run(out, resume="auto")
    assert resumed.done == 16
    told = capsys.readouterr().out
    assert str(file) in told and "going on from step-16" in told
    assert (folder / out / f"checkpoints/damaged-step-{STEPS}" / name).exists()
    resumed.train()
    same(folder / out, straight)


def test_where_no_checkpoint_is_whole_it_says_so(run, folder):
    run("none", **{"optim.steps": 2}).train()
    (folder / "none/checkpoints/step-2/rng.safetensors").unlink()
    with pytest.raises(InputError, match=r"step-2/rng\.safetensors .*no whole checkpoint"):
        run("none", resume="auto", **{"optim.steps": 2})


def test_a_lost_best_checkpoint_is_named(run, folder, capsys):
    options = {"eval.prompts": 4, "eval.max_new_tokens": 8, "eval.every_steps": 4,
               "eval.temperatures": "[0]", "loss.cross_entropy": 1}  # fmt: skip
    run("best", **options).train()
    steps = folder / "best/checkpoints"
    state = json.loads((steps / "step-16/state.json").read_text())
    file = steps / f"step-{state['best']['step']}/model.safetensors"
    if state["best"]["step"] == 16:
        pytest.fail("the best one is the newest: this tests nothing")
    file.write_bytes(file.read_bytes()[:-1])
    resumed = run("best", resume=steps / "step-16", **options)
    told = capsys.readouterr().out
    assert str(file) in told and "the best head so far is lost" in told
    assert resumed.train()["step"] > 16


# ------------------------------------------------------------------ numbers that are not finite


@pytest.fixture(scope="module")
def spoiled(tiny_target, folder):
    """A store of states of which those of some rows (or of all) are finite, and the loss is not
    (rows with others are left out: test_finite.py)."""
    target = load_target(str(tiny_target))
    source = SourceConfig(str(tiny_target / "prompts_train.jsonl"), format="text", n_rows=24)
    where = dict(folder=folder / "spoiled", named=True, progress=False)
    prompts = build_rows(source, target.tokenizer, "prompts", **where)
    answers = build_answers(target, prompts, AnswersConfig(max_new_tokens=24), **where)

    def make(rows):
        def columns(maker, given, bar=None, inner=StateMaker.columns):
            made = inner(maker, given, bar)
            for i, row in enumerate(rows):
                made["states"][given.offsets[row + 1] - 3] = (-1) ** i * 3e38
            return made

        patch = pytest.MonkeyPatch()
        patch.setattr(StateMaker, "columns", columns)
        try:
            store = folder / f"states-{len(rows)}"
            build_states(target, answers, StatesConfig(), store, progress=False)
            return store
        finally:
            patch.undo()

    return make


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(run, spoiled, folder):
    store = spoiled([3, 9])
    more = {"data.stores": f"[{store}]", "save_steps": 1, "log_steps": 4}
    out = "not-finite"
    trained = run(out, **more)
    batches = [trained.feed.step(step) for step in range(STEPS)]
    read = [(batch.context, batch.teacher[batch.mask]) for batch in batches]
    bad = [step for step, states in enumerate(read) if max(s.abs().max() for s in states) > 1e38]
    assert 0 < len(bad) < STEPS / 2, "this tests nothing"
    trained.train()
    assert trained.engine.skips.tolist()[0] == len(bad)
    facts = json.loads((folder / out / "provenance.json").read_text())
    assert facts["skipped_steps"] == len(bad)

    def files(step):
        return [
            safetensors.torch.load_file(folder / out / f"checkpoints/step-{step}/{n}.safetensors")
            for n in ("model", "optimizer")
        ]

    for step in range(1, STEPS):
        for before, after in zip(files(step), files(step + 1), strict=True):
            assert all(t.isfinite().all() for t in after.values())
            equal = all(torch.equal(before[key], after[key]) for key in before)
            assert equal == (step in bad), step
    again = run(out, **more, resume=folder / out / f"checkpoints/step-{bad[-1] + 1}")
    again.train()
    assert again.skipped == len(bad) and int(again.engine.skips[0]) == 0


def test_too_many_of_them_end_the_run(run, spoiled, folder):
    store = spoiled(list(range(24)))
    more = {"data.stores": f"[{store}]", "optim.batch_positions": 128, "loss.cross_entropy": 1}
    with pytest.raises(InputError, match="not finite in 3 optimiser steps in a row before step 4"):
        run("bad", **more, **{"optim.max_bad_steps": 3}).train()
    assert run("fewer", **more, **{"optim.max_bad_steps": 100}).train() == {"step": STEPS}


def test_one_process_of_two_meets_them_and_both_skip(argv, run, spoiled, folder):
    store = spoiled([3])
    more = {"data.stores": f"[{store}]"}
    both = ranks(2, "train/redrafter.py", argv("two-spoiled", **more), folder / "two-spoiled-logs")
    assert [p.wait(120) for p in both] == [0, 0]
    facts = json.loads((folder / "two-spoiled/provenance.json").read_text())
    alone = run("one-spoiled", **more)
    alone.train()
    assert facts["skipped_steps"] == int(alone.engine.skips[0]) > 0
    same(folder / "two-spoiled", folder / "one-spoiled", 1e-3)
