"""Every kind of heads the whole way: trained, resumed, exported, verified, run by transformers."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from launching import ROOT, launch
from published import released
from test_training import SETTINGS
from transformers import AutoModelForCausalLM

from redrafter.cli.args import parse
from redrafter.cli.verify import main as verify
from redrafter.config import KINDS, PlanConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.heads.base import DraftHead
from redrafter.heads.load import head_class, load_head
from redrafter.hub.card import model_card
from redrafter.hub.run import read_run
from redrafter.planning.training_job import plan_training
from redrafter.targets.load import load_target
from redrafter.training.loop import Training

CHANGES = {"optim.steps": 6, "save_steps": 3, "eval.every_steps": 3, "eval.prompts": 2,
           "keep_checkpoints": 9, "data.source.n_rows": 12}  # fmt: skip
#: Recurrent heads go this way in test_training.py, test_verify.py and test_custom_generate.py; here
#: with what is off by default.
OF_KIND = {
    "recurrent": {
        "head.state_norm": "true", "head.exit_dim": 24, "loss.depth_weights": "chance",
        "loss.chance_floor": 0.2, "loss.cross_entropy": 1, "loss.reverse_kl": 0.1,
        "loss.towards": '{"lk_hybrid": 1}',
    },
    # what the layer over the prefix needs is the same for all kinds; this one goes its way
    "medusa": {"head.aux_layers": "[1]"},
    "hydra": {"head.prefix": "attention", "optim.row_starts": 4, "optim.accumulation": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def argv_of(tiny_target, tmp_path_factory):
    """argv_of(kind, name, **changes) of a short run; answers and states are made once."""
    base = tmp_path_factory.mktemp("kinds")

    def make(kind, out, **changes):
        given = {
            "head.kind": kind, "target.path": tiny_target, "output_dir": base / kind / out,
            "data.source.path": tiny_target / "prompts_train.jsonl", "data.folder": base / "data",
            **SETTINGS, **CHANGES, **OF_KIND.get(kind, {}), **changes,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in given.items()]

    return make


@pytest.fixture(scope="module")
def config_of(argv_of):
    return lambda *args, **changes: parse(TrainConfig, argv_of(*args, **changes), "test")


@pytest.fixture(scope="module", params=KINDS)
def run(request, config_of):
    """(kind, its exported folder)"""
    config = config_of(request.param, "straight")
    Training(config).train()
    return request.param, Path(config.output_dir)


def test_resumed_is_bit_for_bit_the_same(run, config_of):
    kind, straight = run
    config = config_of(kind, "resumed", resume="auto")
    out = Path(config.output_dir)
    shutil.copytree(straight / "checkpoints/step-3", out / "checkpoints/step-3")
    Training(config).train()
    for name in ("model", "optimizer", "rng"):
        one, two = (
            safetensors.torch.load_file(folder / "checkpoints/step-6" / f"{name}.safetensors")
            for folder in (straight, out)
        )
        assert one.keys() == two.keys() and len(one) > 0
        assert all(torch.equal(one[key], two[key]) for key in one), name
    before = safetensors.torch.load_file(straight / "checkpoints/step-3/model.safetensors")
    after = safetensors.torch.load_file(straight / "checkpoints/step-6/model.safetensors")
    assert any(not torch.equal(after[key], t) for key, t in before.items()), "nothing was learned"


def test_export_is_complete_and_does_what_it_did(run, tiny_target, capsys, monkeypatch):
    kind, out = run
    target = load_target(str(tiny_target))
    head = load_head(out, target)
    assert (head.kind, head.config.trained_depth) == (kind, 3)
    assert head.reads_prefix == ("head.prefix" in OF_KIND.get(kind, {}))
    assert head.max_depth in (None, 3)
    assert verify([str(out), "--target.path", str(tiny_target)]) == 0, capsys.readouterr().out
    golden = json.loads((out / "golden/golden.json").read_text())
    assert golden["decodes"]["greedy"]["drafter"] == f"head:4x{head.max_depth or 4}"
    assert len(golden["path"][0]) == (head.max_depth or 4)
    assert head.aux_layers == ((1,) if kind == "medusa" else ())
    if kind in ("hydra", "medusa"):  # a machine that left the layer out would be told of
        width = target.hidden_size
        monkeypatch.setattr(DraftHead, "contexts", lambda _, __, hidden, *___: hidden[..., :width])
        assert verify([str(out), "--target.path", str(tiny_target)]) == 1
        assert "differs first in: draft" in capsys.readouterr().out


def test_transformers_alone_runs_it(run, tiny_target):
    kind, out = run
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float64)
    ids = torch.tensor([[3, 7, 11, 5, 9, 4]])
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **options)
    ours = model.generate(ids, custom_generate=str(out), trust_remote_code=True, **options)
    assert ours.tolist() == plain.tolist()
    assert type(model._draft_head.head).__name__ == head_class(kind).__name__
    there = {file.stem for file in (out / "custom_generate").glob("heads_*.py")}
    assert f"heads_{kind}" in there
    assert not there & {f"heads_{other}" for other in KINDS if other != kind}, "not needed"


def test_card_and_plan_say_what_it_is(run, config_of):
    kind, out = run
    found = read_run(out)
    card = model_card(found, "me/it", ["config.json"], {})
    assert f"`{kind}`, after {found.head.paper[0]}" in card and found.head.summary() in card
    shown = plan_training(config_of(kind, "planned"), PlanConfig(probe_s=0)).show()
    trained = sum(p.numel() for p in found.head.parameters())
    assert f"head: {trained:,} parameters" in shown
    assert (kind in ("hydra", "medusa")) == ("a step, a level reads" in shown)
    assert ("context of layers 1 and the last" in card) == (kind == "medusa")
    assert ("attention over the row" in card) == ("head.prefix" in OF_KIND.get(kind, {}))


def test_what_would_be_published_is_whole(run):
    kind, out = run
    release, _ = released(out)
    there = set(release.files)
    assert {"README.md", "config.json", "model.safetensors", "golden/golden.json"} <= there
    assert f"custom_generate/heads_{kind}.py" in there and "custom_generate/generate.py" in there
    assert not [name for name in there if name.startswith("checkpoints")]


def test_goes_on_from_it_and_retunes_it(run, config_of):
    kind, out = run
    still = {"optim.steps": 1, "optim.lr": 0, "eval.prompts": 0, "head.init_from": out}
    for name, changes in (("on", {}), ("tuned", {"head.lora.r": 2})):
        config = config_of("recurrent", f"{name}-{kind}", **still, **changes)
        Training(config).train()
        before, after = (
            safetensors.torch.load_file(Path(folder) / "model.safetensors")
            for folder in (out, config.output_dir)
        )
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(after[key], value, atol=1e-6, rtol=0)
    if head_class(kind).depth_field is not None:
        with pytest.raises(InputError, match=r"set optim\.depth 3"):
            Training(config_of("recurrent", "deep", **{**still, "optim.depth": 4}))


@pytest.mark.slow
def test_zero_3_splits_matrices_of_every_depth(argv_of, config_of, tiny_target):
    """They are read outside of their modules' own forward passes; as is a table of embeddings."""
    pytest.importorskip("deepspeed")
    changes = {"head.inner_dim": 256, "optim.steps": 3, "eval.prompts": 0}
    alone = config_of("mlp_speculator", "alone", **changes)
    Training(alone).train()
    options = ["--config_file", str(ROOT / "configs/accelerate/zero3.yaml")]
    argv = argv_of("mlp_speculator", "zero3", **changes)
    launch(options, "train/redrafter.py", argv, DS_ACCELERATOR="cpu")
    split = parse(TrainConfig, argv, "test")
    one, two = (
        safetensors.torch.load_file(Path(config.output_dir) / "model.safetensors")
        for config in (alone, split)
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-3 * value.norm(), name
    # ZeRO-3 splits parameters of more than 100,000 numbers.
    assert one["speculator.head.1.weight"].numel() > 100_000, "nothing was split"
