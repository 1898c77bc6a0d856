"""Which rows are worth verifying: the map, the advice made of it, and its picture."""

import json
import sys

import pytest
import torch
from models import VOCAB, alone, prompts, settings, tiny

from redrafter.cli import costs as costs_cli
from redrafter.contracts import InputError
from redrafter.costs import Cost, CostTable, TargetCost
from redrafter.drafters.bigram import BigramTable
from redrafter.drafters.ngrammys import NGrammys
from redrafter.evaluation.pictures import save_figure, save_pictures, slowdown_map
from redrafter.evaluation.slowdown import (
    Slowdown,
    SlowdownMeter,
    best,
    parse_slowdown,
    show_advice,
    show_slowdown,
)
from redrafter.evaluation.walk import walk
from redrafter.tables.probed import probe_bigrams


def test_rows_and_lengths_are_read():
    assert parse_slowdown("10,1,5x4,2") == ([1, 5, 10], [2, 4])
    for text in ("1,2", "1x2x3", "ax2", "0x2", "1x"):
        with pytest.raises(InputError, match="slowdown"):
            parse_slowdown(text)


def test_every_shape_is_measured():
    meter = SlowdownMeter(tiny("llama"), [1, 3], [1, 2], [8, 16])
    cells = meter.run(2)
    measured = {(e.batch, e.n, e.context) for e in meter.rows.target}
    assert measured == {(k, n, c) for k in (1, 3) for n in (2, 3) for c in (8, 16)}
    measured = {(e.batch, e.n, e.context) for e in meter.tree.target}
    assert measured == {(1, n, c) for n in (1, 2, 3, 4, 7) for c in (8, 16)}
    assert [(c.context, c.k, c.w) for c in cells] == [
        (context, k, w) for context in (8, 16) for k in (1, 3) for w in (1, 2)
    ]
    one = meter.tree.t(1, 16, 1)
    assert cells[-1].rows == meter.rows.t(3, 16, 3) / one
    assert cells[-1].tree == meter.tree.t(7, 16, 1) / one
    with pytest.raises(InputError, match="contexts"):
        SlowdownMeter(tiny("llama"), [8], [8], [16])


def costs_of(seconds) -> CostTable:
    """{(n, context, batch): seconds}."""
    return CostTable([TargetCost(*key, Cost(s, s, s)) for key, s in seconds.items()], [])


def test_advice_is_tokens_per_step_over_seconds(monkeypatch):
    target, rows = tiny("llama"), prompts()
    want, _ = alone(target, rows, settings())
    table = BigramTable(torch.arange(VOCAB)[:, None].expand(-1, 2) // 2, torch.zeros(VOCAB, 2))
    meter = SlowdownMeter(target, [1, 3], [1, 2], [8])
    # A tree costs 10 + 0.1 per node; rows cost 10 + 5 per row.
    meter.tree = costs_of({(n, 8, 1): 10 + 0.1 * n for n in (1, 2, 3, 4, 7)})
    meter.rows = costs_of({(n, 8, k): 10 + 5.0 * k for n in (2, 3) for k in (1, 3)})
    advice = meter.advise(table, rows, want, 20)
    assert [(a.k, a.w) for a in advice] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for a in advice:
        stats = walk(NGrammys(table, a.k, a.w), rows, want, 20)
        assert a.tokens_per_step == stats.tokens_per_step
        assert a.nodes == stats.nodes_verified / sum(stats.steps) <= 1 + a.k * a.w
        tau, one = a.tokens_per_step, 10.1
        assert a.tree_speedup == pytest.approx(tau * one / (10 + 0.1 * a.nodes + a.draft_s))
        assert a.rows_speedup == pytest.approx(tau * one / (10 + 5 * a.k + a.draft_s))
    by_rows, by_tree = best(advice, 8)
    assert by_rows.k == 1 and by_tree == max(advice, key=lambda a: a.tree_speedup)
    shown = show_advice(advice)
    assert f"recommended at context 8: rows 1x{by_rows.w}" in shown
    assert f"tree {by_tree.k}x{by_tree.w} (" in shown
    with pytest.raises(InputError, match="no answer has a second token"):
        meter.advise(table, rows[:1], [[3]], 20)


CELLS = [
    Slowdown(k, w, c, 1 + 0.1 * k * w, 1 + 0.01 * k * w)
    for c in (64, 256) for k in (1, 10) for w in (2, 4, 8)
]  # fmt: skip


def test_tables_by_context():
    shown = show_slowdown(CELLS).split("\n\n")
    assert len(shown) == 2 and "context 256" in shown[1]
    lines = shown[0].splitlines()
    header = "k rows w=2 tree w=2 rows w=4 tree w=4 rows w=8 tree w=8"
    assert " ".join(lines[1].split()) == header
    assert lines[-1].split() == ["10", "3.00", "1.20", "5.00", "1.40", "9.00", "1.80"]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    figure = slowdown_map(CELLS, "a title")
    panels = figure.axes[:4]
    assert [len(axes.texts) for axes in panels] == [6] * 4
    assert [text.get_text() for text in panels[0].texts][:3] == ["1.20", "1.40", "1.80"]
    assert panels[3].texts[-1].get_text() == "1.80" and "256" in panels[3].get_title()
    png, svg = save_figure(figure, tmp_path / "new" / "map.v1")
    assert (png.name, svg.name) == ("map.v1.png", "map.v1.svg")
    assert png.read_bytes()[:4] == b"\x89PNG" and "<svg" in svg.read_text()
    before = png.read_bytes(), svg.read_bytes()
    assert len(list(png.parent.iterdir())) == 2
    save_figure(slowdown_map(CELLS, "a title"), tmp_path / "new" / "map.v1")
    assert (png.read_bytes(), svg.read_bytes()) == before, "same figure, same bytes"


def test_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install matplotlib"):
        slowdown_map(CELLS, "a title")
    with pytest.raises(SystemExit):  # before the target is looked for
        costs_cli.main(["--target.path", "nowhere", "--slowdown", "1x1", "--plot", "x"])
    assert "pip install matplotlib" in capsys.readouterr().err
    # A picture that nobody asked for is left out instead.
    save_pictures({tmp_path / "map": lambda: slowdown_map(CELLS, "a title")})
    assert capsys.readouterr().out == "no pictures: they need matplotlib (pip install matplotlib)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--plot", "x"], "plot: needs --slowdown"),
        (["--ngrammys", "x", "--prompts", "y"], "ngrammys: needs --slowdown"),
        (["--slowdown", "1x1", "--ngrammys", "x"], "ngrammys and prompts: give both"),
        (["--slowdown", "1x1", "--prompts", "x"], "ngrammys and prompts: give both"),
        (["--slowdown", "1"], "slowdown: '1'"),
    ],
)
def test_options_that_do_not_go_together(args, said, capsys):
    with pytest.raises(SystemExit):
        costs_cli.main(["--target.path", "nowhere", *args])
    assert said in capsys.readouterr().err


def test_command(tiny_target, tmp_path, capsys):
    from redrafter.targets.load import load_target

    pytest.importorskip("matplotlib")
    table, out = tmp_path / "t.safetensors", tmp_path / "costs.json"
    probe_bigrams(load_target(str(tiny_target)), table, width=4)
    args = ["--target.path", str(tiny_target), "--new_tokens", "1", "--batch_sizes", "1",
            "--contexts", "8,16", "--rounds", "2", "--slowdown", "1,2x1,3", "--ngrammys",
            str(table), "--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--n_prompts",
            "3", "--max_new_tokens", "12", "--plot", str(tmp_path / "map"),
            "--out", str(out)]  # fmt: skip
    assert costs_cli.main(args) == 0
    shown = capsys.readouterr().out
    assert "probed without BOS" in shown and shown.count("recommended at context") == 2
    body = json.loads(out.read_text())
    assert len(body["slowdown"]) == len(body["advice"]) == 8
    assert {(a["k"], a["w"]) for a in body["advice"]} == {(1, 1), (1, 3), (2, 1), (2, 3)}
    assert all(1 <= a["tokens_per_step"] <= a["w"] + 1 for a in body["advice"])
    assert (tmp_path / "map.png").is_file() and (tmp_path / "map.svg").is_file()
