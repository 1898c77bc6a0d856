"""data/lookahead.py, train/disco.py, and what they made, used by path: end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import ranks

from redrafter.cli import costs as costs_cli
from redrafter.cli import lookahead_records as records_cli
from redrafter.cli import speed as speed_cli
from redrafter.cli import train_disco as disco_cli
from redrafter.data.store import Store
from redrafter.heads.recurrent import RecurrentHead
from redrafter.records import store as records_store
from redrafter.records.store import read_records
from redrafter.targets.load import load_target

DRAFTER = "head:2x3"


@pytest.fixture(scope="module")
def made(tiny_target, tmp_path_factory):
    """A head's folder with a profile of this device and a classifier, and the records."""
    folder = tmp_path_factory.mktemp("disco")
    target = load_target(str(tiny_target))
    torch.manual_seed(0)
    RecurrentHead.for_target(target).save_pretrained(folder / "head")
    head = ["--target.path", str(tiny_target), "--head", str(folder / "head"), "--threads", "1"]
    records = [
        *head, "--drafter", DRAFTER, "--prompts", str(tiny_target / "prompts_heldout.jsonl"),
        "--n_prompts", "5", "--skip_rows", "2", "--max_new_tokens", "12", "--batch_size", "2",
        "--shard_prompts", "2", "--out", str(folder / "records"),
    ]  # fmt: skip
    assert records_cli.main(records) == 0
    assert costs_cli.main([
        *head, "--drafters", DRAFTER, "--contexts", "16", "--batch_sizes", "1", "--new_tokens",
        "1,3,5,7", "--rounds", "2", "--profile", "true",
    ]) == 0  # fmt: skip
    (profile,) = (folder / "head" / "profiles").glob("*.json")
    train = [
        "--records", str(folder / "records"), "--costs", str(profile), "--out",
        str(folder / "head" / "disco"), "--validation_prompts", "2", "--epochs", "3", "--hidden",
        "4", "--rollouts", "1",
    ]  # fmt: skip
    assert disco_cli.main(train) == 0
    return folder, head, records, train


def test_head_and_classifier_load_from_one_folder(made, tiny_target, capsys):
    folder, head, _, _ = made
    assert (folder / "head" / "disco" / "model.safetensors").is_file()
    names = [f"{DRAFTER}:lookahead={text}" for text in
             ("disco", "disco(when=step)", "disco(rule=threshold)")]  # fmt: skip
    out = folder / "speed.json"
    assert speed_cli.main([
        *head, "--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--n_prompts", "2",
        "--max_new_tokens", "12", "--cost_rounds", "1", "--methods", ",".join(["plain", *names]),
        "--out", str(out),
    ]) == 0  # fmt: skip
    body = json.loads(out.read_text())
    assert body["exact"] and all(body["methods"][n]["equal_rows"] == 2 for n in names)
    took = [body["methods"][n]["seconds"]["lookahead"] for n in names]
    # Where the costs measured here say not to draft at all, the first two are plain decoding.
    assert took[-1] > 0 and min(took) >= 0
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the same head, another draft
        speed_cli.main([
            *head, "--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--n_prompts", "1",
            "--methods", "head:2x4:lookahead=disco",
        ])  # fmt: skip
    assert "trained for another drafter" in capsys.readouterr().err


def test_the_report_is_written(made):
    folder = made[0] / "head" / "disco"
    report = json.loads((folder / "report.json").read_text())
    policies = report["policies"]
    assert {"threshold", "step", "level", "oracle", "best static", "static 0"} <= set(policies)
    fixed = [policies[f"static {k}"]["tokens_per_second"] for k in range(4)]
    assert policies["best static"]["tokens_per_second"] == max(fixed)
    assert policies["static 2"]["drafted_per_step"] == pytest.approx(2, abs=0.5)
    assert len(report["roc_auc"]) == 3 and 0 <= report["reliability"]["ece"] <= 1
    config = json.loads((folder / "config.json").read_text())
    assert config["device"]["device"] and config["trained_on"]["drafter"] == DRAFTER
    assert (folder / "reliability.png").is_file()


def test_killed_records_go_on_where_they_stopped(made, tmp_path, monkeypatch):
    _, _, records, _ = made
    args = [*records[:-1], str(tmp_path / "records")]
    real, walked = records_store.walk_texts, []

    def until(n):
        def walk(*args):
            if len(walked) == n:
                raise KeyboardInterrupt
            walked.append(1)
            return real(*args)

        return walk

    monkeypatch.setattr(records_store, "walk_texts", until(1))
    with pytest.raises(SystemExit, match="130"):
        records_cli.main(args)
    kept = (tmp_path / "records" / "shard-00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(records_store, "walk_texts", until(99))
    assert records_cli.main(args) == 0
    assert len(walked) == 3, "three shards of two prompts, one of them made before"
    assert (tmp_path / "records" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    whole, again = (read_records(Store(p)) for p in (made[0] / "records", tmp_path / "records"))
    for name, column in vars(whole).items():
        assert torch.equal(column.nan_to_num(-1), getattr(again, name).nan_to_num(-1)), name


def test_bad_requests_are_refused(made, tmp_path, capsys):
    folder, _, records, train = made

    def said(main, args):
        with pytest.raises(SystemExit):
            main(args)
        return capsys.readouterr().err

    def put(args, key, value):
        return [value if args[i - 1] == key else arg for i, arg in enumerate(args)]

    other = put(records, "--drafter", "head:2x2")
    assert "records" in said(records_cli.main, other), "another drafter in the same folder"
    for drafter, why in (
        ("plain", "not one drafter of ours"), ("head:2x3,suffix:4x1", "not one drafter of ours"),
        ("head:2x3:lookahead=static(depth=1)", "leave out lookahead"),
        ("skip:2", "reads the target's cache"),
    ):  # fmt: skip
        args = put(put(records, "--drafter", drafter), "--out", str(tmp_path / "x"))
        assert why in said(records_cli.main, args)
    args = put(put(records, "--n_prompts", "999999"), "--out", str(tmp_path / "x"))
    assert "rows, not n_prompts" in said(records_cli.main, args)
    assert "validate on fewer" in said(disco_cli.main, put(train, "--validation_prompts", "5"))
    costs = json.loads(Path(train[3]).read_text())
    costs["provenance"]["target"]["fingerprint"] = "0" * 16
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    args = put(train, "--costs", str(tmp_path / "costs.json"))
    assert "measured with another target" in said(disco_cli.main, args)
    broken = tmp_path / "records"
    shutil.copytree(folder / "records", broken)
    shard = broken / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # among the features, by far the largest
    shard.write_bytes(bytes(data))
    assert "shard-00000" in said(disco_cli.main, put(train, "--records", str(broken)))


def test_two_processes_make_the_classifier_of_one(made, tmp_path):
    folder, _, _, train = made
    again = [*train, "--out", str(tmp_path / "disco")]
    both = ranks(2, "train/disco.py", again, tmp_path / "logs")
    assert [p.wait(200) for p in both] == [0, 0]
    one, two = (path / "model.safetensors" for path in (folder / "head/disco", tmp_path / "disco"))
    assert one.read_bytes() == two.read_bytes()
    said = [(tmp_path / f"logs/rank-{i}.txt").read_text() for i in (0, 1)]
    assert ["use it with" in text for text in said] == [True, False]
