"""eval/lookahead.py: what it counts, prices and compares, and what it refuses."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import prompts, settings, tiny
from test_draft_model import close_draft
from test_table import launched_by
from transformers import AutoModelForCausalLM, AutoTokenizer

from redrafter.cli import lookahead as cli
from redrafter.cli.args import parse
from redrafter.config import LookaheadEvalConfig, TargetConfig
from redrafter.contracts import InputError, Lookahead
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.model import DraftModel
from redrafter.drafters.profile import StepCosts
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.drafting import Strategy
from redrafter.evaluation import models, pictures
from redrafter.evaluation.lookaheads import experiment
from redrafter.evaluation.lookaheads.cases import cases_of, check, names_of
from redrafter.evaluation.lookaheads.report import overview, says_best
from redrafter.evaluation.lookaheads.steps import (
    Step,
    count_steps,
    judge,
    plain_steps,
    simulated_steps,
)
from redrafter.evaluation.lookaheads.summary import Measured, reliability, summary
from redrafter.evaluation.methods import check_resources
from redrafter.evaluation.runs import PromptBatch, TimedCall
from redrafter.lookahead.disco import Disco, DiscoConfig, save_disco
from redrafter.lookahead.oracle import OracleLookahead
from redrafter.lookahead.static import StaticLookahead
from redrafter.records.make import walk_texts
from redrafter.records.policies import Records, oracle, static
from redrafter.targets.load import load_target

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def asked(tiny_target, tmp_path_factory):
    """Arguments, with a draft model that agrees with the target often, not always."""
    folder = tmp_path_factory.mktemp("lookahead")
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.15 * weights.std() * torch.randn_like(weights)
    model.save_pretrained(folder / "draft")
    AutoTokenizer.from_pretrained(tiny_target).save_pretrained(folder / "draft")
    target = load_target(TargetConfig(str(tiny_target)))
    resources = Resources(draft=load_target(TargetConfig(str(folder / "draft"))))
    drafter = build_drafter("model:1x3", target, resources)
    for t in (0, 1):  # classifiers that have learned nothing
        save_disco(folder / f"disco/model-a-{t}", Disco(DiscoConfig(
            drafter.identity(), target.fingerprint(), drafter.feature_names, 3, hidden=4,
            temperature=float(t), added_s=(1e-3, 1e-3, 1e-3),
        )))  # fmt: skip
    given = {
        "sets": {"a": str(tiny_target / "prompts_heldout.jsonl")},
        "drafters": {"model": "model:1x3", "copy": "suffix:4x1"},
        "lookaheads": {"up-down": "heuristic(start=2)", "sure": "confidence(threshold=0.3)",
                       "two": "static(depth=2)", "all": "oracle(strict=false)",
                       "own": f"disco(path={folder}/disco/{{drafter}}-{{set}}-{{temperature}},"
                              "rule=threshold,threshold=0.4)"},
        "without": {"copy": ["sure", "own"]},
        "temperatures": [0.0, 1.0],
    }  # fmt: skip
    return folder / "out", [
        f"--target.path={tiny_target}", f"--draft={folder / 'draft'}", f"--out={folder / 'out'}",
        *(f"--{key}={json.dumps(value)}" for key, value in given.items()),
        "--n_prompts=3", "--max_new_tokens=12", "--cost_rounds=1", "--threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(asked):
    out, args = asked
    assert cli.main(args) == 0
    names = [f"{d}-a-t{t}" for d in ("model", "copy") for t in (0, 1)]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in names}


def test_everything_is_written(asked, made):
    out, _ = asked
    pictures = ["ratio", "lengths", "reliability", *(f"steps-{name}" for name in made)]
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "table.md", *(f"{name}.json" for name in made),
        *(f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg")),
    }  # fmt: skip
    shown = (out / "table.md").read_text()
    assert shown.count("\n## ") == 4 and "model, a, T = 1" in shown
    assert shown.count("(best static)") == 4 and "up-down" in shown
    for name, body in made.items():
        static = [f"static {k}" for k in range(1 + (3 if name.startswith("model") else 4))]
        others = ["up-down", "sure", "two", "all", "own"]
        if name.startswith("copy"):
            others = ["up-down", "two", "all"]
            assert body["reliability"] == {} == body["classifiers"]
        else:
            assert list(body["reliability"]) == ["own"] == list(body["shown"])[-1:]
            # Before each of the levels that it is asked about, up to the first that it refuses.
            assert body["reliability"]["own"]["n"] >= body["methods"]["static 3"]["target_forwards"]
            assert len(body["classifiers"]) == 1
        assert list(body["methods"]) == static + others
        assert body["oracle"] == "all"
        assert next(iter(body["shown"])) == "all"


def test_figures_by_hand(made):
    """Of a chain without surprises: K levels and K + 1 nodes in every step."""
    for name in ("model-a-t0", "model-a-t1"):
        body = made[name]
        seconds = {e["n"]: e["cost"]["q1_s"] for e in body["costs"]["target"]}
        seconds = {n: min(s for m, s in seconds.items() if m >= n) for n in seconds}
        draft = body["costs"]["drafters"][0]
        levels = [level["q1_s"] for level in draft["levels"]]
        start = max(0.0, draft["draft"]["q1_s"] - sum(levels))
        plain = body["methods"]["static 0"]
        new = plain["target_forwards"]
        assert plain["cost_tokens_per_second"] == pytest.approx(1 / seconds[1])
        rates = {0: 1 / seconds[1]}
        for k in (1, 2, 3):
            m = body["methods"][f"static {k}"]
            steps = m["target_forwards"]
            assert m["draft_forwards"] == k * steps and m["levels_per_step"] == k
            assert m["tokens_per_step"] == pytest.approx(new / steps)
            spent = steps * (start + sum(levels[:k]) + seconds[k + 1])
            rates[k] = new / spent
            assert m["cost_tokens_per_second"] == pytest.approx(rates[k], rel=1e-6)
            assert 0 < m["drafted_tokens"] <= k * steps
        best = max(rates, key=rates.get)
        assert body["best_static"] == f"static {best}"
        top = max(body["methods"]["all"]["cost_tokens_per_second"], 0)
        for k, rate in rates.items():
            m = body["methods"][f"static {k}"]
            assert m["cost_ratio"] == pytest.approx(rate / rates[best], rel=1e-6)
            if top > rates[best]:
                share = (rate - rates[best]) / (top - rates[best])
                assert m["cost_share"] == pytest.approx(share, rel=1e-4, abs=1e-9)


def test_costs_may_come_from_a_file(asked, made, tmp_path, capsys, monkeypatch):
    """Every part is then priced alike, and by nothing else."""
    monkeypatch.setattr(pictures, "save_figure", lambda *a: [])  # seconds, and seen above
    cost = {"median_s": 9.0, "q1_s": 1.0, "q3_s": 9.0}
    here = {"context": 20, "batch": 1}
    table = {
        "target": [{"n": n, **here, "cost": {**cost, "q1_s": 1.0 + n}} for n in range(1, 6)],
        "drafters": [{"name": "suffix:4x1", **here, "draft": {**cost, "q1_s": 2.5},
                      "levels": [{**cost, "q1_s": 0.5}] * 4}],
        "provenance": made["copy-a-t0"]["provenance"],
    }  # fmt: skip
    (tmp_path / "costs-0.json").write_text(json.dumps(table))
    args = [
        *asked[1], f"--out={tmp_path / 'out'}", "--temperatures=[0.0]", "--without={}",
        '--drafters={"copy": "suffix:4x1"}', '--lookaheads={"two": "static(depth=2)"}',
        "--timed=[]", f"--costs={tmp_path}/costs-{{temperature}}.json",
    ]  # fmt: skip
    assert cli.main(args) == 0
    body = json.loads((tmp_path / "out/copy-a-t0.json").read_text())
    assert body["methods"]["static 0"]["cost_tokens_per_second"] == pytest.approx(1 / 2)
    assert body["costs"]["level_s"] == [0.5] * 4 and body["costs"]["start_s"] == 0.5
    assert "costs-0.json (" in body["priced_by"]

    capsys.readouterr()
    table["target"][0]["cost"] = cost
    (tmp_path / "costs-0.json").write_text(json.dumps(table))
    for given, said in (
        (args, "was priced by"),
        ([*args, "--costs=costs-{drafter}.json"], "costs: {drafter} is none of {temperature}"),
    ):
        with pytest.raises(SystemExit):
            cli.main(given)
        assert said in capsys.readouterr().err


def test_the_text_is_the_same_and_the_oracle_wastes_nothing(made):
    for body in made.values():
        tokens = {tuple(rows["tokens"]) for rows in body["per_prompt"].values()}
        assert len(tokens) == 1
        for m in body["methods"].values():
            assert m["equal_rows"] == body["n_prompts"] == 3
            assert 0 <= m["lookahead_share"] < 1
        oracle = body["methods"]["all"]
        assert all(s["drafted"] == s["accepted"] for s in body["shown"]["all"])
        assert oracle["drafted_tokens"] == sum(k * n for k, n in enumerate(body["verified"]["all"]))
        longest = max(m["tokens_per_step"] for m in body["methods"].values())
        assert oracle["tokens_per_step"] == longest, "that of full depth"
        # Steps follow each other along the answer.
        for steps in body["shown"].values():
            places = [s["position"] for s in steps]
            assert places[0] == 1 and places == sorted(set(places))


def test_a_method_beside_itself(made):
    for body in made.values():
        methods = body["methods"]
        for key in ("cost_ratio", "clock_ratio"):
            m = methods[body["best_static"]]
            assert m[key] == m["low"][key] == m["high"][key] == 1.0
        # One more label for the same thing: measured once.
        for key in ("cost_tokens_per_second", "clock_tokens_per_second", "cost_ratio"):
            assert methods["two"][key] == methods["static 2"][key]
            assert methods["two"]["low"][key] == methods["static 2"]["low"][key]
        if methods["all"]["cost_share"] is not None:
            assert methods["all"]["cost_share"] == pytest.approx(1.0)
            assert methods[body["best_static"]]["cost_share"] == 0.0


def test_nothing_is_measured_twice(asked, made, monkeypatch, capsys):
    out, args = asked
    shown = (out / "table.md").read_text()
    monkeypatch.setattr(experiment, "measure", lambda *a: pytest.fail("measured twice"))
    monkeypatch.setattr(pictures, "save_figure", lambda *a: [])  # seconds, and seen above
    assert cli.main(args) == 0
    assert (out / "table.md").read_text() == shown
    with pytest.raises(SystemExit):
        cli.main([*args, "--seed=1"])
    assert "another seed" in capsys.readouterr().err
    # A classifier that was trained anew is not the one that was measured.
    with open(out.parent / "disco/model-a-1/config.json", "a") as file:
        file.write(" ")
    with pytest.raises(SystemExit):
        cli.main(args)
    assert "model-a-t1.json was measured with" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- what is asked


def config_of(**changes) -> list[str]:
    values = {
        "sets": {"a": "a.jsonl", "b": "b.jsonl"},
        "drafters": {"copy": "suffix:4x1"},
        "lookaheads": {"own": "static(depth=2)"},
        **changes,
    }
    return ["--target.path=t", "--out=o", *(f"--{k}={json.dumps(v)}" for k, v in values.items())]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lookaheads": {"x": "exit(alpha={drafer})"}}, "x: {drafer} is none of {drafter}, {set}"),
        ({"lookaheads": {"x": "clever"}}, "lookahead 'clever' is not one of static"),
        ({"lookaheads": {"x": "static(deep=2)"}}, "no option 'deep'"),
        ({"lookaheads": {"x y": "exit"}}, "'x y' must be letters"),
        ({"lookaheads": {}}, "lookaheads: give at least one"),
        ({"drafters": {"x": "suffx:4x1"}}, "drafters: x: 'suffx:4x1' drafts nothing"),
        ({"drafters": {"x": "plain"}}, "drafters: x: 'plain' drafts nothing"),
        ({"drafters": {"x": "suffix:4x1:deep=2"}}, "drafters: x: 'suffix:4x1:deep=2': no option"),
        ({"drafters": {"x": "suffix:lookahead=exit"}}, "write it under lookaheads"),
        ({"drafters": {"x": "model:1x2"}}, "--draft"),
        ({"drafters": {"x": "bigram:2x2"}}, "bigrams: give a table"),
        ({"drafters": {"x": "model:1x2:budget=true"}, "draft": "d"}, "budget=true"),
        ({"without": {"copy": ["other"]}}, "without: copy"),
        ({"shown_prompt": 100}, "shown_prompt: 100"),
    ],
)
@pytest.mark.usefixtures("files_unseen")
def test_bad_names_are_refused_before_anything_is_loaded(changes, said, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_both", lambda config: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as error:
        cli.main(config_of(**changes))
    assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("path", launched_by("eval/lookahead.py"), ids=str)
@pytest.mark.usefixtures("files_unseen")
def test_configurations_are_read_as_they_are(path):
    config = parse(LookaheadEvalConfig, [f"--config={path}"], "eval/lookahead.py")
    cases = cases_of(config)
    names = [name for case in cases for name in names_of(case)]
    check(names, config)
    check_resources(names, cases[0].speed)
    ours = {label for case in cases for label in case.lookaheads}
    assert ours == set(config.lookaheads), "no label is always another's"


@pytest.mark.usefixtures("files_unseen")
def test_placeholders_and_transfer():
    changes = {
        "lookaheads": {
            "own": "disco(path=r/{drafter}-{set}-t{temperature})",
            "of-a": "disco(path=r/{drafter}-a-t{temperature})",
        },
        "temperatures": [0.0, 0.5],
    }
    config = parse(LookaheadEvalConfig, config_of(**changes), "test")
    cases = cases_of(config)
    assert [Path(p.speed.out).name for p in cases] == [
        "copy-a-t0.json", "copy-a-t0.5.json", "copy-b-t0.json", "copy-b-t0.5.json",
    ]  # fmt: skip
    assert cases[1].lookaheads == {"own": "suffix:4x1:lookahead=disco(path=r/copy-a-t0.5)"}
    assert cases[2].lookaheads == {
        "own": "suffix:4x1:lookahead=disco(path=r/copy-b-t0)",
        "of-a": "suffix:4x1:lookahead=disco(path=r/copy-a-t0)",
    }
    assert cases[3].speed.temperature == 0.5 and cases[3].speed.prompts == "b.jsonl"


# ------------------------------------------------------------------------------------- the figures


def made_up(length, steps, clock_s=1.0, name="x"):
    """Prompts of steps (levels, emitted): chains."""
    rows = [
        [Step(1, e, nodes=1 + k, tokens=k, started=k > 0, levels=k, drafted=k, accepted=e - 1)
         for k, e in row] for row in steps
    ]  # fmt: skip
    runs = []
    for row in steps:
        tokens = [0] * (1 + sum(e for _, e in row))
        seconds = {"total": 0.5 + clock_s, "prefill": 0.5, "lookahead": 0.1 * clock_s}
        runs.append([TimedCall([tokens], seconds)])
    return Measured(name, length, rows, runs)


COSTS = StepCosts(1.0, (0.5, 0.5), ((1, 4.0), (2, 5.0), (3, 6.0)))
ANSWERS = [[0] * 7, [0] * 3]


def test_the_best_static_length_in_hindsight():
    measured = {
        "static 0": made_up(0, [[(0, 1)] * 6, [(0, 1)] * 2]),  # 8 tokens, 8 steps of 4 s
        "static 1": made_up(1, [[(1, 2)] * 3, [(1, 1)] * 2]),  # 5 steps of 1.5 + 5 s
        "static 2": made_up(2, [[(2, 3)] * 2, [(2, 1)] * 2], clock_s=2.0),  # 4 of 2 + 6 s
        "some": made_up(None, [[(2, 3)] * 2, [(0, 1)] * 2]),  # 2 of 8 s, 2 of 4 s
    }
    body = summary(measured, COSTS, ANSWERS, "model:1x2", "some")
    figures = body["methods"]
    rates = {label: m["cost_tokens_per_second"] for label, m in figures.items()}
    assert rates == pytest.approx({"static 0": 8 / 32, "static 1": 8 / 32.5,
                                   "static 2": 8 / 32, "some": 8 / 24})  # fmt: skip
    assert body["best_static"] == "static 0", "the shortest of equal ones"
    assert body["best_drafting"] == "static 2" and body["best_static_by_clock"] == "static 0"
    assert says_best(body).startswith("Do not speculate here") and "0.0 % slower" in says_best(body)
    assert figures["some"]["cost_ratio"] == pytest.approx(32 / 24)
    assert figures["some"]["cost_share"] == 1.0
    assert figures["static 1"]["cost_share"] == pytest.approx(
        (8 / 32.5 - 8 / 32) / (8 / 24 - 8 / 32)
    )
    assert figures["static 2"]["clock_tokens_per_second"] == pytest.approx(8 / 4)
    assert figures["static 2"]["clock_ratio"] == pytest.approx(0.5)
    assert figures["some"]["lookahead_share"] == pytest.approx(0.1)
    assert figures["some"]["draft_forwards"] == 4 == figures["some"]["drafted_tokens"]
    assert figures["some"]["tokens_per_step"] == 2.0 and figures["some"]["levels_per_step"] == 1.0
    # With one or the other prompt alone: paired, the ratio is 48/32 halved, or 1.
    assert figures["some"]["low"]["cost_ratio"] == pytest.approx(1.0)
    assert figures["some"]["high"]["cost_ratio"] == pytest.approx(24 / 16)
    assert body["verified"]["some"] == [2, 0, 2]
    table = summary(measured, COSTS, ANSWERS, "suffix", None)["methods"]["some"]
    assert table["draft_forwards"] == 0 and "cost_share" not in table
    # Slower plain forwards: speculating is best, and nothing is said against it.
    dear = replace(COSTS, verify=((1, 6.0), (2, 6.0), (3, 6.0)))
    body = summary(measured, dear, ANSWERS, "model:1x2", "some")
    assert body["best_static"] == "static 2" and "Do not" not in says_best(body)
    for key in ("cost_ratio", "clock_ratio"):  # its speed differs from prompt to prompt
        m = body["methods"]["static 2"]
        assert m[key] == m["low"][key] == m["high"][key] == 1.0
    assert m["low"]["cost_tokens_per_second"] < m["high"]["cost_tokens_per_second"]
    body["best_static_by_clock"] = "static 2"
    assert says_best(body).endswith("in hindsight, by forward costs: 2. By the clock too.")
    assert "static 2" in overview({"here": body})


def test_an_oracle_that_gains_nothing_has_nothing_to_share():
    measured = {
        "static 0": made_up(0, [[(0, 1)] * 6, [(0, 1)] * 2]),
        "all": made_up(None, [[(0, 1)] * 6, [(0, 1)] * 2]),
    }
    figures = summary(measured, COSTS, ANSWERS, "model:1x2", "all")["methods"]["all"]
    assert figures["cost_share"] is None and "cost_share" not in figures["low"]
    assert figures["cost_ratio"] == 1.0


def test_a_draft_that_was_begun_in_vain_costs_its_start():
    assert Step(1, started=True).cost_s(COSTS) == 5.0
    assert Step(1).cost_s(COSTS) == 4.0
    assert Step(1, nodes=3, started=True, levels=2).cost_s(COSTS) == 8.0


def test_reliability():
    p = [0.05, 0.15, 0.12, 0.95, 1.0, 1.0]
    found = reliability(p, [False, False, True, True, True, False])
    assert [b["n"] for b in found["bins"]] == [1, 2, 3]
    assert [b["observed"] for b in found["bins"]] == pytest.approx([0, 0.5, 2 / 3])
    assert [b["predicted"] for b in found["bins"]] == pytest.approx([0.05, 0.135, 2.95 / 3])
    ece = (0.05 + 2 * (0.5 - 0.135) + (2.95 - 2)) / 6
    assert found["ece"] == pytest.approx(ece) and found["n"] == 6
    assert found["bins"][2] | {"n": 0} == found["bins"][2] | {"low": 0.9, "high": 1.0, "n": 0}
    perfect = reliability([0.25] * 4, [True, False, False, False], bins=4)
    assert perfect["ece"] == 0.0 and perfect["bins"][0]["low"] == 0.25
    assert reliability([], []) == {"n": 0, "ece": None, "bins": []}


# --------------------------------------------------------------------------- steps and predictions


class Guess(Lookahead):
    """Predicts 1 / level, stops behind level 2, or at once in every third step."""

    log = None

    def begin(self, seqs):
        self.step, self.told = 0, []

    def plan(self):
        self.step += 1
        return 0 if self.step % 3 == 0 else None

    def go_on(self, features, level):
        if self.log is not None:
            self.log.append((level, torch.tensor([1 / level])))
        return torch.tensor([level < 2])

    def observe(self, drafted, accepted, truth):
        self.told.append((int(drafted), int(accepted)))


@pytest.fixture(scope="module")
def replayed():
    """A target, batches of one row, and a strategy for each: half of what is drafted is right."""
    target, config = tiny("llama"), settings(eos_token_id=-1)
    rows = prompts((9, 3, 14, 8, 5, 6, 7, 11))
    texts = [[*row, *speculative(target, [row], config).tokens[0]] for row in rows]
    batches = [PromptBatch([row], [0], [text]) for row, text in zip(rows, texts, strict=True)]

    def make(texts, lookahead=None):
        seed = 1 + len(texts[0])  # another one in every batch
        drafter = ReplayDrafter(texts, target.vocab_size, 4, 1, 0.6, seed=seed)
        return Strategy(drafter, lookahead=lookahead)

    return target, config, batches, make


def test_steps_are_what_the_loop_counts(replayed):
    target, config, batches, make = replayed
    lookahead = Guess()
    found = count_steps(target, lambda texts: make(texts, lookahead), config, batches)
    assert found != plain_steps([b.texts[0][len(b.prompts[0]) :] for b in batches])
    for batch, steps in zip(batches, found, strict=True):
        strategy = make(batch.texts)
        alone = speculative(
            target, batch.prompts, config, drafter=strategy.drafter, lookahead=Guess()
        ).stats
        assert len(steps) == alone.steps[0] and sum(s.emitted for s in steps) == alone.emitted[0]
        assert sum(s.nodes for s in steps) == alone.nodes_verified
        for level in range(4):
            drafted = [s for s in steps if s.drafted > level]
            assert len(drafted) == alone.drafted_at[level]
        assert [s.levels for s in steps] == [0 if i % 3 == 2 else 2 for i in range(len(steps))]
        assert [s.started for s in steps] == [s.levels > 0 for s in steps]
        assert all(s.tokens == s.drafted >= s.accepted for s in steps)
        position = 1
        for step in steps:
            assert step.position == position
            position += step.emitted


@pytest.mark.parametrize("kind", ["model", "suffix"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_simulated_steps_are_the_counted_ones(kind, temperature):
    """What is not timed need not be decoded: every field of every step, static and the oracle."""
    target, depth = tiny("llama"), 3
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    config = settings(max_new_tokens=14, eos_token_id=[5], **sampled)
    draft = close_draft(target, 0.08)
    drafter = SuffixDrafter(depth) if kind == "suffix" else DraftModel(draft, target, depth, 2)
    rows = [(p * 3)[:9] for p in prompts((9, 3, 14, 4, 2), seed=4)]
    texts = walk_texts(target, drafter, rows, config, range(5))
    records = Records.of(texts, config.max_new_tokens)
    batches = [PromptBatch([row], [i], []) for i, row in enumerate(rows)]
    assert kind == "suffix" or any(int(t.accepted.max()) for t in texts)
    for levels in range(1, depth + 1):
        counted = count_steps(
            target, lambda _, k=levels: Strategy(drafter, lookahead=StaticLookahead(k)), config,
            batches,
        )
        assert counted == simulated_steps(records, drafter, static(levels))
    counted = count_steps(
        target, lambda _: Strategy(drafter, lookahead=OracleLookahead()), config, batches
    )
    assert counted == simulated_steps(records, drafter, oracle)


def test_predictions_are_judged_by_drafting_on(replayed):
    target, config, batches, make = replayed
    assert judge(target, make, config, batches) is None, "it predicts nothing"
    lookahead = Guess()
    judged = judge(target, lambda texts: make(texts, lookahead), config, batches)
    assert lookahead.log is None
    want, cut = Counter(), 0
    for batch in batches:
        full = count_steps(target, make, config, [batch])[0]
        for i, step in enumerate(full):
            for level in (1, 2):
                if i % 3 == 2:
                    continue  # it is not asked where it plans nothing
                if level > config.max_new_tokens - step.position:
                    cut += 1  # never verified: nothing is known
                else:
                    want[level, 1 / level, step.accepted >= level] += 1
    assert Counter(judged) == want and len(want) == 4, "right and wrong ones at both levels"
    assert cut, "the limit is met"
    # It is told what it would have been told: never more than its own two levels.
    assert {d for d, _ in lookahead.told} <= {0, 1, 2} and all(a <= d for d, a in lookahead.told)


def test_steps_are_counted_one_row_at_a_time(replayed):
    target, config, _, make = replayed
    with pytest.raises(InputError, match="one row"):
        count_steps(target, make, config, [PromptBatch(prompts(), [0] * 4, prompts())])
