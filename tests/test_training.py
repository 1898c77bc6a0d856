"""The trainer: the loss, equal trajectories, exact resume after a kill, and what is refused."""

import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from accelerate import PartialState
from launching import ROOT, Copy, quiet

from redrafter.cli.args import parse
from redrafter.cli.train_redrafter import main
from redrafter.config import (
    LOSSES,
    AnswersConfig,
    LossConfig,
    SourceConfig,
    StatesConfig,
    TrainConfig,
)
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows
from redrafter.data.reading import Stored
from redrafter.data.states import build_states
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target
from redrafter.training import checkpoint
from redrafter.training.feed import Batch, Feed, frequent_ids
from redrafter.training.loop import Training, learning_rate
from redrafter.training.step import batch_loss, depth_accuracy, total_weight

SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 24, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 24, "data.answers.temperatures": "[0, 1]",
    "data.buffer_rows": 10, "optim.steps": 12, "optim.batch_positions": 32, "optim.depth": 3,
    "optim.warmup_steps": 2, "eval.prompts": 4, "eval.max_new_tokens": 12, "eval.every_steps": 4,
    "eval.tree.width": 2, "eval.tree.depth": 2, "save_steps": 4, "log_steps": 2, "tracker": "null",
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(str(tiny_target))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Shared, so that answers and states are made once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def argv(tiny_target, data_folder, tmp_path):
    """argv(name, **changes) -> arguments of a short run into tmp_path/name."""

    def make(out="run", **changes):
        given = {
            "target.path": tiny_target, "data.source.path": tiny_target / "prompts_train.jsonl",
            "output_dir": tmp_path / out, "data.folder": data_folder, **SETTINGS, **changes,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in given.items()]

    return make


@pytest.fixture
def config(argv):
    return lambda *args, **changes: parse(TrainConfig, argv(*args, **changes), "test")


@pytest.fixture(scope="module")
def part(target, tiny_target, data_folder):
    """States of 18 answers to 6 prompts."""
    source = SourceConfig(str(tiny_target / "prompts_train.jsonl"), format="text", n_rows=6)
    where = dict(folder=data_folder, named=True, progress=False)
    prompts = build_rows(source, target.tokenizer, "prompts", **where)
    how = AnswersConfig(samples_per_prompt=2, max_new_tokens=20)
    answers = build_answers(target, prompts, how, **where)
    return Stored(build_states(target, answers, StatesConfig(), **where))


# ------------------------------------------------------------------ the loss


def feed_of(target, part, depth=3, positions=8, **options):
    return Feed(target, [part], positions=positions, depth=depth, seed=0, **options)


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
def test_the_loss_is_the_mean_written_out(target, part, draft_vocab_size):
    ids = None if draft_vocab_size is None else frequent_ids([part], 40, target.vocab_size)
    torch.manual_seed(0)
    head = RecurrentHead.for_target(target, draft_ids=ids)
    loss = LossConfig(cross_entropy=0.7, kl=0.3, depth_decay=0.8, chunk_rows=7)
    batch = feed_of(target, part, positions=20, draft_ids=ids,
                    teacher="states").step(0)  # fmt: skip
    value, counts = batch_loss(head, head, target, batch, loss, total_weight(batch, loss))
    total = weight = 0.0
    hits = [0, 0, 0]
    for p in range(20):
        state = None
        for k in range(3):
            state = head.step(target.embed(batch.tokens[p, k]), state)
            if not batch.mask[p, k]:
                continue
            log_q = head.logits(batch.context[p], state).double().log_softmax(-1)
            log_p = target.project(batch.teacher[p, k]).double().log_softmax(-1)
            log_p = log_p if ids is None else log_p[ids]
            label = batch.labels[p, k]
            each = -0.7 * log_q[label] + 0.3 * (log_p.exp() * (log_p - log_q)).sum()
            total, weight = total + 0.8**k * each, weight + 0.8**k
            hits[k] += int(log_q.argmax() == label)
    assert value.item() == pytest.approx((total / weight).item(), abs=1e-5)
    assert counts[0].tolist() == batch.mask.sum(0).tolist()
    assert counts[1].tolist() == hits
    if ids is not None:
        assert batch.mask.sum() < feed_of(target, part, positions=20).step(0).mask.sum(), (
            "nothing was pruned: this tested nothing"
        )


def test_padding_and_the_split_do_not_matter(target, part):
    """Gradients of 8 micro-batches are those of one, though their counts differ."""
    loss = LossConfig(cross_entropy=1.0)
    batch = feed_of(target, part, positions=64).step(0)
    parts = batch.split(8)
    assert len({int(part.mask.sum()) for part in parts}) > 1, "equal counts would test nothing"
    grads = []
    for pieces in ([batch], parts):
        torch.manual_seed(0)
        head = RecurrentHead.for_target(target)
        for piece in pieces:
            batch_loss(head, head, target, piece, loss, total_weight(batch, loss))[0].backward()
        grads.append([p.grad for p in head.parameters()])
    for one, many in zip(*grads, strict=True):
        torch.testing.assert_close(one, many, atol=1e-7, rtol=1e-4)


def test_accuracy_by_depth_counts_hits(target, part):
    feed = feed_of(target, part)
    torch.manual_seed(0)
    head = RecurrentHead.for_target(target)
    batches = feed.batches(50)
    found = depth_accuracy(head, target, batches, 33)
    for k in range(3):
        top_1 = top_5 = n = 0
        for b in batches:
            state = None
            for j in range(k + 1):
                state = head.step(target.embed(b.tokens[:, j]), state)
            best = head.logits(b.context, state).topk(5).indices[b.mask[:, k]]
            label = b.labels[:, k][b.mask[:, k]]
            n += len(label)
            top_1 += int((best[:, 0] == label).sum())
            top_5 += int((best == label[:, None]).any(1).sum())
        assert found["top_1"][k] == pytest.approx(top_1 / n)
        assert found["top_5"][k] == pytest.approx(top_5 / n)


# ------------------------------------------------------------------ trajectories


def weights_of(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def run(config):
    torch.manual_seed(123)  # what ran before must not matter
    trained = Training(config)
    result = trained.train()
    return trained, result


def test_accumulation_is_the_batch(config):
    """1 x 8 and 8 x 1 micro-batches: the same trajectory."""
    heads = []
    for positions, accumulation in ((64, 1), (8, 8)):
        options = {"optim.batch_positions": positions, "optim.accumulation": accumulation,
                   "eval.prompts": 0, "optim.weight_decay": 0.1}  # fmt: skip
        run(config(f"a{accumulation}", **options))
        heads.append(weights_of(config(f"a{accumulation}", **options).output_dir))
    for name, one in heads[0].items():
        torch.testing.assert_close(one, heads[1][name], atol=1e-5, rtol=0)


def test_killed_and_resumed_is_bit_for_bit_the_same(argv, tmp_path):
    """Two runs of 2N steps; one is killed with SIGKILL after N and goes on from its checkpoint."""
    steps = 40  # enough that the run cannot end between its first checkpoint and the kill
    longer = {"optim.steps": steps, "keep_checkpoints": 100}
    straight, _ = run(parse(TrainConfig, argv("straight", **longer), "test"))
    log = tmp_path / "said.txt"
    process = Copy("train/redrafter.py", argv("killed", **longer), quiet(), log)
    process.start()
    folder = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not checkpoint.all_steps(folder) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.002)
    process.kill()
    process.wait(20)
    stopped_at = checkpoint.all_steps(folder)[-1]
    assert stopped_at < steps, "the run ended before it was killed: this tested nothing"
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    with pytest.raises(InputError, match="--resume auto"):
        Training(parse(TrainConfig, argv("killed", **longer), "test"))
    again = parse(TrainConfig, argv("killed", resume="auto", **longer), "test")
    at_hand = Training(again)  # before it trains on: later evaluations could hide what was lost
    assert at_hand.done == stopped_at and at_hand.best is not None
    assert at_hand.best in at_hand.history
    assert at_hand.history == [f for f in straight.history if f["step"] <= stopped_at]
    resumed, _ = run(again)
    assert checkpoint.all_steps(folder) == checkpoint.all_steps(straight.out / "checkpoints")
    last = f"checkpoints/step-{steps}"
    for name in ("model", "optimizer", "rng"):
        one, two = (safetensors.torch.load_file(r.out / last / f"{name}.safetensors")
                    for r in (straight, resumed))  # fmt: skip
        assert one.keys() == two.keys() and len(one) > 0
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert straight.history == resumed.history and straight.best == resumed.best
    assert weights_of(straight.out).keys() == weights_of(resumed.out).keys()
    assert all(torch.equal(t, weights_of(resumed.out)[n])
               for n, t in weights_of(straight.out).items())  # fmt: skip


def test_resume_refuses_what_would_not_be_the_same_run(config, tmp_path):
    run(config("r", **{"optim.steps": 4, "eval.prompts": 0}))
    for changes, named in (
        ({"optim.lr": 1e-3}, "optim.lr"),
        ({"optim.steps": 8}, "optim.steps"),
        ({"data.source.n_rows": 20}, "data digest"),
        ({"data.labels": "greedy"}, "data.labels"),
    ):
        options = {"optim.steps": 4, "eval.prompts": 0, "resume": "auto", **changes}
        with pytest.raises(InputError, match=re.escape(named)):
            Training(config("r", **options))
    same = {"optim.steps": 4, "eval.prompts": 0, "log_steps": 1, "resume": "auto"}
    assert Training(config("r", **same)).done == 4
    state = tmp_path / "r" / "checkpoints" / "step-4" / "state.json"
    before = json.loads(state.read_text())
    for section, field in (("head", "kind"), ("head", "state_norm")):  # as before there were any
        del before["config"][section][field]
    state.write_text(json.dumps(before))
    assert Training(config("r", **same)).done == 4
    kl_alone = dict.fromkeys(LOSSES, 0.0) | {"kl": 1.0}
    assert before["config"]["loss"].items() >= kl_alone.items(), "what it was trained by"
    resolved = yaml.safe_load((tmp_path / "r/config.yaml").read_text())
    assert resolved["loss"].items() >= kl_alone.items()
    before["config"]["loss"] |= {"cross_entropy": 1.0, "kl": 0.0}  # the default once
    state.write_text(json.dumps(before))
    with pytest.raises(InputError, match=r"loss\.cross_entropy 1\.0 -> 0\.0") as refused:
        Training(config("r", **same))
    back = re.search(r"Set them back \((.*)\)", str(refused.value))[1].replace("--", "")
    by_tokens = dict(word.split("=") for word in back.split())
    assert Training(config("r", **same, **by_tokens)).done == 4
    with pytest.raises(InputError, match="not a checkpoint"):
        Training(config("r2", resume=tmp_path))
    file = tmp_path / "r" / "checkpoints" / "step-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=re.escape(str(file))):
        Training(config("r", **same, **by_tokens))


# ------------------------------------------------------------------ what a run leaves behind


def test_what_a_run_leaves_and_that_it_learned(argv, target, capsys):
    arguments = argv("out", **{"optim.steps": 60, "eval.every_steps": 20, "save_steps": 10,
                               "keep_checkpoints": 2, "tracker": "tensorboard"})  # fmt: skip
    assert main(arguments) == 0
    config = parse(TrainConfig, arguments, "test")
    out = Path(config.output_dir)
    shown = capsys.readouterr().out
    assert str(out) in shown
    # Why there are more answers than prompts, and what was left out.
    assert re.search(r"rows of prompts, .*\n  \d+ given = \d+ written \+ \d+ skipped", shown)
    assert re.search(r"rows of answers, .*\n.*\n  each prompt answered at temperature", shown)
    facts = json.loads((out / "provenance.json").read_text())
    history = facts["history"]
    assert [found["step"] for found in history] == [20, 40, 60]
    best = max(history, key=lambda found: (found["tokens_per_step"]["greedy"], -found["step"]))
    assert facts["best"] == best and facts["step"] == best["step"]
    assert best["tokens_per_step"]["greedy"] > 1.1, "a head that learned accepts something"
    assert best["top_1"]["greedy"][0] > 0.1 and len(best["top_5"]["temperature 1"]) == 3
    for name in ("argv", "git_commit", "versions", "data_digest", "target_fingerprint"):
        assert facts[name] or name == "git_commit"
    assert parse(TrainConfig, ["--config", str(out / "config.yaml")], "test") == config
    steps = checkpoint.all_steps(out / "checkpoints")
    states = [checkpoint.read_state(out / "checkpoints" / f"step-{step}") for step in (50, 60)]
    assert set(steps) == {50, 60, *(state["best"]["step"] for state in states)}
    assert best["step"] in steps
    head = load_head(out, target)
    assert head.config.trained_depth == 3 and "/" not in head.config.target_name
    stored = weights_of(out / "checkpoints" / f"step-{best['step']}")
    assert all(torch.equal(t, stored[name]) for name, t in head.state_dict().items())
    assert list((out / "logs").rglob("events.out.tfevents*"))
    unsafe = [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]
    assert not unsafe


def test_going_on_from_a_head(config):
    first, _ = run(config("first", **{"optim.steps": 4, "eval.prompts": 0}))
    options = {"head.init_from": first.out, "optim.steps": 1, "optim.lr": 0, "eval.prompts": 0}
    second, _ = run(config("second", **options))
    before, after = weights_of(first.out), weights_of(second.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim.batch_positions": 100000}, "optim.batch_positions"),
        ({"data.states.max_bytes": 1000, "data.states.dtype": "int8"}, "max_bytes is 1000"),
        ({"data.labels": "local", "loss.kl": 0.1}, "loss.kl"),
        ({"data.source.holdout_rows": 0}, "data.source.holdout_rows"),
        ({"optim.lr": 1e30, "optim.clip_norm": "null"}, "optim.lr"),
        ({"data.answers.max_new_tokens": 500}, "max_new_tokens"),
        ({"eval.max_new_tokens": 500}, "eval.max_new_tokens"),
        ({"target.path": "no/such/folder"}, "no/such/folder"),
        ({"head.init_from": "no/such/head"}, "no/such/head"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refusals_name_what_to_change(argv, capsys, changes, named):
    with pytest.raises(SystemExit) as stop:
        main(argv("refused", **changes))
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "named"),
    [("--optim.stpes=3", "optim.stpes"), ("--optim.steps=many", "optim.steps"),
     ("--head.cell=lstm", "head.cell")],
)  # fmt: skip
def test_unknown_keys_and_wrong_types_are_named(argv, capsys, extra, named):
    with pytest.raises(SystemExit) as stop:
        main([*argv(), extra])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_unknown_keys_in_a_file_are_named(argv, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("optim:\n  stpes: 3\n")
    with pytest.raises(SystemExit):
        main([*argv(), "--config", str(tmp_path / "c.yaml")])
    assert "stpes" in capsys.readouterr().err


def test_unsynchronised_copies_are_refused(argv, capsys, monkeypatch):
    PartialState(cpu=True)  # as accelerate is when it was told of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(argv("world"))
    assert "know nothing of each other" in capsys.readouterr().err


@pytest.mark.usefixtures("files_unseen")
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_parses(path):
    first = path.read_text().splitlines()[0]
    launch = re.match(r"# accelerate launch train/redrafter\.py --config (\S+) ", first)
    if launch is None:
        pytest.skip("not a training recipe")
    assert (ROOT / launch[1]) == path, "the launch line names another file"
    given = ["--config", str(path), "--target.path=t", "--output_dir=o", "--data.source.path=p"]
    assert parse(TrainConfig, given, "test").optim.steps > 0


# ------------------------------------------------------------------ small parts


def test_learning_rate_rises_then_falls_to_its_end(config):
    optim = replace(config().optim, steps=100, warmup_steps=10, lr=1.0, final_lr_ratio=0.1)
    rates = [learning_rate(optim, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[100] == pytest.approx(0.1)
    assert learning_rate(replace(optim, steps=10, warmup_steps=0), 0) == 1.0


def test_pruning_keeps_what_a_resume_needs(tmp_path):
    def save(step, best):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"best": best and {"step": best}}))

    for step, best in ((10, 10), (20, 10), (30, 10), (40, 40), (50, 40)):
        save(step, best)
    checkpoint.prune(tmp_path, keep=3, best=40)
    assert checkpoint.all_steps(tmp_path) == [10, 30, 40, 50]
    checkpoint.prune(tmp_path, keep=2, best=40)
    assert checkpoint.all_steps(tmp_path) == [40, 50]


def test_a_batch_splits_evenly():
    batch = Batch(*(torch.arange(8)[:, None] for _ in range(4)))
    assert [int(part.tokens[0]) for part in batch.split(4)] == [0, 2, 4, 6]
    assert batch.split(4)[0].teacher is None
