"""What was measured, read back: seconds of a step, and the profiles that travel with a head."""

import json
from dataclasses import asdict

import pytest
from models import tiny
from test_recurrent_drafter import make_head

from redrafter.config import TreeConfig
from redrafter.contracts import InputError
from redrafter.drafters.profile import StepCosts, step_costs
from redrafter.drafters.recurrent import RecurrentDrafter
from redrafter.evaluation.costs import CostMeter
from redrafter.evaluation.report import write_result


def test_seconds_of_a_step():
    costs = StepCosts(0.5, (1.0, 2.0), ((1, 10.0), (5, 18.0)), ((1, 0.1), (5, 0.5)))
    assert [costs.draft_s(k) for k in (0, 1, 2)] == [0.0, 1.5, 3.5]
    assert [costs.verify_s(n) for n in (1, 2, 4.5, 5)] == [10.0, 12.0, 17.0, 18.0]
    assert costs.loop_s(3) == pytest.approx(0.3) and costs.loop_s(9) == 0.5
    assert costs.step_s(2, 3) == pytest.approx(3.5 + 14.0 + 0.3)
    assert StepCosts(0.5, (1.0,), ((1, 10.0),)).step_s(0, 1) == 10.0
    with pytest.raises(InputError, match="2 levels were measured, not 3"):
        costs.draft_s(3)
    with pytest.raises(InputError, match="1 to 5 new tokens were measured, not of 5.5"):
        costs.verify_s(5.5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A file of eval/costs.py with two drafters, its content, and the target."""
    target = tiny("llama")
    drafters = {
        f"head:{w}x3": RecurrentDrafter(make_head(target, "own"), target, TreeConfig(w, 3))
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
    # What disturbs a measurement only adds to it.
    assert costs.verify_s(3) == min(forward[3], forward[7])


def test_a_shallower_tree_is_the_first_levels(measured):
    path, _, target = measured
    deep, shallow = (step_costs(path, f"head:2x{k}:levels", target) for k in (3, 2))
    assert shallow.level_s == deep.level_s[:2] and shallow.start_s == deep.start_s
    for name in ("head:2x4", "head:3x2", "head:2x2:beams", "lookup:2x2"):
        with pytest.raises(InputError, match=r"0 measured .* there are \['head:1x3', 'head:2x3'\]"):
            step_costs(path, name, target)


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
