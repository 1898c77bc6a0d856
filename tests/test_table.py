"""eval/table.py, eval/acceptance.py and eval/regret.py, end to end on a tiny target."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import prompts, settings, tiny
from test_multi import RATIO, model

from redrafter.cli import acceptance, prepare, probe_bigrams, regret, speed, table
from redrafter.cli.args import parse
from redrafter.config import TableConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.decode.speculative import speculative
from redrafter.drafters.multi import MultiCandidate
from redrafter.evaluation import pictures as drawings
from redrafter.evaluation import prompt_sets
from redrafter.evaluation.acceptance import Counter, Watcher
from redrafter.evaluation.methods import check_resources, parse_methods
from redrafter.evaluation.prompt_sets import largest
from redrafter.evaluation.prompt_sets import settings as sets_of
from redrafter.evaluation.regret import regret as regret_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, words in (("a", "once there was a cat"), ("b", "two and two are four")):
        lines = [json.dumps({"text": f"{words} {i} {words}"}) for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_table_is_made_once(tiny_target, rows, tmp_path, capsys, monkeypatch):
    args = [
        f"--target.path={tiny_target}", f"--out={tmp_path / 'out'}", "--n_prompts=2",
        f"--sets={json.dumps({'a': str(rows / 'a.jsonl'), 'b': str(rows / 'b.jsonl')})}",
        '--methods=["plain", "suffix:4x1", "mix(suffix:4x1,lookup:4x2):nodes=5"]',
        "--max_new_tokens=6", "--cost_rounds=1", "--text_prompt_tokens=4",
    ]  # fmt: skip
    assert table.main(args) == 0
    out = tmp_path / "out"
    names = {"config.yaml", "table.md", "a-t0.json", "a-t1.json", "b-t0.json", "b-t1.json"}
    pictures = {f"{p}.{s}" for p in ("speedup", "tokens", "acceptance") for s in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == names | pictures
    shown = (out / "table.md").read_text()
    assert shown.count("\n## ") == 3
    assert shown.count("`suffix:4x1`") == 2 * 4  # in our figures, and in the engines' counting
    body = json.loads((out / "a-t1.json").read_text())
    counts = body["per_prompt"]["suffix:4x1"]
    assert len(counts["tokens"]) == len(counts["steps"]) == len(counts["seconds"]) == 2
    assert body["temperature"] == 1 and body["exact"]
    assert sum(counts["steps"]) == body["methods"]["suffix:4x1"]["steps"]
    # Again: nothing is measured, the table is the same.
    monkeypatch.setattr(prompt_sets, "measure", lambda *a: pytest.fail("measured twice"))
    monkeypatch.setattr(drawings, "save_figure", lambda *a: [])  # seconds, and seen above
    assert table.main(args) == 0
    assert (out / "table.md").read_text() == shown
    with pytest.raises(SystemExit):
        table.main([*args, "--max_new_tokens=7"])
    assert "another max_new_tokens" in capsys.readouterr().err
    (out / "a-t0.json").write_text("{")
    with pytest.raises(SystemExit):
        table.main(args)
    assert "a-t0.json is no result" in capsys.readouterr().err


def test_acceptance_of_all_rules(tiny_target, rows, tmp_path, capsys):
    args = [
        f"--target.path={tiny_target}", f"--draft={tiny_target}", "--n_prompts=2",
        f"--prompts={rows / 'a.jsonl'}", f"--out={tmp_path / 'x.json'}", "--max_new_tokens=8",
        "--text_prompt_tokens=4",
        "--methods=multi:children=[1,1]:how=iid:rule=ratio,multi:children=[2]:how=seeded,lookup,"
        "multi:children=[1,1]:how=iid:rule=ratio:lookahead=static(depth=1),"
        "mix(suffix:4x1,lookup:4x2):nodes=5",
    ]  # fmt: skip
    assert acceptance.main(args) == 0
    shown = capsys.readouterr().out
    assert "1 - TV" in shown and "lookup" in shown
    body = json.loads((tmp_path / "x.json").read_text())["methods"]
    first, seeded, lookup, shallow, mixed = body.values()
    assert 1 <= mixed["nodes"] <= 5
    assert shallow["nodes"] == 2 < first["nodes"] == 3
    # The target drafts for itself: every draw is accepted.
    assert first["accepted"][0] == 1.0
    assert first["overlap"][0] == pytest.approx(1.0, abs=1e-4)
    assert first["optimum"][0] == pytest.approx(1.0, abs=1e-4)
    assert seeded["accepted"][0] == 1.0 and seeded["overlap"] is None
    assert 0 <= lookup["accepted"][0] < 1
    with pytest.raises(SystemExit):
        acceptance.main([*args, "--methods=plain"])
    assert "'plain' drafts nothing" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["speculative sampling", "with replacement", "guesses"])
def test_what_was_tested_is_counted(case):
    """Against the loop's own counts, and the oracles against a forward over the text."""
    rule, how, children, _ = RATIO[case]
    target, rows = tiny("llama"), prompts()
    config = settings(do_sample=True, temperature=1.5, eos_token_id=-1)
    overlaps = []

    class Seen(Watcher):
        def _oracle(self, truth, row, node):
            before = self.overlap
            super()._oracle(truth, row, node)
            overlaps.append(self.overlap - before)

    draft = MultiCandidate([model(target, children=children)], children, how)
    watcher = Seen(draft, 1.5)
    counter = Counter()
    got = speculative(target, rows[:1], config, drafter=watcher, rule=rule, lookahead=counter)
    stats = got.stats
    assert counter.accepted == sum(stats.accepted_at)  # no EOS cut anything here
    rejected = counter.tested - counter.accepted
    assert 0 < rejected <= sum(stats.steps)
    # The oracles: all steps but the one that ended the text.
    left_out = counter.tested - watcher.tested
    assert 0 <= left_out <= len(children) and len(overlaps) == watcher.tested
    assert watcher.drawn == (how == "iid")
    if how == "iid":
        ids = torch.tensor([rows[0] + got.tokens[0]])
        p, q = (
            (m.project(m.states(ids)) / 1.5).softmax(-1)[0]
            for m in (target, draft.frontiers[0].draft)
        )
        every = torch.minimum(p, q).sum(-1)
        for overlap in overlaps[: sum(stats.steps) // 2]:  # each is that of some prefix of the text
            assert float((every - overlap).abs().min()) < 1e-9
        assert watcher.optimum >= watcher.overlap - 1e-9


def test_regret_of_made_up_times():
    seconds = {"a": [1, 1, 3, 3], "b": [2, 2, 1, 1.5], "s": [1, 1.5, 2, 1]}
    body = regret_of(seconds, ["a", "b"], [2, 2])
    assert body["best_arm"] == "b"
    assert [part["best_arm"] for part in body["parts"]] == ["a", "b"]
    assert body["best_per_part_s"] == pytest.approx(4.5)
    assert body["methods"]["s"]["regret_s"] == pytest.approx([-1, -1.5, -0.5, -1])
    assert body["methods"]["s"]["regret_share"] == pytest.approx(-1 / 6.5)
    assert body["methods"]["b"]["regret_s"] == [0, 0, 0, 0]


def test_regret_end_to_end(tiny_target, rows, tmp_path, capsys):
    args = [
        f"--target.path={tiny_target}", "--n_prompts=2", "--max_new_tokens=6",
        f"--stream={json.dumps([str(rows / 'a.jsonl'), str(rows / 'b.jsonl')])}",
        '--arms=["suffix:4x1", "lookup:4x2"]', '--policies=["ucb:exploration=0.5", "hedge"]',
        "--text_prompt_tokens=4", f"--out={tmp_path / 'r.json'}", "--temperature=1",
    ]  # fmt: skip
    assert regret.main(args) == 0
    assert "best fixed arm in hindsight" in capsys.readouterr().out
    body = json.loads((tmp_path / "r.json").read_text())
    assert set(body["equal"].values()) == {4} and len(body["methods"]) == 4
    assert {len(m["regret_s"]) for m in body["methods"].values()} == {4}
    assert [part["prompts"] for part in body["parts"]] == [2, 2]
    assert (tmp_path / "r.png").stat().st_size > 0 and (tmp_path / "r.svg").exists()


def test_what_drafters_are_made_from_is_loaded(tiny_target, rows, tmp_path, monkeypatch, capsys):
    """A reference store, a probed table and a draft model, one of them by way of the Hub; prices
    measured on the spot."""
    import huggingface_hub

    store, hub = tmp_path / "texts", tmp_path / "hub"
    assert prepare.main([
        f"--target.path={tiny_target}", f"--source.path={rows / 'a.jsonl'}", "--keep=texts",
        f"--output_dir={store}",
    ]) == 0  # fmt: skip
    probe = [f"--target.path={tiny_target}", f"--out={hub / 'probed.safetensors'}"]
    assert probe_bigrams.main(probe) == 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(hub))
    names = ["plain", "suffix:4x1:reference=true", "ngrammys:3x2", "model:2x3:budget=true"]
    args = [
        f"--target.path={tiny_target}", f"--prompts={rows / 'a.jsonl'}", "--n_prompts=2",
        "--max_new_tokens=8", "--text_prompt_tokens=4", "--cost_rounds=1",
        f"--methods={','.join(names)}", f"--draft={tiny_target}", f"--out={tmp_path / 's.json'}",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        speed.main(args)
    assert "'suffix:4x1:reference=true' needs --reference" in capsys.readouterr().err
    args += [f"--reference={store}", "--probed=me/tables/probed.safetensors"]
    assert speed.main(args) == 0
    figures = json.loads((tmp_path / "s.json").read_text())["methods"]
    assert list(figures) == names
    assert all(m["equal_rows"] == 2 for m in figures.values())
    assert figures["model:2x3:budget=true"]["tokens_per_step"] > 1.5


def launched_by(launcher):
    """The files of configs/eval that their first line gives to a launcher."""
    files = sorted((ROOT / "configs/eval").glob("*.yaml"))
    firsts = {path: path.read_text().splitlines()[0] for path in files}
    assert all(f"--config configs/eval/{path.name}" in line for path, line in firsts.items())
    return [path for path, line in firsts.items() if line.startswith(f"# python {launcher} ")]


def test_every_number_of_samples_is_a_part_of_its_own():
    config = TableConfig(
        target=TargetConfig("x"), sets={"a": "a.jsonl"}, out="out", temperatures=(0.7,),
        samples_per_prompt=(1, 8, 4),
    )  # fmt: skip
    parts = sets_of(config)
    assert {title: (c.samples_per_prompt, Path(c.out).name) for title, c in parts.items()} == {
        "a, T = 0.7": (1, "a-t0.7.json"),  # as it was before there were samples
        "a, N = 8, T = 0.7": (8, "a-n8-t0.7.json"),
        "a, N = 4, T = 0.7": (4, "a-n4-t0.7.json"),
    }
    assert largest(parts).samples_per_prompt == 8
    with pytest.raises(InputError, match="samples_per_prompt to 1"):
        check_resources(["hf-lookup"], largest(parts))
    with pytest.raises(ValueError, match="samples_per_prompt"):
        replace(config, samples_per_prompt=(4, 0))


@pytest.mark.parametrize("path", launched_by("eval/table.py"), ids=str)
@pytest.mark.usefixtures("files_unseen")
def test_configurations_are_read_as_they_are(path):
    config = parse(TableConfig, [f"--config={path}"], "eval/table.py")
    names = parse_methods(",".join(config.methods))
    for part in sets_of(config).values():
        check_resources(names, part)
