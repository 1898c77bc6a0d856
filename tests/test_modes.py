"""Offline, online and hybrid, fresh and resumed, one row at a time or many: the same positions."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from redrafter.cli.args import parse
from redrafter.config import AnswersConfig, SourceConfig, StatesConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers, generation_config
from redrafter.data.build_rows import build_rows
from redrafter.data.reading import Fresh, Hybrid, Stored
from redrafter.data.rows import batches_by_length
from redrafter.data.states import StateMaker, build_states, unique_rows
from redrafter.data.store import Job, Store
from redrafter.decode.plain import plain
from redrafter.targets.load import load_target
from redrafter.training.engine import check_device
from redrafter.training.feed import Feed
from redrafter.training.loop import Training

DEPTH = 3
RAGGED = 300  # tokens of a forward that holds eight rows of these or more
SETTINGS = {
    "data.source.format": "text", "data.source.text_prompt_tokens": 24,
    "data.answers.max_new_tokens": 12, "data.answers.temperatures": "[0, 0.001, 1]",
    "data.buffer_rows": 3, "optim.steps": 24,
    "optim.batch_positions": 32, "optim.depth": DEPTH, "optim.warmup_steps": 2,
    "eval.prompts": 0, "save_steps": 2, "tracker": "null",
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(str(tiny_target))  # float32


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Shared, so that answers are made once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def source(tiny_target, data_folder):
    """Prompts of different lengths."""
    rows = (tiny_target / "prompts_train.jsonl").read_text().splitlines()[:6]
    texts = [json.loads(row)["text"][: 12 + 12 * i] for i, row in enumerate(rows)]
    path = data_folder / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(str(path), format="text", text_prompt_tokens=24)


@pytest.fixture(scope="module")
def answers(target, source, data_folder):
    """18 ragged rows, some of them duplicates."""
    where = dict(folder=data_folder, named=True, progress=False)
    prompts = build_rows(source, target.tokenizer, "prompts", max_tokens=512 - 12, **where)
    how = AnswersConfig(temperatures=(0.0, 0.001, 1.0), max_new_tokens=12)
    return build_answers(target, prompts, how, **where)


@pytest.fixture
def config(tiny_target, source, data_folder, tmp_path):
    """config(name, **changes): a short run into tmp_path/name."""

    def make(out="run", **changes):
        given = {
            "target.path": tiny_target, "data.source.path": source.path,
            "output_dir": tmp_path / out, "data.folder": data_folder, **SETTINGS, **changes,
        }  # fmt: skip
        return parse(TrainConfig, [f"--{k}={v}" for k, v in given.items()], "test")

    return make


@pytest.fixture
def store(target, answers, tmp_path):
    """store(name, rows): a store of states in tmp_path."""

    def make(name, continuation=0, rows=answers, **settings):
        return build_states(target, rows, StatesConfig(**settings), tmp_path / name,
                            continuation=continuation, progress=False)  # fmt: skip

    return make


def n_of(labels):
    return {"tokens": 0, "greedy": 1, "local": DEPTH + 1}[labels]


def feed_of(target, part, labels="tokens", positions=16, **options):
    options = {"buffer_rows": 3, "teacher": None if labels == "local" else "states", **options}
    return Feed(target, [part], positions=positions, depth=DEPTH, seed=3, labels=labels, **options)


# ------------------------------------------------------------------ one row at a time


def expected_starts(target, rows, labels):
    """Every start in order: (h_t, tokens, labels, h_{t+1} .. or None), by plain forwards and
    generations of that row alone."""
    said = generation_config(0, DEPTH + 1)
    for r in range(rows.n_rows):
        row = torch.tensor(rows.ids(r))
        hidden = target.states(row[None])[0]
        greedy = target.project(hidden).argmax(-1)
        first = int(rows.supervised[rows.offsets[r] : rows.offsets[r + 1]].nonzero()[0])
        for t in range(first - (1 if labels == "local" else 2), len(row) - 1):
            depths = min(DEPTH, len(row) - 2 - t)
            if labels == "local":
                text = plain(target, [row[: t + 1].tolist()], said, seeds=[0]).tokens[0]
                yield hidden[t], torch.tensor(text[:-1]), torch.tensor(text[1:]), None
            elif depths:
                label = row[t + 2 :] if labels == "tokens" else greedy[t + 1 :]
                yield (hidden[t], row[t + 1 : t + 1 + depths], label[:depths],
                       hidden[t + 1 : t + 1 + depths])  # fmt: skip


def ints(batch):
    """One line of tokens, labels and mask per start."""
    mask = batch.mask.long()
    return torch.cat((batch.tokens * mask, batch.labels * mask, mask), 1).tolist()


@pytest.mark.parametrize("kind", ["stored", "fresh"])
@pytest.mark.parametrize("labels", ["tokens", "greedy", "local"])
def test_positions_are_those_of_one_row_at_a_time(target, answers, store, labels, kind):
    maker = StateMaker(target, StatesConfig(), n_of(labels))
    part = Fresh(answers, maker) if kind == "fresh" else Stored(store("s", n_of(labels)))
    feed = feed_of(target, part, labels, positions=1)
    (batch,) = feed.batches(10_000)
    rows = answers.rows(Fresh(answers, maker).kept)
    wanted = list(expected_starts(target, rows, labels))
    assert feed.steps_per_epoch == len(wanted) == len(batch.tokens)
    for p, (h, tokens, label, teacher) in enumerate(wanted):
        mask = batch.mask[p]
        assert mask.tolist() == [k < len(tokens) for k in range(DEPTH)]
        torch.testing.assert_close(batch.context[p], h, atol=1e-5, rtol=0)
        assert torch.equal(batch.tokens[p][mask], tokens)
        assert torch.equal(batch.labels[p][mask], label)
        if teacher is not None:
            torch.testing.assert_close(batch.teacher[p][mask], teacher, atol=1e-5, rtol=0)
    shuffled = [line for step in range(len(wanted)) for line in ints(feed.step(step))]
    assert sorted(shuffled) == sorted(ints(batch)), "an epoch is not every position once"
    assert shuffled != ints(batch)


def test_a_head_that_copies_the_target_is_right_at_depth_one(target, store):
    """If alignment were off by one anywhere, the target's own prediction would not score."""
    (batch,) = feed_of(target, Stored(store("s", 1)), "greedy").batches(10_000)
    # What the target says after t+1 .. t+K, read from the teacher's states
    says = target.project(batch.teacher).argmax(-1)
    assert torch.equal(says[batch.mask], batch.labels[batch.mask])
    too_early = target.project(batch.context).argmax(-1)
    assert (too_early == batch.labels[:, 0]).float().mean() < 0.9


# ------------------------------------------------------------------ all ways to distil


class Killed(BaseException):
    pass


def dying(at):
    """From now on Job.write dies at its at-th shard of states."""
    written, write = [], Job.write

    def dies(self, *args):
        if self.identity["kind"] == "states":
            if len(written) == at - 1:
                raise Killed
            written.append(self.folder)
        write(self, *args)

    patch = pytest.MonkeyPatch()
    patch.setattr(Job, "write", dies)
    return patch


def all_rows(part):
    return part.load(torch.arange(part.n_rows), (9, 0))  # an epoch that no buffer belongs to


def made(kind, target, answers, folder, forward_tokens, labels):
    """(part, batches of two epochs), the states being made with forwards of so many tokens."""
    config = StatesConfig(forward_tokens=forward_tokens, shard_bytes=20_000)
    maker = StateMaker(target, config, n_of(labels))
    if kind == "offline":
        part = Stored(build_states(target, answers, config, folder, continuation=n_of(labels),
                                   progress=False))  # fmt: skip
    else:
        part = Fresh(answers, maker) if kind == "online" else Hybrid(answers, maker, folder, False)
    feed = feed_of(target, part, labels)
    batches = [feed.step(step) for step in range(2 * feed.steps_per_epoch + 2)]
    return part, batches


def close(one, two):
    """Equal numbers, and states within 1e-5."""
    for name in set(one) | set(two):
        if name == "states":
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
        else:
            assert torch.equal(one[name], two[name]), name


def close_batches(ones, twos):
    for a, b in zip(ones, twos, strict=True):
        assert ints(a) == ints(b)
        torch.testing.assert_close(a.context, b.context, atol=1e-5, rtol=0)
        if a.teacher is not None:
            torch.testing.assert_close(a.teacher, b.teacher, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def reference(target, answers, tmp_path_factory):
    """By labels: columns and batches of offline states made one row at a time."""
    found = {}
    for labels in ("tokens", "local"):
        folder = tmp_path_factory.mktemp("reference")
        part, batches = made("offline", target, answers, folder, 1, labels)
        found[labels] = all_rows(part), batches
    return found


@pytest.mark.parametrize("labels", ["tokens", "local"])
@pytest.mark.parametrize("forward_tokens", [1, RAGGED], ids=["batch 1", "ragged batches"])
@pytest.mark.parametrize("kind", ["offline", "online", "hybrid"])
def test_every_way_gives_the_same(
    target, answers, reference, tmp_path, kind, forward_tokens, labels
):
    columns, batches = reference[labels]
    given = kind, target, answers, tmp_path, forward_tokens, labels
    part, own = made(*given)
    close(all_rows(part), columns)
    close_batches(own, batches)
    if kind == "online":
        assert not list(tmp_path.iterdir()), "online writes nothing"
        return
    # Interrupted after it was complete: some shards are lost
    digest, shards = part.store.digest if kind == "offline" else part.stored.store.digest, {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        shards[path.name] = path.stat().st_mtime_ns
    assert len(shards) > 3
    (tmp_path / "manifest.json").unlink()
    for index in (1, len(shards) - 1):
        (tmp_path / f"shard-{index:05d}.safetensors").unlink()
        (tmp_path / f"shard-{index:05d}.json").unlink()
    part, own = made(*given)
    after = {p.name: p.stat().st_mtime_ns for p in sorted(tmp_path.glob("*.safetensors"))}
    assert after.keys() == shards.keys()
    assert sum(after[name] == shards[name] for name in shards) == len(shards) - 2
    close(all_rows(part), columns)
    close_batches(own, batches)
    assert digest == Store(tmp_path).digest
    # Killed while the third shard is being written
    shutil.rmtree(tmp_path)
    patch = dying(3)
    with pytest.raises(Killed):
        made(*given)
    patch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    part, own = made(*given)
    close(all_rows(part), columns)
    close_batches(own, batches)
    assert digest == Store(tmp_path).digest


def test_ragged_batches_are_ragged(answers):
    lengths = answers.lengths[unique_rows(answers)]
    batches = batches_by_length(lengths, range(len(lengths)), RAGGED)
    assert any(len(b) >= 8 and len(lengths[b].unique()) > 2 for b in batches)


# ------------------------------------------------------------------ trajectories


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def trained(config):
    torch.manual_seed(123)  # what ran before must not matter
    run = Training(config)
    run.train()
    return run, weights_of(run.out)


def same_weights(one, two, atol=0.0):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=atol, rtol=0)


@pytest.mark.parametrize("labels", ["tokens", "local"])
def test_trajectories_are_equal_offline_online_and_hybrid(config, tmp_path, labels):
    options = {"data.labels": labels, "save_steps": 12}
    run, offline = trained(config("offline", **options))
    assert run.feed.steps_per_epoch < 12, "fewer than two epochs: the store was not read again"
    _, online = trained(config("online", **options, **{"data.mode": "online"}))
    same_weights(offline, online, 1e-5)
    hybrid = {**options, "data.mode": "hybrid"}
    _, straight = trained(config("hybrid", **hybrid))
    same_weights(offline, straight, 1e-5)
    # Killed at the third buffer of the first epoch, and resumed from its checkpoint
    own = {**hybrid, "data.states.forward_tokens": 700}  # its states are not those found above
    own |= {"data.folder": tmp_path / "data", "save_steps": 1}
    again = config("killed", **own)
    patch = dying(3)
    with pytest.raises(Killed):
        trained(again)
    patch.undo()
    assert Training(replace(again, resume="auto")).done > 0, "it died before its first checkpoint"
    run, resumed = trained(replace(again, resume="auto"))
    same_weights(offline, resumed, 1e-5)
    with pytest.raises(InputError, match="--resume auto"):
        Training(again)


def test_a_hybrid_run_says_what_it_leaves(config, tmp_path, capsys):
    """Shorter than an epoch: how much is there. An epoch exactly: a store, though no step needed
    the last buffer."""
    short = {"data.mode": "hybrid", "optim.steps": 1, "optim.batch_positions": 8, "seed": 7}
    Training(config("short", **short)).train()
    said = capsys.readouterr().out
    assert "of hidden states are written, as the run was shorter than an epoch" in said
    trained = Training(config("whole", **short))
    steps = trained.feed.steps_per_epoch
    trained = Training(config("epoch", **{**short, "optim.steps": steps}))
    trained.train()
    assert "shorter than an epoch" not in capsys.readouterr().out
    (part,) = trained.feed.parts
    store = Store(part.job.folder, "states")
    assert store.n_rows == part.n_rows
    store.verify()


def test_a_head_on_another_device_is_refused():
    class Elsewhere:
        device = torch.device("cuda", 0)

    check_device(Elsewhere(), torch.device("cuda"))
    for device in ("cpu", "cuda:1"):
        with pytest.raises(InputError, match=f"target.device {device}, but accelerate trains on"):
            check_device(Elsewhere(), torch.device(device))
