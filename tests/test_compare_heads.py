"""Heads that are trained alike and measured together."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from redrafter.cli import answers, compare_heads, prepare, states
from redrafter.cli.args import parse
from redrafter.config import KINDS, CompareConfig, HeadConfig, TargetConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.evaluation import pictures
from redrafter.planning.meta import MetaTarget
from redrafter.studies import measure, report
from redrafter.studies import train as trainings
from redrafter.studies.size import SIZE_OPTIONS, n_parameters, nearest_width, sized
from redrafter.studies.train import Run, best_rate, chosen

ROWS = {
    "hydra": {"head.kind": "hydra", "head.output": "target", "seeds": 1},
    "recurrent": {"head.output": "target", "parameters": "hydra"},
}


@pytest.fixture(scope="module")
def base(tiny_target, tmp_path_factory):
    """(YAML of a short training, a store of states)."""
    folder = tmp_path_factory.mktemp("compare")
    target, made = f"--target.path={tiny_target}", {n: folder / n for n in "pas"}
    source = [f"--source.path={tiny_target / 'prompts_train.jsonl'}", "--source.n_rows=8"]
    source += ["--source.format=text", "--keep=prompts", f"--output_dir={made['p']}"]
    assert not prepare.main([target, *source])
    given = [f"--prompts={made['p']}", "--answers.max_new_tokens=16"]
    assert not answers.main([target, *given, f"--output_dir={made['a']}"])
    assert not states.main([target, f"--rows={made['a']}", f"--output_dir={made['s']}"])
    yaml = folder / "base.yaml"
    optim = "optim: {steps: 6, batch_positions: 16, depth: 2, warmup_steps: 1}"
    yaml.write_text(f"{optim}\nsave_steps: 3\n")
    return yaml, made["s"]


@pytest.fixture
def argv(base, tiny_target, tmp_path):
    def make(out="out", rows=ROWS, **changes):
        given = {
            "target.path": tiny_target, "prompts": tiny_target / "prompts_train.jsonl",
            "base": base[0], "stores": json.dumps([str(base[1])]), "rows": json.dumps(rows),
            "learning_rates": "[0.01, 0.02]", "temperatures": "[1]", "seeds": "[0, 1]",
            "validation_prompts": 2,
            "n_prompts": 3, "max_new_tokens": 8, "text_prompt_tokens": 4,
            "tree": '{"width": 2, "depth": 2}',
            "methods": '["plain", "bigram:2x2", "replay:2x2"]', "bigram_prompts": 3,
            "cost_rounds": 1, "threads": 1, "out": tmp_path / out, **changes,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in given.items()]

    return make


def without_times(found):
    """Of rows.json, what no clock has a part in."""
    kept = {}
    for name, row in found["rows"].items():
        timed = ("speedup_plain", "bound", "level_s", "once_s")
        measured = {
            t: {key: value for key, value in m.items() if key not in timed}
            for t, m in row["measured"].items()
        }
        kept[name] = {**row, "measured": measured}
    return kept


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped(argv, tmp_path, monkeypatch, capsys):
    assert compare_heads.main(argv("whole")) == 0
    whole = json.loads((tmp_path / "whole/rows.json").read_text())
    shown = (tmp_path / "whole/table.md").read_text()
    assert all(f"`{name}`" in shown for name in [*ROWS, "plain", "bigram:2x2", "replay:2x2"])
    assert (tmp_path / "whole/tokens.png").stat().st_size > 0

    monkeypatch.setattr(pictures, "save_figure", lambda *a: [])  # seconds, and seen above
    began, real = [], trainings.Training

    class Killed(real):
        def _save(self):
            super()._save()
            if len(began) == 4 and self.done == 3:
                raise KeyboardInterrupt

    def counted(cls):
        def make(config):
            began.append(config.output_dir)
            return cls(config)

        return make

    monkeypatch.setattr(trainings, "Training", counted(Killed))
    with pytest.raises(SystemExit):
        compare_heads.main(argv("cut"))
    assert len(began) == 4  # the other learning rate of the second row, halfway through
    monkeypatch.setattr(trainings, "Training", counted(real))
    assert compare_heads.main(argv("cut")) == 0
    assert began[3] == began[4] and len(began[4:]) == 2
    assert not set(began[:3]) & set(began[4:]), "what was finished is not trained again"
    cut = json.loads((tmp_path / "cut/rows.json").read_text())
    assert without_times(cut) == without_times(whole)

    # All is there: nothing is trained, nothing measured.
    began.clear()
    monkeypatch.setattr("redrafter.studies.measure.measure_heads", None)
    assert compare_heads.main(argv("cut")) == 0 and not began
    with pytest.raises(SystemExit):
        compare_heads.main(argv("cut", rows={"hydra": {"optim.steps": 5}}))
    assert "was trained with another" in capsys.readouterr().err

    check_figures(whole)


def check_figures(found):
    rows = found["rows"]
    assert len(rows["hydra"]["validation"]) == 2 and len(rows["recurrent"]["validation"]) == 3
    one, two = (row["parameters"] for row in rows.values())
    assert abs(one - two) <= 0.05 * one and rows["recurrent"]["options"]["exit_dim"] is not None
    ceiling = found["beside"]["replay:2x2"]["1"]["tokens_per_step"][0]
    for row in rows.values():
        m = row["measured"]["1"]
        assert m["equal_share"] == 1.0  # no head changes a token
        assert 1.0 <= m["tokens_per_step"][0] <= ceiling
        assert len(m["per_seed"]) == len(row["seeds"]) and len(m["acceptance"]) == 2
        assert min(m["per_seed"]) <= m["tokens_per_step"][0] <= max(m["per_seed"])
    assert rows["hydra"]["measured"]["1"]["over"]["hydra"] == [1.0, 1.0, 1.0]
    (alone,) = rows["hydra"]["measured"]["1"]["per_seed"]
    assert rows["hydra"]["measured"]["1"]["tokens_per_step"][0] == pytest.approx(alone)


def test_a_learning_rate_is_chosen_by_validation_alone():
    def run(lr, seed, validation):
        return Run(lr, seed, Path(), validation)

    searched = [run(1e-3, 0, 1.4), run(2e-3, 0, 1.7), run(4e-3, 0, 1.7)]
    assert best_rate(searched) == 2e-3
    # Another seed's luck chooses nothing; its figure may even be the worst.
    every = [*searched, run(2e-3, 1, 1.0)]
    assert [(r.lr, r.seed) for r in chosen(every)] == [(2e-3, 0), (2e-3, 1)]


def test_validation_and_measured_prompts_are_not_the_same(argv, tiny_target, monkeypatch, tmp_path):
    """The last rows of the file are validation's, those before them are measured."""
    seen, real = {}, trainings.Training

    class Seen(real):
        def __init__(self, config):
            super().__init__(config)
            seen["validation"] = self.measure.source_rows

    monkeypatch.setattr(trainings, "Training", Seen)
    rows = {"only": {"optim.steps": 1}}
    assert compare_heads.main(argv(rows=rows, seeds="[0]", learning_rates="[0.001]",
                                   methods='["plain"]', temperatures="[0]")) == 0  # fmt: skip
    measured = json.loads((tmp_path / "out/t0.json").read_text())["measured_rows"]
    assert len(seen["validation"]) == 2 and len(measured) == 3
    assert max(measured) + 1 == min(seen["validation"])


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A target of which only config.json is there: H = 288, V = 4096."""
    folder = tmp_path_factory.mktemp("shape")
    sizes = dict(hidden_size=288, num_attention_heads=4, num_hidden_layers=1, vocab_size=4096)
    LlamaConfig(**sizes).save_pretrained(folder)
    return MetaTarget(TargetConfig(str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_brought_to_one_size(kind, shape, tmp_path):
    given = [f"--target.path={tmp_path}", f"--output_dir={tmp_path}", f"--head.kind={kind}"]
    given += ["--optim.depth=4"] + ["--head.output=target"] * (kind != "mlp_speculator")
    config = parse(TrainConfig, given, "test")
    # What Hydra's four heads of one block have; Medusa's coarse steps come near it.
    hydra = HeadConfig(kind="hydra", output="target")
    wanted = n_parameters(hydra, 4, shape)
    h = shape.hidden_size
    assert wanted == sum(2 * ((k + 1) * h * h + h) for k in range(1, 5))
    if kind == "mlp_speculator":  # its own tables: never so small as a head without
        wanted *= 10
    head = sized(config, wanted, shape, "row").head
    found = n_parameters(head, 4, shape)
    assert abs(found - wanted) <= 0.05 * wanted
    option = SIZE_OPTIONS[kind]
    for other in {max(1, getattr(head, option) - 1), getattr(head, option) + 1}:
        changed = replace(head, **{option: other})
        there = n_parameters(changed, 4, shape)
        assert abs(there - wanted) >= abs(found - wanted), "a nearer width was passed over"


def test_a_size_that_a_kind_cannot_have_is_refused(shape, tmp_path):
    given = [f"--target.path={tmp_path}", f"--output_dir={tmp_path}", "--head.kind=medusa"]
    config = parse(TrainConfig, [*given, "--head.output=target"], "test")
    with pytest.raises(InputError, match=r"rows: mine: no head\.num_draft_layers gives a medusa"):
        sized(config, 1000, shape, "mine")


def test_nearest_width_is_found_from_both_sides():
    assert nearest_width(lambda w: 10 * w, 1) == 1
    assert [nearest_width(lambda w: 10 * w, n) for n in (14, 16, 70, 1004)] == [1, 2, 7, 100]


def test_refusals_name_the_row(argv, capsys, tmp_path):
    for rows, said in (
        ({"a": {"head.kind": "medusa", "head.cell": "gru"}}, "row a"),
        ({"a": {"parameters": "b"}}, "parameters 'b' is no row before it"),
        ({"a": {"seeds": 3}}, "rows: a: seeds 3 must lie in 1..2"),
        ({"a b": {}}, "rows: 'a b' must be letters"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare_heads.main(argv("refused", rows=rows))
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.usefixtures("files_unseen")
def test_configurations_are_read_as_they_are():
    files = sorted((Path(__file__).parent.parent / "configs/ablation").glob("*.yaml"))
    assert files
    for path in files:
        first = path.read_text().splitlines()[0]
        assert first == f"# python eval/compare_heads.py --config configs/ablation/{path.name}"
        config = parse(CompareConfig, [f"--config={path}"], "test")
        for name in config.rows:
            compare_heads.training_of(config, name)


@pytest.mark.parametrize("name", ["ablation/base/short", "configs/ablation/base/short.yaml"])
def test_a_base_that_comes_with_the_library_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a file that `redrafter configs copy` wrote may lie
    given = dict(target=TargetConfig(path="x"), prompts="x", rows={"a": {}}, stores=["x"], out="x")
    assert compare_heads.training_of(CompareConfig(base=name, **given), "a").optim.depth == 4
    with pytest.raises(InputError, match="base: no file 'ablation/base/shorter'"):
        compare_heads.training_of(CompareConfig(base="ablation/base/shorter", **given), "a")
    Path("ablation/base").mkdir(parents=True)
    Path("ablation/base/short").write_text("optim: {depth: 3}")  # a file of one's own comes first
    found = compare_heads.training_of(CompareConfig(base="ablation/base/short", **given), "a")
    assert found.optim.depth == 3


def test_every_comparison_counts():
    """a with b, c with both, at 2 temperatures: not rows alone, and no pair twice."""
    measured = {"per_seed": [1.5], "tokens_per_step": (1.5, 1.4, 1.6), "speedup_plain": None}
    row = {
        "kind": "recurrent", "parameters": 1, "bytes_per_level": 1, "bytes_per_step": 0,
        "steps": 1, "seeds": [0],
        "learning_rate": 1e-3, "validation": [{"lr": 1e-3, "seed": 0, "tokens_per_step": 1.5}],
        "measured": {"0": measured, "1": measured},
    }  # fmt: skip
    counts = {"0": 3, "1": 3}
    found = {"rows": {"a": row, "b": row, "c": row}, "beside": {}, "n_prompts": counts,
             "warnings": {"0": [], "1": []}, "against": ["a", "b"]}  # fmt: skip
    facts = {"device": "cpu", "threads": 1, "target": {"dtype": "float32"}}
    said = report.markdown("t", found, facts)
    assert "With 6 comparisons (each row with a and with b, at 2 temperatures)" in said
    assert "0.3 would" in said and "| / a | / b |" in said


def test_a_row_may_try_rates_of_its_own(shape, tmp_path):
    rows = {"a": {"seeds": 1}, "b": {"learning_rates": [1e-2]}}
    config = CompareConfig(target=TargetConfig(path=str(tmp_path)), prompts="x", rows=rows,
                           stores=["x"], out="x", against=("b",))  # fmt: skip
    given = {name: compare_heads.training_of(config, name) for name in rows}
    found = trainings.rows_of(config, given, shape)
    assert [row.learning_rates for row in found] == [config.learning_rates, (1e-2,)]
    with pytest.raises(ValueError, match=r"against: c is no row \(a, b\)"):
        replace(config, against=("c",))


def test_seeds_and_rates_differ():
    rows = {"a": {}}
    for name, values in (("seeds", (0, 0)), ("learning_rates", (1e-3, 1.0000001e-3))):
        with pytest.raises(ValueError, match=rf"{name}: .* are not all different"):
            CompareConfig(
                target=TargetConfig(path="x"), prompts="x", rows=rows, stores=["x"], out="x",
                **{name: values},
            )  # fmt: skip


def test_figures_of_other_heads_are_refused(tmp_path, monkeypatch):
    config = SimpleNamespace(temperatures=(0.0,), out=str(tmp_path))
    monkeypatch.setattr(measure, "read_result", lambda *args: {"heads": {"a": "before"}})
    target, head = (SimpleNamespace(fingerprint=lambda: "now") for _ in range(2))
    with pytest.raises(InputError, match=r"t0\.json was measured of other heads"):
        measure.measure_all(config, {"a": head}, target)
