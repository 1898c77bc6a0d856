"""scripts/make_draft_model.py: learns the target's distribution, and the folder drafts for it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from models import settings
from transformers import AutoTokenizer

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.build_rows import build_rows
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.model import DraftModel
from redrafter.targets.load import load_target

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--hidden=32", "--layers=1", "--heads=2", "--batch_tokens=512", "--warmup_steps=5"]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "make_draft_model.py"
    spec = importlib.util.spec_from_file_location("make_draft_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(str(tiny_target))


@pytest.fixture(scope="module")
def stores(tiny_target, target, tmp_path_factory):
    """Texts that the target knows, other ones, and prompts, which teach nothing."""
    folder = tmp_path_factory.mktemp("rows")
    for name, part, keep, n in (
        ("train", "train", "texts", 40),
        ("held", "heldout", "texts", 8),
        ("prompts", "train", "prompts", 4),
    ):
        config = SourceConfig(str(tiny_target / f"prompts_{part}.jsonl"), format="text", n_rows=n)
        build_rows(config, target.tokenizer, keep, folder / name, progress=False)
    return folder


@pytest.fixture(scope="module")
def trained(script, tiny_target, stores, tmp_path_factory):
    """The folder of a draft model of 60 steps, and what the script printed and returned."""
    out = tmp_path_factory.mktemp("made") / "draft"
    argv = [
        f"--target.path={tiny_target}", f'--stores=["{stores / "train"}"]',
        f'--heldout=["{stores / "held"}"]', f"--output_dir={out}", "--steps=60",
        "--eval_steps=20", "--save_steps=25", *SMALL,
    ]  # fmt: skip
    config = script.parse(script.DraftModelConfig, argv, "test")
    return out, script.train(config)[str(stores / "held")]


def test_the_draft_comes_closer_to_the_target(script, target, stores, trained):
    held = script.read_rows(str(stores / "held"), target)
    draft = load_target(str(trained[0]))
    after = script.measure(draft.model, target, held, 512)
    assert after == pytest.approx(trained[1], abs=1e-4)  # the last step is what was saved
    torch.manual_seed(0)
    config = script.DraftModelConfig(target=None, stores=(), output_dir="", hidden=32, layers=1)
    before = script.measure(script.new_model(config, target), target, held, 512)
    assert after["kl"] < before["kl"] - 0.5
    assert after["overlap"] > before["overlap"] + 0.1
    assert after["greedy"] > before["greedy"] + 0.1


def test_the_folder_is_a_draft_model(trained, tiny_target, target):
    out, _ = trained
    assert json.loads((out / "provenance.json").read_text())["step"] == 60
    assert AutoTokenizer.from_pretrained(out).get_vocab() == target.tokenizer.get_vocab()
    draft = load_target(str(out))
    assert draft.max_positions == target.max_positions
    assert draft.eos_token_ids == target.eos_token_ids
    # Of its own kind of text, which depends on the Python at hand: the standard library's
    lines = (tiny_target / "prompts_heldout.jsonl").read_text().splitlines()[:6]
    rows = [target.tokenizer(json.loads(line)["text"]).input_ids[:24] for line in lines]
    drafter, config = DraftModel(draft, target, 3), settings(max_new_tokens=32)
    got = speculative(target, rows, config, seeds=range(6), drafter=drafter)
    assert got.tokens == plain(target, rows, config, seeds=range(6)).tokens
    assert got.stats.accepted_at[0] > 0


def test_for_the_cross_entropy_alone_the_target_does_not_run(
    script, tiny_target, stores, tmp_path, monkeypatch
):
    def asleep(config):
        target = load_target(config)
        monkeypatch.setattr(target, "states", None)
        return target

    monkeypatch.setattr(script, "load_target", asleep)
    argv = [
        f"--target.path={tiny_target}", f'--stores=["{stores / "train"}"]', "--steps=2",
        f"--output_dir={tmp_path / 'draft'}", *SMALL,
    ]  # fmt: skip
    for loss in ('{"cross_entropy": 1}', '{"cross_entropy": 1, "kl": 0}'):
        config = script.parse(script.DraftModelConfig, [*argv, f"--loss={loss}"], "test")
        assert script.train(config) == {}
    assert (
        load_target(str(tmp_path / "draft")).vocab_size == load_target(str(tiny_target)).vocab_size
    )
    with pytest.raises(TypeError):
        script.train(script.parse(script.DraftModelConfig, argv, "test"))


def test_measure_means_over_the_supervised_tokens(script, target, stores):
    """Against whole forwards, row by row."""
    held = script.read_rows(str(stores / "held"), target, 3)
    torch.manual_seed(3)
    config = script.DraftModelConfig(target=None, stores=(), output_dir="", hidden=32, layers=1)
    model = script.new_model(config, target)
    greedy, overlap, kl = [], [], []
    for row in range(3):
        ids = torch.tensor([held.ids(row)])
        mask = held.supervised[held.offsets[row] : held.offsets[row + 1]][1:]
        assert mask.any() and not mask.all()
        labels = script.both_logits(model, target, held, [row])[2]
        assert labels.tolist() == ids[0, 1:][mask].tolist()
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1][mask].softmax(-1) for m in
                    (target.model, model))  # fmt: skip
        greedy.append(p.argmax(-1) == q.argmax(-1))
        overlap.append(1 - 0.5 * (p - q).abs().sum(-1))
        kl.append((p * (p / q).log()).sum(-1))
    want = {n: torch.cat(v).float().mean().item()
            for n, v in (("greedy", greedy), ("overlap", overlap), ("kl", kl))}  # fmt: skip
    assert script.measure(model, target, held, 512) == pytest.approx(want, rel=1e-3, abs=1e-5)


def test_every_row_comes_once_per_epoch(script, target, stores):
    rows = script.read_rows(str(stores / "train"), target)
    order, seen = script.batches(rows, 512, seed=1), []
    while len(seen) < rows.n_rows:
        batch = next(order)
        assert len(batch) * int(rows.lengths()[batch].max()) <= 512 or len(batch) == 1
        seen += batch
    assert sorted(seen) == list(range(rows.n_rows)) != seen


def test_bad_input_is_named(script, target, stores):
    with pytest.raises(InputError, match="without a token to learn from"):
        script.read_rows(str(stores / "prompts"), target)
    base = dict(target=None, stores=(), output_dir="")
    for changes, named in (
        (dict(hidden=36, heads=4), "hidden: 36"),
        (dict(kv_heads=3), "kv_heads: 3"),
        (dict(loss={"mse": 1.0}), "mse"),
        (dict(loss={"kl": 0.0}), "loss"),
        (dict(steps=0), "steps"),
    ):
        with pytest.raises(ValueError, match=named):
            script.DraftModelConfig(**base, **changes)
