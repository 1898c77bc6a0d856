"""Figures on hand-made numbers, and the evaluation commands end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import alone, prompts, tiny

import redrafter.evaluation.lossless as lossless
import redrafter.evaluation.methods as methods
from redrafter.cli import costs as costs_cli
from redrafter.cli import lossless as lossless_cli
from redrafter.cli import speed as speed_cli
from redrafter.config import (
    DataConfig,
    SourceConfig,
    SpeedConfig,
    TargetConfig,
    TrainConfig,
)
from redrafter.contracts import InputError, StepStats
from redrafter.costs import Cost, CostMeter, CostTable, DrafterCost, TargetCost
from redrafter.data.answers import generation_config
from redrafter.drafters.bigram import CountedBigrams, count_bigrams
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.drafting import build_strategy
from redrafter.evaluation.figures import (
    acceptance,
    bootstrap,
    loop_share,
    mean_of_ratios,
    median,
    pooled,
    speed_bound,
)
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.methods import (
    Loop,
    Method,
    PromptBatch,
    Resources,
    TimedCall,
    build_method,
    check_resources,
    parse_methods,
)
from redrafter.evaluation.prompt_sets import check, show
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning, number_list
from redrafter.evaluation.report import described_prompts, n_rows, read_result, write_result
from redrafter.evaluation.speed import (
    Summary,
    decoding,
    make_batches,
    noise_warning,
    run_interleaved,
)
from redrafter.evaluation.votes import vote
from redrafter.files import write_config
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target

# ---------------------------------------------------------------- figures


def test_loop_share_counts_repeated_four_grams_of_the_answer():
    # 2341, 3412, 4123 and 2349 are new, 1234 is not.
    assert loop_share([([1, 2, 3, 4], [1, 2, 3, 4, 9])]) == 1 / 5
    # The prompt's own repetition (1111) is not counted, what the answer repeats of it is.
    assert loop_share([([1] * 6, [1, 2])]) == 1 / 2
    # Rows do not see each other, and a row of three tokens has no 4-gram.
    assert loop_share([([1, 2], [3, 4]), ([1, 2], [3, 4]), ([1], [2, 3])]) == 0.0
    assert loop_share([([1], [2, 3])]) is None


def test_acceptance_names_both_rates():
    rates = acceptance(drafted_at=[10, 10, 5, 0], accepted_at=[8, 4, 1, 0])
    assert rates["unconditional"] == [0.8, 0.4, 0.2, None]
    assert rates["conditional"] == pytest.approx([0.8, 0.5, 0.5, None])
    assert acceptance([3, 3], [0, 0])["conditional"] == [0.0, None]


def test_bound_is_tokens_per_step_over_relative_cost():
    assert speed_bound(tau=3.0, t_1_s=0.010, draft_s=0.005, t_n_s=0.015) == pytest.approx(1.5)


def test_bootstrap_interval():
    assert bootstrap(median, [1.5] * 7) == (1.5, 1.5, 1.5)
    ratios = np.random.default_rng(1).normal(2.0, 0.5, 40)
    value, low, high = bootstrap(median, ratios)
    assert value == np.median(ratios)
    # Asymptotic half width of a median's interval: 1.96 * 1.2533 * 0.5 / sqrt(40) = 0.194
    assert 0.10 < value - low < 0.40 and 0.10 < high - value < 0.40
    assert bootstrap(median, ratios) == (value, low, high), "the seed is fixed"
    # Resampled together: numerator and denominator of a prompt stay a pair.
    steps = np.arange(1, 30)
    assert bootstrap(pooled, 3 * steps, steps) == (3.0, 3.0, 3.0)


def test_pooled_and_per_request_tokens_per_step_differ():
    emitted, steps = np.array([9.0, 1.0, 0.0]), np.array([3.0, 1.0, 0.0])
    assert pooled(emitted, steps) == 2.5
    assert mean_of_ratios(emitted, steps) == 2.0, "a prompt without steps is left out"


def test_cost_table_interpolates_and_refuses_to_guess():
    def entry(n, seconds, batch=1):
        return TargetCost(n, 64, batch, Cost(9 * seconds, seconds, 9 * seconds))

    table = CostTable([entry(1, 1.0), entry(5, 3.0), entry(1, 9.0, batch=4)], [])
    assert (table.t(1, 64, 1), table.t(3, 64, 1), table.t(1, 64, 4)) == (1.0, 2.0, 9.0)
    for n, context, batch in ((6, 64, 1), (1, 65, 1), (2, 64, 4)):
        with pytest.raises(KeyError):
            table.t(n, context, batch)


def test_a_draft_that_ends_early_costs_the_levels_it_drafted():
    levels = [Cost(1.0, s, 1.0) for s in (1.0, 2.0, 4.0)]
    table = CostTable([], [DrafterCost("head", 64, 1, Cost(9.0, 8.0, 9.0), levels)])
    assert table.draft("head") == 8.0
    assert table.draft("head", [1.0, 0.5, 0.0]) == 8.0 - 1.0 - 4.0


def test_a_busy_machine_is_told():
    def table(q1, q3):
        return CostTable([TargetCost(1, 8, 1, Cost(1.0, 1.0, 1.1)),
                          TargetCost(5, 8, 1, Cost(1.0, q1, q3))], [])  # fmt: skip

    assert noise_warning(table(1.0, 1.2)) == []
    assert "factor of 1.5" in noise_warning(table(0.8, 1.2))[0]


def test_cost_meter_measures_everything_in_turn():
    table = count_bigrams([[1, 2, 1]], 48, 2)
    drafters = {"lookup": PromptLookup(3), "bigram": CountedBigrams(table, 2, 2)}
    meter = CostMeter(
        tiny("llama"), new_tokens=(1, 3), contexts=(8, 16), batches=(1, 2), drafters=drafters,
        temperature=1.0,
    )  # fmt: skip
    table = meter.run(rounds=3)
    assert [(c.n, c.context, c.batch) for c in table.target] == [
        (n, context, batch) for context in (8, 16) for batch in (1, 2) for n in (1, 3)
    ]
    assert all(0 < c.cost.q1_s <= c.cost.median_s <= c.cost.q3_s for c in table.target)
    assert [len(c.levels) for c in table.drafters] == [3, 2] * 4
    for entry in table.drafters:
        assert entry.draft.q3_s >= max(level.q1_s for level in entry.levels)
    assert {len(rows) for rows in meter.samples.values()} == {3}
    with pytest.raises(InputError, match="positions"):
        CostMeter(tiny("llama"), contexts=(60,))


# ---------------------------------------------------------------- speed, with a clock made by hand


class Clockwork(Method):
    """Takes the seconds it is told to, per token of the answer, behind a prefill of 1 s."""

    def __init__(self, log, name, answers, token_s, steps_of=None, drafter=None):
        self.log = log
        self.name, self.answers, self.token_s = name, answers, token_s
        self.steps_of, self.drafter = steps_of, drafter

    def run(self, batch):
        self.log.append(self.name)
        row = self.answers[batch.seeds[0]]
        new = len(row) - 1
        steps = new if self.steps_of is None else self.steps_of
        stats = StepStats([steps], [new], [steps], [new - steps], steps * 3, steps)
        if self.drafter is None:
            stats.drafted_at, stats.accepted_at = [], []
        verify = 0.9 * new * self.token_s
        seconds = {"prefill": 1.0, "draft": 0.0, "verify": verify, "forward": verify}
        seconds["cpu"] = 2.0 * new * self.token_s  # the prefill is the device's
        return TimedCall([row], {**seconds, "total": 1.0 + new * self.token_s}, stats, [3] * steps)

    def _run(self, batch): ...


def test_speed_figures_of_a_known_clock():
    answers = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 8, 9, 8, 9, 8]]
    batches = [PromptBatch([[0]], [i]) for i in range(2)]
    wrong = [answers[0], [8, 9, 8, 9, 8, 9, 9]]
    log: list[str] = []
    methods = [
        Clockwork(log, "stock", answers, 2.0),
        Clockwork(log, "plain", answers, 1.0),
        Clockwork(log, "head", answers, 0.5, steps_of=2, drafter=PromptLookup(1)),
        Clockwork(log, "lookup", wrong, 1.0, steps_of=6, drafter=PromptLookup(1)),
    ]
    runs = run_interleaved(methods, batches, repeats=2)
    names = [m.name for m in methods]
    turns = [log[i : i + 4] for i in range(0, 16, 4)]
    assert [sorted(turn) for turn in turns] == [sorted(names)] * 4
    assert [turn[0] for turn in turns] == names, "each turn starts with another method"
    exact = Cost(1.0, 1.0, 1.0)
    costs = CostTable(
        [TargetCost(1, 5, 1, exact), TargetCost(5, 5, 1, Cost(2.0, 2.0, 2.0))],
        [DrafterCost(n, 5, 1, Cost(0.5, 0.5, 0.5), []) for n in ("head", "lookup")],
    )
    config = SpeedConfig(TargetConfig("x"), "x", n_prompts=2)
    body = Summary(methods, runs, batches, answers, costs, config).body()
    head, plain, stock = (body["methods"][n] for n in ("head", "plain", "stock"))
    assert body["best_plain"] == "plain" and body["exact"] is False
    assert body["loop_share"] == 2 / 10  # 8 9 8 9 and 9 8 9 8, once more each
    assert plain["speedup_stock"] == pytest.approx(13 / 7)
    assert stock["speedup_plain"] == pytest.approx(7 / 13)
    assert head["speedup_plain"] == pytest.approx(7 / 4)
    assert head["speedup_stock"] == pytest.approx(13 / 4)
    assert head["decode_speedup_plain"] == pytest.approx(2.0), "without the prefill"
    assert head["cpu_speedup_plain"] == head["low"]["cpu_speedup_plain"] == pytest.approx(2.0)
    assert body["per_prompt"]["head"]["cpu_seconds"] == [6.0, 6.0]
    assert head["tokens_per_step"] == head["tokens_per_step_mean"] == 3.0
    assert head["bound"] == pytest.approx(3.0 * 1.0 / (0.5 + 1.5)), "t(3) lies between 1 and 5"
    assert head["efficiency"] == pytest.approx(2.0 / 1.5)
    assert head["low"]["speedup_plain"] == head["high"]["speedup_plain"] == pytest.approx(7 / 4)
    assert head["acceptance"]["unconditional"] == [2.0]  # (6 - 2) / 2, as the clockwork counts
    assert head["outside_share"] == pytest.approx(0.1)
    assert plain["plain_overhead"] == pytest.approx(1 / 0.9)
    assert (head["equal_share"], body["methods"]["lookup"]["equal_share"]) == (1.0, 0.5)


def test_samples_of_a_prompt_are_one_batch_and_count_as_one_prompt():
    target, rows = tiny("llama"), prompts((5, 9))
    config = SpeedConfig(
        TargetConfig("x"), "x", n_prompts=2, max_new_tokens=6, samples_per_prompt=3, temperature=1.0
    )
    batches, answers = make_batches(target, rows, config)
    assert [batch.prompts for batch in batches] == [[rows[0]] * 3, [rows[1]] * 3]
    assert [batch.seeds for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert answers == alone(target, [rows[0]] * 3 + [rows[1]] * 3, decoding(config))[0]
    ways = [build_method(n, target, decoding(config), Resources()) for n in ("plain", "consensus")]
    runs = run_interleaved(ways, batches)
    exact = Cost(1.0, 1.0, 1.0)
    costs = CostTable(
        [TargetCost(n, 5, 3, exact) for n in (1, 17)], [DrafterCost("consensus", 5, 3, exact, [])]
    )
    summary = Summary(ways, runs, batches, answers, costs, config, decode=lambda row: f"{row[0]}")
    assert summary._of_prompts([1, 2, 3, 4, 5, 6]).tolist() == [6, 15]
    body = summary.body() | {"warnings": []}
    assert body["exact"] and body["methods"]["consensus"]["equal_rows"] == n_rows(body) == 6
    assert body["n_prompts"] == 2 and len(body["per_prompt"]["consensus"]["tokens"]) == 2
    first = [[str(row[0]) for row in answers[i : i + 3]] for i in (0, 3)]
    assert body["votes"] == [max(said, key=said.count) for said in first]
    assert body["per_prompt"]["consensus"]["votes"] == body["votes"]
    shown = show(body)
    assert "6/6" in shown and "2 prompts, 3 samples of each" in shown
    assert "vote on the last number: plain's for 2 of 2 prompts by every method" in shown
    body["per_prompt"]["consensus"]["votes"][0] = None
    assert "plain's for 1 of 2 prompts by `consensus`, the worst" in show(body)
    assert all(m["cpu_speedup_plain"] > 0 for m in body["methods"].values()), "this is a CPU"
    del body["samples_per_prompt"]  # as files before had none
    assert n_rows(body) == 2 and described_prompts(body) == "2 prompts"
    with pytest.raises(InputError, match="samples_per_prompt to 1"):
        check_resources(["hf-lookup"], config)
    with pytest.raises(InputError, match="samples_per_prompt: 0 must be at least 1"):
        check(replace(config, samples_per_prompt=0))


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["so 1,250.50", "48/2 = 24", "= 1250.50 in all"], "1250.50"),
        (["it is 7.", "it is -7", "none", "-7"], "-7"),
        (["3 or 4", "5"], "4"),  # equally many: the one said first
        (["none", ""], None),
    ],
)
def test_votes_are_on_the_last_number(texts, wanted):
    assert vote(texts) == wanted


def test_results_from_before_an_option_are_those_of_its_default(tmp_path):
    file, config = tmp_path / "speed.json", SpeedConfig(TargetConfig("x"), "x")
    write_result(str(file), config, tiny("llama"), {"figure": 1})
    body = json.loads(file.read_text())
    del body["provenance"]["config"]["samples_per_prompt"]
    file.write_text(json.dumps(body))
    fingerprint = tiny("llama").fingerprint()
    assert read_result(file, config, fingerprint, "x")["figure"] == 1
    with pytest.raises(InputError, match="another samples_per_prompt"):
        read_result(file, replace(config, samples_per_prompt=2), fingerprint, "x")


def test_method_names():
    assert parse_methods("stock, plain,stock,head:8x5") == ["stock", "plain", "head:8x5"]
    names = ["suffix:8x2:lookahead=static(depth=2)", "head:4x4:rule=ratio"]
    assert parse_methods(",".join(names)) == names
    for bad, said in (
        ("warp", "'warp' is unknown; choose from plain, stock, hf-assistant"), ("", "at least one"),
        ("plain:4x4", "plain has no options"), ("stock:4x4", "'stock:4x4'"), ("stock,Head", "Head"),
        ("head:rule=fair", "rule 'fair' is not one of seeded, ratio, kseq"),
        ("head:rule=ratio:rule=kseq", "rule is set twice"),
        ("head:lookahead=clever", "lookahead 'clever' is not one of static"),
        ("head:lookahead=static(deep=2)", "no option 'deep'; there are depth"),
        ("head:lookahead=static", "depth must be given"), ("hf-exit", "layer must be given"),
        ("head:lookahead=static:depth=2:depth=2", "depth"), ("hf-lookup:x", "nor TOKENS, e.g. 4"),
        ("lookup:deep=3", "'lookup:deep=3': no option 'deep'; there are recent, depth, max_ngram"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"^methods: ") as error:
            parse_methods(bad)
        assert said in str(error.value)


def test_plans_reach_the_loop(monkeypatch):
    target = tiny("llama")
    name = "suffix:8x1:lookahead=static(depth=2):rule=ratio"
    strategy = build_strategy(f"{name}:factor=3", target, Resources())
    assert isinstance(strategy.drafter, SuffixDrafter) and strategy.drafter.factor == 3.0
    assert strategy.lookahead.depth == 2 and strategy.rule == "ratio"
    config = generation_config(1.0, 6)
    given = {}
    real = methods.speculative

    def spy(*args, **options):
        given.update(options)
        return real(*args, **options)

    monkeypatch.setattr(methods, "speculative", spy)
    loop = build_method(name, target, config, Resources())
    batch = PromptBatch([[1, 2, 1, 2]], [0], [[1, 2, 1, 2]])
    loop.prepare(batch)
    assert loop.run(batch).nodes and max(loop.run(batch).nodes) == 3, "two levels and the root"
    assert given["rule"] == "ratio" and given["lookahead"].depth == 2 and loop.law_only
    assert loop.stops_early and not build_method("suffix", target, config, Resources()).stops_early
    assert not build_method(name, target, generation_config(0.0, 6), Resources()).law_only
    with pytest.raises(InputError, match="depth 0"):
        build_strategy("suffix:lookahead=static(depth=0)", target, Resources())


def test_number_lists_name_their_option():
    assert number_list("batch_sizes", "1,4,1", int, 1) == [1, 4]
    for bad in ("1,x", "", "0"):
        with pytest.raises(InputError, match="batch_sizes"):
            number_list("batch_sizes", bad, int, 1)


# ---------------------------------------------------------------- held-out rows


def test_head_trained_on_the_evaluated_rows_is_told(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "x"}\n' * 20)
    head = tmp_path / "run" / "head"
    head.mkdir(parents=True)
    assert holdout_warning(str(head), str(file), 0) is None, "nothing is known"
    data = DataConfig(source=SourceConfig(str(file), holdout_rows=5))
    config = TrainConfig(TargetConfig("x"), data, output_dir="x")
    write_config(head.parent / "config.yaml", config)
    assert holdout_warning(str(head), str(file), 15) is None
    assert "first 15 rows" in holdout_warning(str(head), str(file), 14)
    assert holdout_warning(str(head), str(tmp_path / "other.jsonl"), 0) is None


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def files(tiny_target, tmp_path_factory):
    """Arguments that every command takes, and a head with random weights."""
    torch.manual_seed(0)
    head = tmp_path_factory.mktemp("head")
    RecurrentHead.for_target(load_target(str(tiny_target))).save_pretrained(head)
    target = ["--target.path", str(tiny_target)]
    some = ["--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--n_prompts", "3"]
    return {"target": target, "prompts": [*target, *some], "head": ["--head", str(head)]}


def test_speed_command(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "speed.json"
    monkeypatch.setattr(SuffixDrafter, "report", lambda self: {"min_match": self.min_match})
    names = (
        "stock,plain,hf-lookup:4,hf-assistant,lookup,suffix:4x1,bigram:2x2,recycling:warm=true,"
        "model:1x3,replay,head:2x2:beams,suffix:factor=1.5:lookahead=static(depth=2)"
    )
    more = ["--methods", names, "--draft", files["target"][1],
            "--max_new_tokens", "24", "--bigram_prompts", "4", "--cost_rounds", "4"]  # fmt: skip
    assert speed_cli.main([*files["prompts"], *files["head"], *more, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "exact: yes" in shown and "lookup" in shown and "bigrams counted on" in shown
    body = json.loads(out.read_text())
    methods = body["methods"]
    assert list(methods) == names.split(",")
    for name, m in methods.items():
        assert m["equal_share"] == 1.0, name
        assert m["low"]["speedup_plain"] <= m["speedup_plain"] <= m["high"]["speedup_plain"]
        assert m["speedup_stock"] > 0 and m["tokens"] == methods["plain"]["tokens"]
        assert m["loop_share"] == body["loop_share"] and not m["law_only"]
        if name.startswith("hf-"):
            assert m["bound"] is None and m["tokens_per_step"] > 1.0
        elif name not in ("stock", "plain"):
            assert m["efficiency"] == pytest.approx(m["decode_speedup_plain"] / m["bound"])
            assert m["tokens_per_step"] >= 1.0
            assert 0 <= m["outside_share"] < 1
    assert methods["replay"]["tokens_per_step"] > 3.5, "the drafter that knows the answer"
    assert methods["plain"]["plain_overhead"] >= 1.0
    assert methods["plain"]["tokens_per_step"] == 1.0
    assert methods["suffix:4x1"]["drafter_reports"] == [{"min_match": 1}], "once, not per prompt"
    assert methods["lookup"]["drafter_reports"] == []
    sizes = {entry["n"] for entry in body["costs"]["target"]}
    assert {1, 5, 11} <= sizes, "plain, replay and bigram trees, the largest lookup"
    about = body["provenance"]
    assert about["config"]["max_new_tokens"] == 24 and about["target"]["dtype"] == "float32"
    assert {"argv", "versions", "git_commit", "device", "threads", "written"} <= set(about)


def test_speed_command_sampled_in_batches(files, tmp_path, capsys):
    out = tmp_path / "speed.json"
    more = ["--methods", "plain,lookup,replay,lookup:rule=ratio", "--temperature", "1",
            "--batch_size", "2", "--max_new_tokens", "12", "--cost_rounds", "1",
            "--ignore_eos", "true"]  # fmt: skip
    assert speed_cli.main([*files["prompts"], *more, "--out", str(out)]) == 0
    body = json.loads(out.read_text())
    assert body["exact"] is True and body["methods"]["plain"]["tokens"] == 36
    assert body["methods"]["lookup"]["speedup_stock"] is None, "stock was not run"
    ratio = body["methods"]["lookup:rule=ratio"]
    assert ratio["law_only"] and ratio["equal_share"] < 1.0, "which is no fault"
    assert f"({ratio['equal_rows']}/3)" in capsys.readouterr().out


def test_lossless_command(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "lossless.json"
    args = [*files["prompts"], *files["head"], "--max_new_tokens", "16", "--batch_sizes", "1,3",
            "--temperatures", "1,0.5", "--tree.width", "2", "--out", str(out)]  # fmt: skip
    assert lossless_cli.main(args) == 0
    assert "lossless" in capsys.readouterr().out
    modes = json.loads(out.read_text())["methods"]["head"]
    for mode in ("greedy", "seeded", "seeded_0.5"):
        assert modes[mode]["unexplained"] == 0 and modes[mode]["prompts"] == 3
        assert modes[mode]["compared_tokens"] > 50


def test_lossless_command_with_several_methods(files, tmp_path, capsys, monkeypatch):
    """One reference per mode; a difference in any method reaches the exit status."""
    out = tmp_path / "lossless.json"
    names = ["bigram:2x2", "model:1x2", "replay:1x3", "suffix:6x1:lookahead=static(depth=2)",
             "head:2x2:rule=ratio"]  # fmt: skip
    args = [*files["prompts"], *files["head"], "--methods", ",".join(names), "--draft",
            files["target"][1], "--bigram_prompts", "3", "--max_new_tokens", "8",
            "--batch_sizes", "1,2", "--out", str(out)]  # fmt: skip
    runs = []
    real_reference = lossless.reference
    monkeypatch.setattr(
        lossless, "reference", lambda *a, **o: runs.append(a) or real_reference(*a, **o)
    )
    assert lossless_cli.main(args) == 0
    shown = capsys.readouterr().out
    assert "head:2x2:rule=ratio: compared greedily only" in shown
    body = json.loads(out.read_text())
    assert list(body["methods"]) == names and body["greedy_only"] == names[-1:]
    assert "plain answers" in body["bigram_counted_on"]
    for name, modes in body["methods"].items():
        assert list(modes) == (["greedy"] if name == names[-1] else ["greedy", "seeded"])
        assert all(m["unexplained"] == 0 and m["rows_compared"] == 6 for m in modes.values())
    near_tied = sum(m["rows_compared"] - m["rows_equal"]
                    for modes in body["methods"].values() for m in modes.values())  # fmt: skip
    assert len(runs) == 2 * 3 + near_tied, "plain runs once per mode and row, not per method"
    real = lossless.speculative

    def faulty(*args, drafter, **options):
        made = real(*args, drafter=drafter, **options)
        if isinstance(drafter.inner, SuffixDrafter):
            made.tokens[0][5] = (made.tokens[0][5] + 1) % 500
        return made

    monkeypatch.setattr(lossless, "speculative", faulty)
    assert lossless_cli.main(args) == 1
    assert "UNEXPLAINED suffix:6x1" in capsys.readouterr().out
    body = json.loads(out.read_text())["methods"]
    wrong = {name for name, modes in body.items() if any(m["unexplained"] for m in modes.values())}
    assert wrong == {names[3]}


def test_lossless_goes_on_where_it_stopped(files, tmp_path, capsys, monkeypatch):
    """Killed behind two of six pieces; what was compared is not decoded again, and the result is
    that of one run. Other settings are refused."""
    args = [*files["prompts"], "--methods", "suffix:4x1,bigram:2x2", "--max_new_tokens", "8",
            "--bigram_prompts", "3", "--batch_sizes", "1"]  # fmt: skip
    whole, out = tmp_path / "whole.json", tmp_path / "lossless.json"
    assert lossless_cli.main([*args, "--out", str(whole)]) == 0
    journal = tmp_path / "lossless.journal.jsonl"
    real_add = Journal.add

    def killed(self, key, entry):
        if len(self.entries) == 2:
            raise RuntimeError("killed")
        real_add(self, key, entry)

    monkeypatch.setattr(Journal, "add", killed)
    with pytest.raises(RuntimeError, match="killed"):
        lossless_cli.main([*args, "--out", str(out)])
    assert len(journal.read_text().splitlines()) == 3 and not out.exists()
    monkeypatch.setattr(Journal, "add", real_add)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        lossless_cli.main([*args, "--seed", "1", "--out", str(out)])
    assert "lossless.journal.jsonl was made with another seed" in capsys.readouterr().err
    runs, real = [], lossless.reference
    monkeypatch.setattr(lossless, "reference", lambda *a, **o: runs.append(a) or real(*a, **o))
    assert lossless_cli.main([*args, "--out", str(out)]) == 0
    assert len(runs) == 4 and not journal.exists() and not list(tmp_path.glob("*.journal*"))
    one, two = (json.loads(path.read_text())["methods"] for path in (whole, out))
    assert one == two and one["bigram:2x2"]["seeded"]["prompts"] == 3


def test_costs_command(files, tmp_path, capsys):
    out = tmp_path / "costs.json"
    more = ["--new_tokens", "1,3", "--contexts", "16", "--batch_sizes", "1,2", "--rounds", "3",
            "--tree.depth", "2", "--out", str(out)]  # fmt: skip
    assert costs_cli.main([*files["target"], *files["head"], *more]) == 0
    assert "whole draft" in capsys.readouterr().out
    body = json.loads(out.read_text())
    assert len(body["target"]) == 4 and len(body["drafters"][0]["levels"]) == 2


def test_evaluation_takes_the_last_rows_and_counts_on_others(files, tmp_path):
    target = load_target(files["target"][1])
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f'{{"question": "{i}"}}\n' for i in range(9)))
    config = SpeedConfig(TargetConfig("x"), str(file), n_prompts=3, max_new_tokens=4)
    evaluated, others, warnings = evaluation_prompts(target, config, more=4)
    assert [p.row for p in evaluated] == [6, 7, 8]
    assert [p.row for p in others] == [2, 3, 4, 5], "disjoint from the evaluated ones"
    assert warnings == []
    evaluated, others, _ = evaluation_prompts(target, config, more=2, behind=2)
    assert [[p.row for p in part] for part in (others, evaluated)] == [[2, 3], [4, 5, 6]]
    for asked in ({"more": 7}, {"more": 4, "behind": 3}):
        with pytest.raises(InputError, match="9 rows"):
            evaluation_prompts(target, config, **asked)


def test_rows_that_are_too_long_are_left_out_counted_and_named(files, tmp_path):
    target = load_target(files["target"][1])
    file = tmp_path / "p.jsonl"
    long = {3, 6}
    rows = ["x " * 2000 if i in long else str(i) for i in range(9)]
    file.write_text("".join(f'{{"question": "{row}"}}\n' for row in rows))
    config = SpeedConfig(TargetConfig("x"), str(file), n_prompts=3, max_new_tokens=4)
    evaluated, others, (warning,) = evaluation_prompts(target, config, more=4)
    assert [p.row for p in evaluated] == [7, 8], "no other row takes its place"
    assert [p.row for p in others] == [2, 4, 5]
    assert "2 of 7 rows left out" in warning and "room for max_new_tokens" in warning
    assert f"{file}:4 (" in warning and f"{file}:7 (" in warning
    config = SpeedConfig(TargetConfig("x"), str(file), n_prompts=1, max_new_tokens=4)
    _, _, warnings = evaluation_prompts(target, config, behind=1)
    assert warnings == []
    for asked in ({"behind": 2}, {"more": 1, "behind": 1}):  # nothing evaluated, no others
        with pytest.raises(InputError, match=r"p\.jsonl:7 .*shorten the rows or lower"):
            evaluation_prompts(target, config, **asked)


def test_speed_takes_own_columns_and_goes_on_past_a_long_row(files, tmp_path, capsys):
    file, out = tmp_path / "own.jsonl", tmp_path / "speed.json"
    rows = [{"ask": text, "id": 1} for text in ("def f(x):", "x " * 2000, "import os")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--prompts", str(file), "--n_prompts", "3", "--methods", "plain,suffix",
            "--max_new_tokens", "6", "--cost_rounds", "1", "--out", str(out)]  # fmt: skip
    with pytest.raises(SystemExit):
        speed_cli.main([*files["target"], *more])
    assert "prompt_column" in capsys.readouterr().err
    for extra in ([], ["--prompt_format", "columns"]):
        assert speed_cli.main([*files["target"], *more, "--prompt_column", "ask", *extra]) == 0
        assert "warning: 1 of 3 rows left out" in capsys.readouterr().out
        body = json.loads(out.read_text())
        assert body["n_prompts"] == 2
        assert any(f"{file}:2 (" in said for said in body["warnings"])


@pytest.mark.parametrize(
    ("command", "change", "named"),
    [
        (speed_cli, ["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (speed_cli, ["--n_prompts", "100000"], "100000"),
        (speed_cli, ["--methods", "stock,warp"], "warp"),
        (speed_cli, ["--methods", "head"], "--head"),
        (speed_cli, ["--methods", "plain", "--max_new_tokens", "600"], "max_new_tokens"),
        (speed_cli, ["--methods", "plain", "--batch_size", "0"], "batch_size"),
        (speed_cli, ["--methods", "bigram", "--bigrams", "nowhere.st"], "nowhere.st"),
        (speed_cli, ["--methods", "suffix:deep=3"], "no option 'deep'"),
        (speed_cli, ["--methods", "head:4x4"], "'head:4x4' needs --head"),
        (speed_cli, ["--methods", "model:1x2"], "--draft"),
        (speed_cli, ["--methods", "hf-assistant"], "--draft"),
        (speed_cli, ["--methods", "hf-lookup", "--batch_size", "2"], "set batch_size"),
        (speed_cli, ["--methods", "hf-exit:99"], "layer 99"),
        (lossless_cli, ["--head", "no_head"], "no_head"),
        (lossless_cli, [], "'head' needs --head"),
        (lossless_cli, ["--methods", "lookup,stock"], "'stock' does not draft"),
        (lossless_cli, ["--head", "x", "--batch_sizes", "one"], "batch_sizes"),
        (speed_cli, ["--target.path", "./no_model"], "no_model"),
    ],
)
def test_bad_input_is_named_without_a_traceback(files, capsys, command, change, named):
    with pytest.raises(SystemExit) as stop:
        methods = [] if command is lossless_cli else ["--methods", "plain"]
        command.main([*files["prompts"], *methods, *change])
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in shown and "Traceback" not in shown


def test_stock_in_a_padded_batch_is_stock_alone(files):
    from redrafter.evaluation.methods import Stock

    target = load_target(files["target"][1])
    rows = [target.tokenizer(text).input_ids for text in ("def f(", "import os\nimport", "x")]
    config = generation_config(0.0, 12)
    stock, plain = (kind("x", target, config) for kind in (Stock, Loop))
    together = stock.run(PromptBatch(rows, [0, 1, 2])).tokens
    assert together == [stock.run(PromptBatch([row], [0])).tokens[0] for row in rows]
    assert together == plain.run(PromptBatch(rows, [0, 1, 2])).tokens
    assert not math.isnan(stock.run(PromptBatch(rows, [0, 1, 2])).seconds["total"])
