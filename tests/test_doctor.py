"""`redrafter doctor`: what a step asks of a device is counted, and the last sentence says whether
drafting pays, with which tree, and why."""

import json
import math

import pytest
import torch
from models import settings, tiny

from redrafter.cli import doctor as command
from redrafter.config import DoctorConfig, TargetConfig
from redrafter.decode.plain import plain
from redrafter.drafters.profile import StepCosts
from redrafter.evaluation import doctor
from redrafter.evaluation.doctor import check, diagnose, sentence, show
from redrafter.evaluation.operations import CountOperations, _reads, per_step
from redrafter.evaluation.static import predict
from redrafter.heads.recurrent import RecurrentHead


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    ("work", "reads"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x.view(2, 3).t(), 0),
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: x.clone().index_put_((x > 0,), torch.tensor(0.0)), 1),
    ],
)
def test_reads_of_the_host_are_counted(work, reads, inference):
    x = torch.arange(6.0)
    with torch.inference_mode(inference), CountOperations() as counter:
        work(x)
    assert counter.counts.host_reads == reads


def test_views_are_no_launches():
    x = torch.arange(6.0)
    with CountOperations() as counter:
        x.view(2, 3).t() + 1
    assert (counter.counts.operations, counter.counts.launches) == (3, 1)


def test_a_copy_to_the_host_is_a_read():
    """The rule alone: no second device is here to copy from."""
    there, here = torch.empty(3, device="meta"), torch.empty(3)
    copy, into = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
    assert _reads(copy, (there,), here) and _reads(into, (here, there), here)
    assert not _reads(copy, (here,), there) and not _reads(copy, (here,), here)
    assert not _reads(into, (there, here), there)


def test_made_of_others_is_counted_by_its_parts():
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    counts = []
    for inference in (True, False):
        with torch.inference_mode(inference), CountOperations() as counter:
            torch.nn.functional.linear(x, w).sum()
        counts.append(counter.counts)
    assert counts[0] == counts[1] and counts[0].operations > 2


def test_per_step_leaves_the_prefill_out():
    target, row = tiny("llama"), [[3, 4, 5, 6]]

    def wanted(n):
        return settings(max_new_tokens=n, eos_token_id=-1)

    short = per_step(lambda s: plain(target, row, s), wanted, (4, 6))
    long = per_step(lambda s: plain(target, row, s), wanted, (4, 12))
    assert (short["steps"], long["steps"]) == (2, 8)
    # Now and then a step makes room in the cache besides.
    assert short["operations"] == pytest.approx(long["operations"], rel=0.02)
    assert short["operations"] > short["launches"] > 20
    assert short["host_reads"] == long["host_reads"] == 1.0  # the token that was chosen

    def reads_twice(config):
        made = plain(target, row, config)
        for _ in range(made.stats.forwards):
            torch.ones(1).item()
        return made

    assert per_step(reads_twice, wanted, (4, 6))["host_reads"] == 2.0


def cells_of(verify, level_s=1.0, accepted=3):
    """Of one text of 60 tokens: `accepted` levels are right at every position."""
    costs = StepCosts(1.0, (level_s,) * 4, tuple((n, verify(n)) for n in (1, 2, 3, 4, 5)))
    plain_, *cells = predict({1: [[accepted] * 60]}, {1: costs}, 4)
    return {"plain": plain_, **{f"head:{c.name}": c for c in cells}}, {"head:1x4": costs}


def test_the_sentence_says_that_it_pays_and_why():
    cells, costs = cells_of(lambda n: 100.0)
    said = sentence(cells, costs, True)
    step = (1 + 3 * 1 + 100) / 100  # three levels: a fourth is never accepted
    assert said.startswith(f"Drafting pays here: head:1x3 is predicted at {4 / step:.2f} x plain")
    assert "gives 4.00 tokens" in said and f"takes {step:.2f} times" in said
    assert "verifying 4 tokens costs 1.00 forwards of one, drafting is 4% of the step" in said


def test_the_sentence_says_that_it_does_not():
    cells, costs = cells_of(lambda n: 100.0 * n, accepted=1)
    said = sentence(cells, costs, False)
    assert said.startswith("Drafting does not pay here (without a head; a head trained for")
    assert "verifying 2 tokens costs 2.00 forwards" in said
    assert "without a head" not in sentence(cells, costs, True)


def small(**changes) -> DoctorConfig:
    given = dict(target=TargetConfig(""), max_new_tokens=12, widths="1,2", depth=2, rounds=1)
    return DoctorConfig(**{**given, **changes})


def test_diagnosis_of_a_target_with_a_head():
    target = tiny("llama")
    torch.manual_seed(0)
    head = RecurrentHead.for_target(target).double().eval()
    config = small()
    body = json.loads(json.dumps(diagnose(config, check(config), target, head)))
    assert set(body["cells"]) == {"plain", "head:1x1", "head:1x2", "head:2x1", "head:2x2",
                                  "suffix:1x1", "suffix:2x1"}  # fmt: skip
    assert [e["n"] for e in body["t"]] == [1, 2, 4, 8, 16, 32]
    assert body["operations"]["head:1x2"]["host_reads"] == 1.0
    assert body["environment"]["dtype"] == "float64"
    assert f"its forward is {body['environment']['forward']}" in show(body)
    for cell in body["cells"].values():
        assert math.isfinite(cell["tokens_per_s"]) and cell["step_s"] > 0
    best = max(body["cells"].values(), key=lambda c: c["tokens_per_s"])
    pays = (
        best["depth"] > 0 and best["tokens_per_s"] > 1.02 * body["cells"]["plain"]["tokens_per_s"]
    )
    assert body["sentence"].startswith("Drafting pays" if pays else "Drafting does not pay")
    assert show(body).splitlines()[-1] == body["sentence"]


def test_the_command(tiny_target, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_TEXTS", doctor._TEXTS[:1])
    out = tmp_path / "doctor.json"
    words = ["--max_new_tokens=8", "--depth=1", "--rounds=1", f"--out={out}"]
    assert command.main([f"--target.path={tiny_target}", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Drafting ")
    body = json.loads(out.read_text())
    assert body["provenance"]["target"]["inflated"] is None
    with pytest.raises(SystemExit):
        command.main([f"--target.path={tiny_target}", "--depth=0"])
    assert "depth" in capsys.readouterr().err
