"""The best fixed width and depth, predicted: steps as in real decoding, seconds as measured."""

import json

import pytest
import torch
from models import prompts, settings, tiny
from test_draft_model import close_draft
from test_head_drafter import make_head
from test_table import launched_by

from redrafter.cli import costs as costs_cli
from redrafter.cli import static as static_cli
from redrafter.cli.args import parse
from redrafter.config import StaticConfig, TreeConfig
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.model import DraftModel
from redrafter.drafters.profile import StepCosts
from redrafter.evaluation.static import (
    Clocked,
    accepted_depths,
    best,
    compare,
    n_steps,
    predict,
    show,
    static_map,
)
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target

DEPTH = 5
MODES = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0}}


def model(target, depth, width):
    return DraftModel(close_draft(target, 0.05), target, depth, width)


def head(target, depth, width):
    return HeadDrafter(make_head(target, "own"), target, TreeConfig(width, depth))


# ------------------------------------------------------------------------------ acceptance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("make", "width"), [(model, 1), (model, 3), (head, 2)])
def test_simulated_steps_are_those_of_decoding(make, width, mode):
    target, rows = tiny("llama"), prompts((9, 3, 14, 8, 5, 11), seed=1)
    config, seeds = settings(eos_token_id=[5], **MODES[mode]), list(range(len(rows)))
    deep = make(target, DEPTH, width)
    accepted = accepted_depths(target, deep, rows, config, seeds, batch_size=4)
    lengths = [len(text) for text in plain(target, rows, config, seeds=seeds).tokens]
    assert [len(text) for text in accepted] == [n - 1 for n in lengths] and min(lengths) == 2
    if make is model:
        assert {a for text in accepted for a in text} == set(range(DEPTH + 1))
    for depth in (1, 3, DEPTH):
        drafter = make(target, depth, width)
        stats = speculative(target, rows, config, seeds=seeds, drafter=drafter).stats
        assert [n_steps(text, depth) for text in accepted] == stats.steps


def test_steps_of_a_text():
    assert [n_steps([2, 0, 0, 1, 3], k) for k in (0, 1, 2, 3)] == [5, 3, 2, 2]
    assert n_steps([4, 3, 2, 1], 8) == 1 and n_steps([], 3) == 0


# ------------------------------------------------------------------------------ prediction

# Width 1 accepts one level at every other position, width 2 two at every third.
ACCEPTED = {1: [[1, 0] * 6, [1, 0] * 3], 2: [[2, 1, 0] * 4, [2, 1, 0] * 2]}


def costs_of(level_s: float, node_s: float) -> dict[int, StepCosts]:
    verify = tuple((n, 1.0 + node_s * (n - 1)) for n in (1, 3, 5))
    return {w: StepCosts(0.0, (level_s,) * 2, verify, ((1, 0.1), (5, 0.5)), 1.05) for w in (1, 2)}


def test_tokens_per_second_are_tokens_over_seconds():
    cells = {c.name: c for c in predict(ACCEPTED, costs_of(0.2, 0.05), 2)}
    assert list(cells) == ["plain", "1x1", "1x2", "2x1", "2x2"]
    assert [c.nodes for c in cells.values()] == [1, 2, 3, 3, 5]
    assert cells["plain"].tokens_per_s == pytest.approx(1 / 1.05)
    assert cells["1x1"].tokens_per_step == cells["1x2"].tokens_per_step == 2.0
    assert cells["2x1"].tokens_per_step == 1.5 and cells["2x2"].tokens_per_step == 3.0
    assert cells["1x1"].step_s == pytest.approx(0.2 + 1.05 + 0.2)
    assert cells["2x2"].step_s == pytest.approx(0.4 + 1.2 + 0.5)
    for cell in cells.values():
        assert cell.tokens_per_s == pytest.approx(cell.tokens_per_step / cell.step_s)
    assert best(list(cells.values())).name == "2x2"
    assert "predicted best: head:2x2 (W = 2, K = 2, N = 5), 1.50 x" in show(
        [*cells.values()], "head"
    )


def test_where_drafting_does_not_pay_it_is_said():
    cells = predict(ACCEPTED, costs_of(5.0, 1.0), 2)
    assert all(c.tokens_per_s < cells[0].tokens_per_s for c in cells[1:])
    shown = show(cells, "model")
    assert "do not speculate here: the best that drafts, model:1x1" in shown
    assert "predicted best" not in shown


# Prompts of 10 tokens; 1x1 is as fast as 2x2 on the first prompt, half as fast on the second.
CLOCKED = {
    "plain": Clocked([10, 10], [10.0, 10.0]),
    "1x1": Clocked([10, 10], [5.0, 10.0]),
    "1x2": Clocked([10, 10], [9.0, 9.0]),
    "2x1": Clocked([10, 10], [8.0, 8.0]),
    "2x2": Clocked([10, 10], [5.0, 5.0]),
}


def test_prediction_beside_the_clock():
    rates = {name: c.rate for name, c in CLOCKED.items()}
    cells = predict(ACCEPTED, costs_of(0.9, 0.5), 2, rates)  # levels so dear that one is best
    assert best(cells).name == "1x1"
    found = compare(cells, CLOCKED)
    assert (found["predicted_best"], found["measured_best"]) == ("1x1", "2x2")
    value, low, high = found["loss"]
    assert value == pytest.approx(1 - 10 / 15) and (low, high) == (0.0, pytest.approx(0.5))
    errors = sorted(c.tokens_per_s / c.measured - 1 for c in cells[1:])
    assert [found["error"][k] for k in ("low", "high")] == [errors[0], errors[-1]]
    assert found["speculation_pays"]
    shown = show(cells, "head", found)
    assert "measured best: head:2x2; the predicted best is slower by 33.3 [0.0, 50.0] %" in shown
    slow = {**rates, "plain": 9.0}
    found = compare(predict(ACCEPTED, costs_of(0.9, 0.5), 2, slow), CLOCKED)
    assert not found["speculation_pays"]
    assert "no configuration beats plain" in show(cells, "head", found)


def test_map():
    pytest.importorskip("matplotlib")
    rates = {name: c.rate for name, c in CLOCKED.items()}
    cells = predict(ACCEPTED, costs_of(0.9, 0.5), 2, rates)
    for some, n in ((cells, 2), (predict(ACCEPTED, costs_of(0.9, 0.5), 2), 1)):
        panels = static_map(some, "a title").axes[:-1]
        assert [axes.get_title() for axes in panels] == ["predicted", "measured"][:n]
    figure = static_map(cells, "a title")
    told = [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]]
    plain_rate = cells[0].tokens_per_s
    assert told[0] == [f"{c.tokens_per_s / plain_rate:.2f}" for c in cells[1:]]
    assert told[1] == ["1.33", "1.11", "1.25", "2.00"]
    for axes, (x, y) in zip(figure.axes[:2], ((0, 0), (1, 1)), strict=True):
        frame = axes.patches[0]
        assert frame.get_xy() == (x - 0.5, y - 0.5)
        bold = [text.get_position() for text in axes.texts if text.get_weight() == "bold"]
        assert bold == [(x, y)]


# --------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folders(tiny_target, tmp_path_factory):
    """Options of the tiny target, of a head and of a draft model, and a folder."""
    folder = tmp_path_factory.mktemp("static")
    target = load_target(str(tiny_target))
    torch.manual_seed(0)
    RecurrentHead.for_target(target).save_pretrained(folder / "head")
    common = ["--target.path", str(tiny_target),
              "--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--n_prompts", "2",
              "--max_new_tokens", "12", "--widths", "1,2", "--depth", "2",
              "--cost_rounds", "2"]  # fmt: skip
    return common, folder, tiny_target


def test_command_measures_beside_what_it_predicts(folders, capsys):
    pytest.importorskip("matplotlib")
    common, folder, tiny_target = folders
    more = ["--draft", str(tiny_target), "--measure", "true", "--plot", str(folder / "map"),
            "--out", str(folder / "out.json")]  # fmt: skip
    assert static_cli.main([*common, *more]) == 0
    shown = capsys.readouterr().out
    assert "model:" in shown and "measured best: model:" in shown
    body = json.loads((folder / "out.json").read_text())
    recorded, timed = body["recorded_rows"], body["measured_rows"]
    assert len(recorded) == len(timed) == 2 and recorded[-1] < timed[0]
    sizes = ["plain", "1x1", "1x2", "2x1", "2x2"]
    assert list(body["timings"]) == sizes and len(body["cells"]) == 5
    tokens = [body["timings"][size]["tokens"] for size in sizes]
    assert all(t == tokens[0] for t in tokens), "the texts are plain decoding's"
    for cell in body["cells"][1:]:  # a draft model that is the target is always right
        assert cell["tokens_per_step"] > 0.6 * (cell["depth"] + 1)
        assert cell["tokens_per_s"] == pytest.approx(cell["tokens_per_step"] / cell["step_s"])
    for width, costs in body["costs"].items():
        assert [n for n, _ in costs["verify"]] == [1, 2, 3, 5]
        assert [n for n, _ in costs["loop"]] == [1, 1 + 2 * int(width)]
        assert costs["plain"] > 0
    assert (folder / "map.png").is_file() and (folder / "map.svg").is_file()
    assert body["provenance"]["config"]["widths"] == "1,2"


def test_command_takes_a_profile_or_a_file(folders, capsys):
    common, folder, tiny_target = folders
    more = ["--head", str(folder / "head")]
    with pytest.raises(SystemExit):
        static_cli.main([*common, *more, "--costs", "profile"])
    assert "no profile of this device" in capsys.readouterr().err
    assert costs_cli.main([
        "--target.path", str(tiny_target), *more, "--drafters", "head:1x3,head:2x2", "--contexts",
        "16", "--batch_sizes", "1", "--new_tokens", "1,2", "--rounds", "2", "--profile", "true",
        "--out", str(folder / "costs.json"),
    ]) == 0  # fmt: skip
    for costs in ("profile", str(folder / "costs.json")):
        out = folder / "other.json"
        assert static_cli.main([*common, *more, "--costs", costs, "--out", str(out)]) == 0
        shown, body = capsys.readouterr().out, json.loads(out.read_text())
        assert "head:" in shown and body["comparison"] is None
        assert body["measured_rows"] is None and len(body["recorded_rows"]) == 2
        known = json.loads((folder / "costs.json").read_text())
        q1 = {e["n"]: e["cost"]["q1_s"] for e in known["target"]}
        assert dict(body["costs"]["2"]["verify"])[5] == q1[5]
    with pytest.raises(SystemExit):
        static_cli.main([*common, *more, "--costs", "profile", "--widths", "4"])
    assert "0 measured drafters fit 'head:4x2'" in capsys.readouterr().err


@pytest.mark.parametrize("path", launched_by("eval/static.py"), ids=str)
@pytest.mark.usefixtures("files_unseen")
def test_configurations_are_read_as_they_are(path):
    config = parse(StaticConfig, [f"--config={path}"], "eval/static.py")
    assert (config.head is None) != (config.draft is None)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "head, draft: give one of them"),
        (["--head", "x", "--draft", "y"], "head, draft: give one of them"),
        (["--head", "x", "--widths", "0"], "widths: 0 is below 1"),
        (["--head", "x", "--depth", "0"], "depth: 0 must be at least 1"),
    ],
)
def test_bad_options(args, said, capsys):
    with pytest.raises(SystemExit):
        static_cli.main(["--target.path", "nowhere", "--prompts", "x", *args])
    assert said in capsys.readouterr().err
