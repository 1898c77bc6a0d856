"""The model card: every figure in it is in a file, and what was not measured is not claimed."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import torch
from hub_server import check_card
from huggingface_hub import ModelCard
from published import released

from redrafter.contracts import InputError
from redrafter.evaluation.report import with_interval
from redrafter.heads.load import load_head
from redrafter.hub.recipe import launch_line
from redrafter.hub.run import read_run


def card_of(run: Path, **changes) -> tuple[ModelCard, str]:
    release, _ = released(run, **changes)
    text = (release.card / "README.md").read_text()
    assert not check_card(text)
    return ModelCard(text), text


def test_figures_in_the_card_are_those_of_the_files(run):
    card, text = card_of(run, draw=True, base_model="owner/model", license="mit")
    body = json.loads((run / "speed.json").read_text())
    figures = body["methods"]["head"]
    metrics = {"tokens_per_step", "speedup_stock", "speedup_plain"}
    found = {
        (r.metric_name.split(",")[0], r.metric_value, r.metric_args["low"], r.metric_args["high"])
        for r in card.data.eval_results
    }
    assert found == {
        (label, figures[key], figures["low"][key], figures["high"][key])
        for key, label in (
            ("tokens_per_step", "tokens per target forward"),
            ("speedup_stock", "speedup over model.generate"),
            ("speedup_plain", "speedup over the best plain loop"),
        )
    }, "nothing of methods that need no head"
    (table,) = re.findall(r"^### .*? \(`speed\.json`\)\n(.*?)^## ", text, re.M | re.S)
    for name, m in body["methods"].items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` | "))
        for key in metrics:
            assert with_interval(m[key], m["low"].get(key), m["high"].get(key)) in row, (name, key)
    proof = json.loads((run / "lossless.json").read_text())["methods"]["head"]
    for mode, r in proof.items():
        counts = f"{r['compared_tokens']} | {r['near_ties']} | {r['unexplained']} |"
        assert re.search(rf"\| `head` \| {mode}, T = .*\| {re.escape(counts)}", text)
    assert card.data.base_model == "owner/model" and card.data.license == "mit"
    assert "custom_generate" in card.data.tags
    assert "[owner/model](https://huggingface.co/owner/model)" in text
    facts = json.loads((run / "provenance.json").read_text())
    for entry in facts["history"]:
        assert f"| {entry['step']} | {entry['tokens_per_step']['greedy']:.2f} |" in text
    assert "labels `tokens`, loss `1 cross_entropy`, seed" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 3
    for picture in pictures:  # opaque: readable on a light page and on a dark one
        assert (run / "card" / picture).is_file()
        pixels = matplotlib.image.imread(run / "card" / picture)
        assert pixels.shape[-1] == 3 or pixels[..., 3].min() == 1.0
        assert pixels[..., :3].max() - pixels[..., :3].min() > 0.9


def test_the_receipt_of_the_data(run, published_run):
    facts = json.loads((run / "provenance.json").read_text())
    (part,) = facts["data"]
    source, prompts, answers, states = part["stages"]
    assert [s["kind"] for s in part["stages"]] == ["source", "prompts", "answers", "states"]
    assert source["name"] == "prompts_train.jsonl" and not source["on_hub"]
    for stage in (prompts, states):  # beside the training's there are held-out prompts
        found = [
            json.loads(p.read_text()) for p in (published_run / "data").glob("*/manifest.json")
        ]
        counts = [m["counts"] for m in found if m["identity"]["kind"] == stage["kind"]]
        assert {k: stage[k] for k in counts[0]} in counts
    assert prompts["rows"] + prompts["skipped"] == source["n_rows"] == 24
    assert answers["temperatures"] == [0.0, 1.0] and answers["max_new_tokens"] == 24
    _, text = card_of(run)
    for stage in part["stages"]:
        assert f"`{stage['digest'][:16]}`" in text
    assert (
        f"| answers | T = 0 and 1, 1 sample(s) each, up to 24 tokens | {answers['rows']} |" in text
    )
    assert f"`{facts['data_digest']}`" in text
    line = launch_line({**facts, "argv": ["/x/train/redrafter.py", "--a=/b/c"], "processes": 2})
    assert line == "accelerate launch --num_processes 2 train/redrafter.py --a=c"
    words = ["/x/bin/redrafter train_redrafter", "train_redrafter", "--a", "1"]
    line = launch_line({"argv": words})
    assert line == "redrafter train_redrafter --a 1"
    words = ["/x/redrafter/cli/train_redrafter.py", "--a", "1"]  # as accelerate starts it
    line = launch_line({"argv": words, "processes": 2})
    assert line == "redrafter train --launch.num_processes 2 --a 1"


def test_a_source_on_the_hub_is_named_in_the_metadata(run):
    facts = json.loads((run / "provenance.json").read_text())
    source = facts["data"][0]["stages"][0]
    source |= {"name": "openai/gsm8k", "on_hub": True, "split": "train", "revision": None}
    (run / "provenance.json").write_text(json.dumps(facts))
    card, text = card_of(run)
    assert card.data.datasets == ["openai/gsm8k"]
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k), split train" in text


def test_a_run_without_measurements_claims_nothing(run):
    for name in ("speed.json", "lossless.json", "provenance.json"):
        (run / name).unlink()
    card, text = card_of(run, draw=True)
    assert not card.data.eval_results and "model-index" not in text
    assert "no speed is claimed" in text and "was not recorded" in text
    assert not re.search(r"\d\.\d+ *x|tokens per step\*\*", text)
    assert not (run / "card" / "pictures").exists() or not any((run / "card/pictures").iterdir())


def test_what_is_slow_or_wrong_is_said(run):
    body = json.loads((run / "speed.json").read_text())
    body["methods"]["head"]["speedup_plain"] = 0.81
    body["loop_share"] = 0.75
    (run / "speed.json").write_text(json.dumps(body))
    proof = json.loads((run / "lossless.json").read_text())
    proof["methods"]["head"]["greedy"]["unexplained"] = 2
    (run / "lossless.json").write_text(json.dumps(proof))
    _, text = card_of(run)
    assert "`head` was **slower** than the best plain loop (0.81 x)" in text
    assert "75% of the plain text repeats itself" in text
    assert "which did not hold when it was checked" in text
    assert "**Not lossless: 2 differences from plain decoding are unexplained.**" in text


def test_the_targets_licence_is_that_of_its_own_card(run, tiny_target, tmp_path):
    folder = shutil.copytree(tiny_target, tmp_path / "target")
    facts = json.loads((run / "provenance.json").read_text())
    facts["config"]["target"]["path"] = str(folder)
    (run / "provenance.json").write_text(json.dumps(facts))
    card, text = card_of(run)
    assert card.data.license is None and "not known where this card was made" in text
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nA model.\n")
    card, text = card_of(run)
    assert card.data.license == "cc-by-4.0"
    assert "| licence | cc-by-4.0, as stated by the card in its folder |" in text
    other = "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE.md\n---\n"
    (folder / "README.md").write_text(other)
    card, text = card_of(run, base_model="owner/model")
    link = "https://huggingface.co/owner/model/blob/main/LICENSE.md"
    assert (card.data.license_name, card.data.license_link) == ("ours", link)
    assert f"| licence | [ours]({link}), as stated" in text
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert card_of(run)[0].data.license is None


def test_figures_of_another_head_are_refused(run, tmp_path):
    head = load_head(run)
    with torch.no_grad():
        head.rnn_w.weight.mul_(1.5)
    head.save_pretrained(run)
    with pytest.raises(InputError, match=r"speed\.json was measured with another head"):
        released(run)
    body = json.loads((run / "speed.json").read_text())
    for change, match in (
        ({"provenance": {**body["provenance"], "head": None}}, "does not say which head"),
        ({"provenance": {}}, "is no result of"),
    ):
        (run / "speed.json").write_text(json.dumps({**body, **change}))
        with pytest.raises(InputError, match=match):
            read_run(run)
    (run / "speed.json").write_text("{")
    with pytest.raises(InputError, match=r"speed\.json cannot be read"):
        released(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        released(run)
    assert not (run / "card").exists(), "nothing is written before all is checked"
