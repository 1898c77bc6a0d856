"""What the trainer takes: stores made before, mixed by weight, and texts; and what it refuses."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from redrafter.cli.args import parse
from redrafter.config import SourceConfig, StatesConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.build_rows import build_rows
from redrafter.data.reading import read_weights
from redrafter.data.states import build_states
from redrafter.data.store import Job, Store
from redrafter.targets.load import load_target
from redrafter.training.data import load_training_data
from redrafter.training.loop import Training

SETTINGS = {
    "optim.steps": 9, "optim.batch_positions": 32, "optim.depth": 3, "optim.warmup_steps": 2,
    "data.buffer_rows": 2, "eval.prompts": 0, "tracker": "null",
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(str(tiny_target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def sources(tiny_target, folder):
    """Two files of texts: 5 and 3 rows of about 50 tokens."""
    rows = (tiny_target / "prompts_train.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(row)["text"][:140] for row in rows]
    files = {"a": texts[:5], "b": texts[5:]}
    for name, own in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
        (folder / f"{name}.jsonl").write_text(lines)
    return {name: SourceConfig(str(folder / f"{name}.jsonl"), format="text") for name in files}


@pytest.fixture(scope="module")
def texts(target, sources, folder):
    return {
        name: build_rows(config, target.tokenizer, "texts", folder / f"texts_{name}",
                         max_tokens=512, progress=False)
        for name, config in sources.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def stored(target, texts, folder):
    """stored(name, continuation, dtype, top_k) -> path of a store of states."""

    def make(name, continuation=0, dtype="auto", top_k=None):
        path = folder / f"states_{name}_{continuation}_{dtype}{'' if top_k is None else top_k}"
        how = StatesConfig(dtype=dtype, teacher_top_k=top_k)
        build_states(target, texts[name], how, path,
                     continuation=continuation, progress=False)  # fmt: skip
        return path

    return make


@pytest.fixture
def config(tiny_target, tmp_path):
    def make(out="run", stores=None, **changes):
        given = {"target.path": tiny_target, "output_dir": tmp_path / out, **SETTINGS, **changes}
        if stores is not None:
            given["data.stores"] = f"[{', '.join(map(str, stores))}]"
        return parse(TrainConfig, [f"--{k}={v}" for k, v in given.items()], "test")

    return make


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def trained(config):
    run = Training(config)
    run.train()
    return run, weights_of(run.out)


def refused(config, target, named):
    with pytest.raises(InputError, match=named):
        load_training_data(config, target)


# ------------------------------------------------------------------ what trains


def test_texts_train_as_they_stand(config, sources, stored):
    """And the same from a store of them that was made before."""
    source = {"data.source.path": sources["a"].path, "data.source.format": "text",
              "data.text": "source"}  # fmt: skip
    first, one = trained(config("source", **source))
    second, two = trained(config("store", stores=[stored("a")]))
    assert first.data_digest == second.data_digest
    assert first.feed.steps_per_epoch == second.feed.steps_per_epoch < 9
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_stores_are_mixed_by_weight(config, stored):
    a, b = stored("a"), stored("b", dtype="float32")
    run, mixed = trained(config("mixed", stores=[f"{a}=1", f"{b}=3"]))
    assert [p.n_rows for p in run.feed.parts] == [5, 3]
    order = torch.cat([b.part for b in run.feed._epoch(0).buffers])
    assert torch.bincount(order).tolist() == [2, 6]
    other, plain = trained(config("plain", stores=[a, b]))
    assert torch.bincount(torch.cat([b.part for b in other.feed._epoch(0).buffers])).tolist() == [
        5, 3
    ]  # fmt: skip
    assert any(not torch.equal(mixed[k], plain[k]) for k in mixed)
    assert run.data_digest != other.data_digest


def test_weights_that_change_are_another_run(config, stored):
    a, b = stored("a"), stored("b")
    trained(config(stores=[a, f"{b}=2"]))
    with pytest.raises(InputError, match="another data digest"):
        Training(config(stores=[a, f"{b}=3"], resume="auto"))
    assert Training(config(stores=[a, f"{b}=2"], resume="auto")).done == 9


def test_stores_may_hold_more_than_is_needed(config, stored):
    """More greedy tokens than the labels take, and not equally many."""
    _, exact = trained(config("exact", stores=[stored("a", 1), stored("b", 1)],
                              **{"data.labels": "greedy"}))  # fmt: skip
    _, more = trained(config("more", stores=[stored("a", 4), stored("b", 1)],
                             **{"data.labels": "greedy"}))  # fmt: skip
    assert all(torch.equal(exact[k], more[k]) for k in exact)
    run, _ = trained(config("local", stores=[stored("a", 4), stored("b", 5)],
                            **{"data.labels": "local"}))  # fmt: skip
    assert run.done == 9


def test_reading_weights():
    assert read_weights(["a", "b=2", "c/d=0.5", "x=y", "x=y=3", "s3://q?k=v"]) == [
        ("a", 1.0), ("b", 2.0), ("c/d", 0.5), ("x=y", 1.0), ("x=y", 3.0), ("s3://q?k=v", 1.0),
    ]  # fmt: skip


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_bad_weight_is_named(config, target, stored, weight):
    named = re.escape(f"{stored('a')}={weight}")
    refused(config(stores=[stored("b"), f"{stored('a')}={weight}"]), target, named)


def test_stores_that_are_none_are_named(config, target, texts, stored, tmp_path):
    missing = tmp_path / "missing"
    refused(config(stores=[stored("a"), missing]), target, rf"{missing} holds no store")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(stored("a"), unfinished)
    (unfinished / "manifest.json").unlink()
    refused(config(stores=[unfinished]), target, rf"{unfinished} is not complete: run the command")
    refused(config(stores=[texts["a"].name]), target, "texts_a holds texts, not states")


def test_nothing_to_learn_from(config, target, tmp_path):
    refused(config(), target, r"data.source.path .* --data.stores")
    job = Job(tmp_path / "empty", "texts", {})
    job.finish(0)
    with pytest.raises(InputError, match="empty holds no rows"):
        build_states(target, Store(tmp_path / "empty"), StatesConfig(), tmp_path / "s")


def test_stores_are_read_offline_only(config, target, stored):
    for mode in ("online", "hybrid"):
        refused(config(stores=[stored("a")], **{"data.mode": mode}), target, f"data.mode {mode}")


@pytest.mark.parametrize(("labels", "n"), [("greedy", 1), ("local", 4)])
def test_labels_that_a_store_does_not_hold(config, target, stored, labels, n):
    refused(
        config(stores=[stored("a", n), stored("b", n - 1)], **{"data.labels": labels}), target,
        rf"states_b_{n - 1}_auto holds {n - 1} greedy tokens .* --continuation {n}",
    )  # fmt: skip


def test_stores_of_two_dtypes(config, target, stored):
    refused(config(stores=[stored("a"), stored("b", 0, "int8")]), target,
            "b_0_int8 holds int8, .*a_0_auto float32")  # fmt: skip


def test_probable_tokens_that_do_not_fit(config, target, stored):
    probable = {"loss.kl": 1, "loss.teacher": "top_k"}
    refused(config(stores=[stored("a")], **probable), target, "a_0_auto holds no probable tokens")
    three, five = stored("a", top_k=3), stored("b", top_k=5)
    refused(config(stores=[three, five], **probable), target, f"{five} holds 5 .* {three} 3")
    load_training_data(config(stores=[three, five]), target)  # not asked for: they do not matter


def change_weights(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.norm.weight"] *= 1.5
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def change_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.01}))


def change_tokenizer(folder):
    path = folder / "tokenizer.json"
    content = {**json.loads(path.read_text()), "normalizer": {"type": "NFC"}}
    path.write_text(json.dumps(content))


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another #}")


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer", "template"])
def test_a_store_of_another_target_is_refused(config, tiny_target, stored, tmp_path, part):
    other = tmp_path / "other"
    shutil.copytree(tiny_target, other)
    load_training_data(config(stores=[stored("a")]), load_target(str(other)))  # a copy will do
    globals()[f"change_{part}"](other)
    wanted = rf"states_a_0_auto was made with another target: its {part} has digest \w+, .* has \w+"
    refused(config(stores=[stored("a")]), load_target(str(other)), wanted)


def test_hybrid_heeds_max_bytes(config, sources, tmp_path):
    """Before any is written, though it writes while it trains."""
    options = {
        "data.source.path": sources["a"].path, "data.source.format": "text",
        "data.text": "source", "data.mode": "hybrid", "data.folder": tmp_path / "data",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"need \d+ bytes .* max_bytes is 1000: "):
        Training(config(**options, **{"data.states.max_bytes": 1000}))
    assert not list((tmp_path / "data").glob("states-*/*.safetensors"))
    trained(config(**options))
    assert list((tmp_path / "data").glob("states-*/manifest.json"))
