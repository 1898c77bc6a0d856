"""What was measured, read back: seconds of a step, and the profiles that travel with a head."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from models import tiny
from test_head_drafter import make_head

from redrafter.cli import costs as costs_cli
from redrafter.config import TreeConfig
from redrafter.contracts import InputError
from redrafter.costs import CostMeter
from redrafter.drafters import profile
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.profile import StepCosts, profile_of, profile_path, step_costs
from redrafter.evaluation.report import write_result
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target


def test_seconds_of_a_step():
    costs = StepCosts(0.5, (1.0, 2.0), ((1, 10.0), (5, 18.0)), ((1, 0.1), (5, 0.5)))
    assert [costs.draft_s(k) for k in (0, 1, 2)] == [0.0, 1.5, 3.5]
    assert [costs.verify_s(n) for n in (1, 2, 4.5, 5)] == [10.0, 12.0, 17.0, 18.0]
    assert costs.loop_s(3) == pytest.approx(0.3) and costs.loop_s(9) == 0.5
    assert costs.step_s(2, 3) == pytest.approx(3.5 + 14.0 + 0.3)
    assert StepCosts(0.5, (1.0,), ((1, 10.0),)).step_s(0, 1) == 10.0
    assert costs.plain_s == 10.0 and replace(costs, plain=11.0).plain_s == 11.0
    with pytest.raises(InputError, match="2 levels were measured, not 3"):
        costs.draft_s(3)
    with pytest.raises(InputError, match=r"1 to 5 new tokens were measured, not of 5\.5"):
        costs.verify_s(5.5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A file of eval/costs.py with two drafters, its content, and the target."""
    target = tiny("llama")
    drafters = {
        f"head:{w}x3": HeadDrafter(make_head(target, "own"), target, TreeConfig(w, 3))
        for w in (1, 2)
    }
    table = CostMeter(target, new_tokens=(1, 3, 7), contexts=(8, 16), batches=(1, 2),
                      drafters=drafters).run(3)  # fmt: skip
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    write_result(str(path), TreeConfig(), target, asdict(table))
    return path, json.loads(path.read_text()), target


@pytest.mark.parametrize(("context", "nearest"), [(1, 8), (11, 8), (13, 16), (99, 16), (None, 16)])
def test_the_nearest_context_counts(measured, context, nearest):
    path, content, target = measured
    draft = next(
        e for e in content["drafters"]
        if (e["name"], e["context"], e["batch"]) == ("head:2x3", nearest, 2)
    )  # fmt: skip
    forward = {
        e["n"]: e["cost"]["q1_s"] for e in content["target"]
        if (e["context"], e["batch"]) == (nearest, 2)
    }  # fmt: skip
    costs = step_costs(path, "head:2x3", target, context, batch=2)
    assert costs.level_s == tuple(level["q1_s"] for level in draft["levels"])
    assert costs.start_s == max(0.0, draft["draft"]["q1_s"] - sum(costs.level_s))
    assert [n for n, _ in costs.verify] == [1, 3, 7]
    assert costs.verify_s(7) == forward[7]


def test_no_forward_costs_more_than_a_larger_one(measured):
    content = json.loads(json.dumps(measured[1]))
    for entry in content["target"]:
        entry["cost"]["q1_s"] = {1: 1.0, 3: 5.0, 7: 4.0}[entry["n"]]
    costs = step_costs(content, "head:2x3", None)
    assert costs.verify == ((1, 1.0), (3, 4.0), (7, 4.0))


def test_a_shallower_tree_is_the_first_levels(measured):
    path, _, target = measured
    deep, shallow = (step_costs(path, f"head:2x{k}:levels", target) for k in (3, 2))
    assert shallow.level_s == deep.level_s[:2] and shallow.start_s == deep.start_s
    for name in ("head:2x4", "head:3x2", "head:2x2:beams", "lookup:2x2"):
        with pytest.raises(InputError, match=r"0 measured .* there are \['head:1x3', 'head:2x3'\]"):
            step_costs(path, name, target)
    # The sizes of other drafters mean other things.
    text = path.read_text().replace("head:2x3", "lookup:2x3")
    assert step_costs(json.loads(text), "lookup:2x3", target).level_s == deep.level_s
    with pytest.raises(InputError, match="0 measured drafters fit 'lookup:2x2'"):
        step_costs(json.loads(text), "lookup:2x2", target)


def test_what_does_not_fit_is_refused(measured, tmp_path):
    path, content, target = measured
    with pytest.raises(InputError, match="2 measured drafters fit None"):
        step_costs(path, None, target)
    with pytest.raises(InputError, match=r"batch 3, .* batches \[1, 2\]"):
        step_costs(path, "head:1x3", target, batch=3)
    with pytest.raises(InputError, match=r"costs\.json was measured with target"):
        step_costs(path, "head:1x3", tiny("gpt2"))
    assert step_costs(path, "head:1x3", tiny("gpt2"), allow_other=True)
    assert step_costs(path, "head:1x3", None)
    facts = content["provenance"]
    there = {**facts["target"], "dtype": "bfloat16"}
    for key, value in (("device", "Another CPU"), ("threads", 99), ("target", there)):
        other = {**content, "provenance": {**facts, key: value}}
        with pytest.raises(InputError, match="measured with"):
            step_costs(other, "head:1x3", target)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InputError, match=r"broken\.json cannot be read"):
        step_costs(broken, "head:1x3", target)
    broken.write_text('{"target": []}')
    with pytest.raises(InputError, match=r"broken\.json holds no cost table"):
        step_costs(broken, "head:1x3", target)


# ------------------------------------------------------------------------------ beside weights


@pytest.fixture(scope="module")
def profiled(tiny_target, tmp_path_factory):
    """(folder of a head that was measured, its target, what it held before)."""
    target = load_target(str(tiny_target))
    folder = tmp_path_factory.mktemp("profiled") / "head"
    torch.manual_seed(0)
    RecurrentHead.for_target(target).save_pretrained(folder)
    shutil.copytree(tiny_target, folder.parent / "draft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert costs_cli.main([
        "--target.path", str(tiny_target), "--head", str(folder), "--drafters",
        "head:1x2,head:2x3,model:1x1", "--draft", str(folder.parent / "draft"), "--new_tokens",
        "1,2", "--batch_sizes", "1", "--contexts", "8,16", "--rounds", "2", "--profile", "true",
    ]) == 0  # fmt: skip
    return folder, target, before


def test_a_profile_lies_in_the_head_and_disturbs_nothing(profiled):
    folder, target, before = profiled
    path = profile_of(folder, target)
    assert path.parent == folder / "profiles" and path.stem.endswith("-1-thread-float32")
    assert {p.name for p in folder.iterdir()} == {*before, "profiles"}
    assert {name: (folder / name).read_bytes() for name in before} == before
    head = load_head(folder, target)
    assert RecurrentHead.from_pretrained(folder).config.vocab_size == head.config.vocab_size


def test_each_folder_keeps_its_own_drafters(profiled):
    folder, target, _ = profiled
    for where, own in (folder, {"head:1x2", "head:2x3"}), (folder.parent / "draft", {"model:1x1"}):
        content = json.loads(profile_of(where, target).read_text())
        assert {e["name"] for e in content["drafters"]} == own
        assert {e["name"] for e in content["loop"]} == {"plain", "none", *own}


def test_a_profile_prices_whole_steps(profiled):
    folder, target, _ = profiled
    content = json.loads(profile_of(folder, target).read_text())
    for context in (8, 16):
        steps = {e["name"]: e for e in content["loop"] if e["context"] == context}
        assert {name: e["n"] for name, e in steps.items()} == {
            "plain": 1, "none": 1, "head:1x2": 3, "head:2x3": 7
        }  # fmt: skip
        costs = step_costs(profile_of(folder, target), "head:2x3", target, context)
        assert [n for n, _ in costs.verify] == [1, 2, 3, 7]
        assert [n for n, _ in costs.loop] == [1, 7]
        # What the loop takes besides is what makes the parts a whole step.
        for levels, n, name in ((0, 1, "none"), (3, 7, "head:2x3")):
            parts = costs.draft_s(levels) + costs.verify_s(n)
            whole = max(parts, steps[name]["step"]["q1_s"])
            assert costs.step_s(levels, n) == pytest.approx(whole)
        assert costs.plain_s == steps["plain"]["step"]["q1_s"]


def test_what_a_draft_takes_besides_its_levels(profiled):
    folder, target, _ = profiled
    content = json.loads(profile_of(folder, target).read_text())
    for entry in content["drafters"]:
        rest, draft = entry["rest"]["q1_s"], entry["draft"]["q1_s"]
        assert 0 < rest < draft
        assert entry["rest"]["q3_s"] + sum(e["q3_s"] for e in entry["levels"]) >= draft
        entry["rest"]["q1_s"] = 0.123
    assert step_costs(content, "head:2x3", target).start_s == 0.123
    # Without whole steps nothing else would hold what is lost between the parts.
    assert step_costs({**content, "loop": []}, "head:2x3", target).start_s != 0.123


def test_another_profile_is_refused(profiled, tiny_target, tmp_path, monkeypatch):
    folder, target, _ = profiled
    other = tmp_path / "other"
    torch.manual_seed(1)
    RecurrentHead.for_target(target).save_pretrained(other)
    name = profile_path(folder, target).name
    with pytest.raises(InputError, match=r"no profile of this device .* there are: none"):
        profile_of(other, target)
    (other / "profiles").mkdir()
    (other / "profiles" / name).write_text((folder / "profiles" / name).read_text())
    with pytest.raises(InputError, match="measured with other weights"):
        profile_of(other, target)
    monkeypatch.setattr(profile, "device_name", lambda device: "Another(R) CPU @ 2.1GHz")
    here = f"another-cpu-2-1ghz-1-thread-float32.*there are: {name.removesuffix('.json')}"
    with pytest.raises(InputError, match=here):
        profile_of(folder, target)
    monkeypatch.undo()
    # A head may draft for another target of its size: what that one costs is not known.
    changed = load_target(str(tiny_target))
    with torch.no_grad():
        next(changed.model.parameters()).add_(1.0)
    with pytest.raises(InputError, match="was measured with target"):
        profile_of(folder, changed)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "profile: give --head or --draft"),
        (["--head", "owner/name"], "'owner/name' is no folder here"),
        (["--head", "x", "--drafters", "lookup"], "profile: drafters: lookup uses no head"),
        (["--head", "x", "--drafters", "model:1x2"], "'model:1x2' needs --draft"),
        (["--head", "x", "--drafters", "head:1x2:budget=true"], "needs costs of this device"),
    ],
)
def test_what_makes_no_profile_is_said_before_any_work(args, said, capsys):
    with pytest.raises(SystemExit):
        costs_cli.main(["--target.path", "nowhere", "--profile", "true", *args])
    assert said in capsys.readouterr().err
