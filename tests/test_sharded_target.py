"""Targets larger than a device: in parts in several processes (ZeRO-3), or brought from outside."""

import json

import pytest
from launching import ROOT, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from redrafter.cli.args import parse
from redrafter.config import PlanConfig, TargetConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.heads.load import load_head
from redrafter.planning.items import PlanBuilder
from redrafter.planning.meta import MetaTarget
from redrafter.planning.world import World
from redrafter.targets.load import load_target
from redrafter.training.data import check_settings
from redrafter.training.loop import Training

SETTINGS = {
    "data.mode": "online", "data.source.format": "text", "data.source.n_rows": 20,
    "data.source.holdout_rows": 6, "data.answers.max_new_tokens": 8,
    "data.answers.shard_prompts": 7, "data.buffer_rows": 7, "data.states.forward_tokens": 64,
    "optim.steps": 4, "optim.batch_positions": 32, "optim.depth": 3, "optim.warmup_steps": 1,
    "optim.lr": 5e-3, "eval.prompts": 3, "eval.batch_size": 1, "eval.max_new_tokens": 6,
    "eval.every_steps": 2, "eval.tree.width": 2, "eval.tree.depth": 2, "log_steps": 1,
    "loss.cross_entropy": 1, "loss.kl": 0.5, "loss.teacher": "states",
}  # fmt: skip


@pytest.fixture(scope="module")
def argv(tmp_path_factory, tiny_target):
    folder = tmp_path_factory.mktemp("sharded")

    def make(out, **changes):
        given = {
            "target.path": tiny_target, "data.source.path": tiny_target / "prompts_train.jsonl",
            "output_dir": folder / out, **SETTINGS, **changes,
        }  # fmt: skip
        return folder / out, [f"--{key}={value}" for key, value in given.items()]

    return make


def losses(out):
    (events,) = (out / "logs" / "redrafter").glob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    return {event.step: event.value for event in log.Scalars("train/loss")}


@pytest.fixture(scope="module")
def whole(argv):
    """A run with the target whole, which others must agree with."""
    out, settings = argv("whole")
    Training(parse(TrainConfig, settings, "test")).train()
    return out


def test_a_target_in_parts_teaches_what_a_whole_one_does(argv, whole, tiny_target, tmp_path):
    pytest.importorskip("deepspeed")
    parts, settings = argv("parts", **{"target.shard": "zero3"})
    launch(
        ["--config_file", str(ROOT / "configs/accelerate/zero3.yaml")],
        "tests/sharded_training.py", [str(tmp_path), *settings], DS_ACCELERATOR="cpu",
    )  # fmt: skip
    assert len(losses(parts)) == SETTINGS["optim.steps"]
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    target = load_target(str(tiny_target))
    vocabulary = {*target.lm_head.parameters(), *target.model.get_input_embeddings().parameters()}
    layers = sum(p.nbytes for p in {*target.model.parameters()} - vocabulary)
    assert all(n["whole"] == layers for n in notes)
    planned, _ = MetaTarget(TargetConfig(str(tiny_target), shard="zero3")).split_bytes(2)
    assert notes[0]["held"] + sum(p.nbytes for p in vocabulary) == pytest.approx(planned, rel=0.01)
    assert all(n["whole"] / 2 <= n["held"] <= 0.51 * n["whole"] for n in notes)
    assert not any(n["matrices_in_memory"] for n in notes), "gathered, and never let go"
    assert notes[0]["own"] != notes[1]["own"], "equally many: keeping step was not tried"
    assert len({n["own"] + n["idle"] for n in notes}) == 1
    a, b = (json.loads((out / "provenance.json").read_text()) for out in (whole, parts))
    assert a["target_fingerprint"] == b["target_fingerprint"] == target.fingerprint()
    rates = [[h["tokens_per_step"] for h in facts["history"]] for facts in (a, b)]
    assert rates[0] == rates[1] and len(rates[0]) == 2
    assert load_head(parts, target).config.target_probe.keys() == target.probe().keys()


def test_where_a_target_cannot_be_split(argv, tiny_target, monkeypatch):
    config = TargetConfig(path=str(tiny_target), shard="zero3")
    with pytest.raises(InputError, match=r"for train/redrafter\.py alone"):
        load_target(config)
    with pytest.raises(InputError, match=r"configs/accelerate/zero3\.yaml"):
        load_target(config, may_shard=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"no float64: set target\.dtype float32"):
        load_target(TargetConfig(str(tiny_target), dtype="float64", shard="zero3"), may_shard=True)
    _, settings = argv("no", **{"target.shard": "zero3", "data.mode": "offline"})
    with pytest.raises(InputError, match=r"take data\.mode online"):
        check_settings(parse(TrainConfig, settings, "test"))


def test_a_plan_counts_the_part_of_a_process():
    path = str(ROOT / "configs/plan/llama-3.1-70b")
    target = MetaTarget(TargetConfig(path, device="cpu", dtype="bfloat16", shard="zero3"))
    vocabulary = 2 * 128256 * 8192 * 2
    for n in (4, 8):
        items = PlanBuilder("job", target, World(n, n, "zero3"), PlanConfig(), 0).items
        held, gathered = (item.n_bytes for item in items[1:])
        assert held == vocabulary + (target.weight_bytes - vocabulary) // n
        assert 0 < gathered < 0.01 * target.weight_bytes
    with pytest.raises(InputError, match=r"plan_for\.sharding zero3"):
        PlanBuilder("job", target, World(4, 4, "ddp"), PlanConfig(), 0)


# ------------------------------------------------------------------ device_map


def test_a_target_partly_on_disk_teaches_what_a_whole_one_does(argv, whole, tiny_target):
    real = load_target(str(tiny_target))
    layers = real.model.base_model.layers
    vocabulary = sum(p.nbytes for p in real.lm_head.parameters())
    layer = sum(p.nbytes for p in layers[0].parameters())
    room = vocabulary + layer + layer // 2
    given = {"target.device_map": "auto", "target.host_bytes": room, "target.device": "cpu"}
    out, settings = argv("outside", **given)
    run = Training(parse(TrainConfig, settings, "test"))
    outside = [p for p in run.target.model.parameters() if p.device.type == "meta"]
    inside = [p for p in run.target.model.parameters() if p.device.type != "meta"]
    assert len(outside) >= len(list(layers[0].parameters())) * (len(layers) - 1)
    assert run.target.device.type == "cpu" and sum(p.nbytes for p in inside) <= room
    meta = MetaTarget(run.config.target)
    assert meta.placed_bytes()[0] == sum(p.nbytes for p in inside)
    run.train()
    assert losses(out) == losses(whole)
    assert all(p.device.type == "meta" for p in outside), "brought, and never taken away"
    assert run.target.fingerprint() == real.fingerprint() and run.target.digests() == real.digests()
    rates = [json.loads((o / "provenance.json").read_text())["history"] for o in (whole, out)]
    assert rates[0] == rates[1]


def test_where_layers_cannot_lie_outside(tiny_target, monkeypatch):
    path = str(tiny_target)
    with pytest.raises(InputError, match=r"target\.host_bytes: the embedding, lm_head"):
        load_target(TargetConfig(path, device="cpu", device_map="auto", host_bytes=1000))
    with pytest.raises(ValueError, match="give one of them"):
        TargetConfig(path, device_map="auto", shard="zero3")
    monkeypatch.setattr("redrafter.targets.offload.launched", lambda: 2)
    with pytest.raises(InputError, match=r"take target\.shard zero3"):
        load_target(TargetConfig(path, device="cpu", device_map="auto"))
