"""Trees whose size and depth are chosen by their price: against brute force, and the text stays."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from models import NEW, Recorder, alone, prompts, random_tree, settings, tiny
from test_draft_model import FREE, SMALL, close_draft, keys_of
from test_head_drafter import make_head

from redrafter.config import TreeConfig
from redrafter.contracts import InputError, Truth
from redrafter.costs import CostMeter
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import BUCKETS
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.model import DraftModel
from redrafter.evaluation.report import write_result

MODES = ({}, dict(do_sample=True, temperature=0.7), dict(do_sample=True, temperature=1.5))
LEVELS = [0.1, 0.2]
FLAT = {1: 1.0, 1000: 1.0 + 1e-9}
STEEP = {1: 1.0, 2: 50.0, 1000: 50_000.0}
SLOPE = {1: 1.0, 5: 1.2, 9: 1.3, 13: 2.0, 41: 5.0}


def seconds(table, n):
    """Straight lines between the measured sizes."""
    known = sorted(table)
    high = next(m for m in known if m >= n)
    if high == n:
        return table[n]
    low = known[known.index(high) - 1]
    return table[low] + (table[high] - table[low]) * (n - low) / (high - low)


def begun(budget, levels, rows=1, most=10_000):
    """A step in which so many levels were drafted that hold nothing."""
    budget.start(torch.ones(rows, dtype=torch.bool), most)
    for _ in range(levels):
        budget.go_on(torch.full((rows, 1), -math.inf, dtype=torch.float64))
    return budget


# ----------------------------------------------------------------------------------------- N


@pytest.mark.parametrize("rule", ["ratio", "rate"])
@pytest.mark.parametrize("table", [FLAT, STEEP, SLOPE])
def test_n_is_the_best_of_all_sizes(table, rule):
    """Against the definition, size by size, on random scores of several rows."""
    random, found = torch.Generator().manual_seed(0), set()
    for case in range(60):
        budget = NodeBudget(table, LEVELS, 0.3, rule=rule)
        levels, rows, n = 1 + case % 4, 1 + case % 3, (1, 6, 12, 24, 40)[case % 5]
        begun(budget, levels, rows)
        budget._tokens, budget._seconds = 1.0 + case % 7, 3.0
        p = torch.rand(rows, n, generator=random, dtype=torch.float64) ** (1 + case % 4)
        draft = 0.3 + 0.1 + 0.2 * (levels - 1)
        best, best_gain = None, -math.inf
        for size in range(1, n + 2):
            if (size not in BUCKETS and size not in (n + 1, max(table))) or size > max(table):
                continue
            tokens = 1 + p.sort(1, descending=True).values[:, : size - 1].sum(1).mean().item()
            gain = tokens / (draft + seconds(table, size))
            if rule == "rate":
                gain = tokens - (1.0 + case % 7) / 3.0 * seconds(table, size)
            if gain > best_gain + 1e-12:
                best, best_gain = size, gain
        assert budget.choose(p.tolist()) == best
        found.add(best if table is SLOPE else (best == n + 1) - (best == 1))
    assert len(found) > 3 if table is SLOPE else found == {1 if table is FLAT else -1}


def test_a_limit_is_never_passed():
    p = [[0.9] * 30]
    assert begun(NodeBudget(FLAT, LEVELS), 2).choose(p) == 31
    assert begun(NodeBudget(FLAT, LEVELS), 2, most=11).choose(p) == 11
    assert begun(NodeBudget({1: 1.0, 6: 1.0}, LEVELS), 2).choose(p) == 6


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.4, 0.9, 1.2), (0.5, 0.6, 0.1)])
def test_what_is_kept_is_a_tree_of_the_best_live_scores(factors):
    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        tree = random_tree(random, 3, 21)
        live = torch.tensor([True, False, True])
        tree.valid = torch.ones_like(tree.valid)
        budget = NodeBudget(SLOPE, LEVELS)
        budget.start(live, 21)
        budget._levels = int(tree.depth.max())
        budget._expected = [1000.0] * 3
        budget._accepted = [1000.0 * f for f in factors]
        tree.log_q[1] = 0.0  # a dead row would take everything
        got = budget.prune(replace(tree))
        for row in (0, 2):
            kept = {got.log_q[row, 0].item()}
            for node in range(1, got.n_nodes):
                parent = int(got.parent[row, node])
                assert parent < node and got.depth[row, node] == got.depth[row, parent] + 1
                assert got.log_q[row, node] <= got.log_q[row, parent] or parent == 0
                kept.add(got.log_q[row, node].item())
            nodes = zip(tree.log_q[row].tolist(), tree.depth[row].tolist(), strict=True)
            scaled = [score + math.log(budget.factor(depth)) for score, depth in nodes]
            want = sorted(scaled[1:], reverse=True)[: got.n_nodes - 1]
            assert sorted(kept - {0.0}, reverse=True) == pytest.approx(want)
        p = tree.log_q.exp() * torch.tensor([budget.factor(d) for d in range(22)])[tree.depth]
        assert got.n_nodes == budget.choose(p[live][:, 1:].tolist())


# ------------------------------------------------------------------------------------- depth


def test_a_level_is_drafted_where_it_pays():
    """Live rows alone: m_1 = .6 and m_2 = .45, so that .36, then .3375 are expected of the next.

    Three nodes are verified, (1 + .85) / (1.0 + 1.0) being the most; a fourth costs 0.2.
    """
    table = {1: 1.0, 3: 1.0, 5: 1.4, 9: 2.2}
    first = torch.tensor([[0.5, 0.1], [1.0, 1.0], [0.4, 0.2]], dtype=torch.float64)
    second = torch.tensor([[0.4, 0.05], [1.0, 1.0], [0.4, 0.05]], dtype=torch.float64)
    for tokens_per_s, wanted in (
        (0.37, [True, True]),  # x 0.9 = .333
        (0.38, [True, False]),  # x 0.9 = .342
        (0.44, [True, False]),  # x 0.8 = .352
        (0.46, [False, False]),  # x 0.8 = .368
    ):
        budget = NodeBudget(table, [0.4, 0.6, 0.7], calibrate=False)
        budget._tokens, budget._seconds = tokens_per_s, 1.0
        budget.start(torch.tensor([True, False, True]), 9)
        assert [budget.go_on(level.log()) for level in (first, second)] == wanted


def test_all_levels_where_asked():
    budget = NodeBudget(STEEP, [9.0], choose_depth=False)
    budget.start(torch.ones(1, dtype=torch.bool), 99)
    assert budget.go_on(torch.full((1, 2), -50.0))


# ---------------------------------------------------------------------------- what is learned


def test_scores_are_compared_with_what_was_accepted():
    target = tiny("llama")
    budget = NodeBudget(SLOPE, LEVELS, 0.3, choose_depth=False)
    drafter = HeadDrafter(make_head(target, "own"), target, TreeConfig(3, 3), budget)
    expected, accepted, tokens, spent = [0.0] * 3, [0.0] * 3, 16.0, 16.0

    class Watch(Recorder):
        def observe(self, truth: Truth) -> None:
            nonlocal tokens, spent
            super().observe(truth)
            if truth.tree is None:
                return
            live = (truth.count > 0).nonzero()[:, 0].tolist()
            tokens += sum(truth.count[live].tolist()) / len(live) if live else 0
            spent += 0.3 + 0.1 + 0.2 + 0.2 + seconds(SLOPE, truth.tree.n_nodes) if live else 0
            for row in live:
                for node in range(1, truth.tree.n_nodes):
                    depth = int(truth.tree.depth[row, node])
                    if truth.tree.valid[row, node]:
                        raw = truth.tree.log_q[row, node].exp().item() / before[depth - 1]
                        expected[depth - 1] += raw
                for depth in range(1, int(truth.count[row])):
                    accepted[depth - 1] += 1

        def tree(self):
            nonlocal before
            before = [budget.factor(d) for d in (1, 2, 3)]
            return super().tree()

    before = []
    speculative(target, prompts(), settings(**FREE), drafter=Watch(drafter))
    assert budget._expected == pytest.approx(expected) and budget._accepted == accepted
    assert budget.tokens_per_s == pytest.approx(tokens / spent)
    ratios = [(a + 16) / (e + 16) for a, e in zip(accepted, expected, strict=True)]
    assert min(ratios) < 0.95  # a random head is too sure of itself
    assert [budget.factor(d) for d in (1, 2, 3)] == pytest.approx(
        [min(ratios[:d]) for d in (1, 2, 3)]
    )


# ---------------------------------------------------------------------------------- drafters


def make(kind, target, **options):
    table = {1: 1.0, 3: 1.02, 5: 1.05, 9: 1.2, 13: 1.5}
    budget = NodeBudget(table, [0.01, 0.02], **options)
    if kind == "head":
        return HeadDrafter(make_head(target, "own"), target, TreeConfig(3, 4), budget)
    if kind == "nodes":
        return DraftModel(close_draft(target, 0.1), target, 4, 3, nodes=6)
    small = tiny("llama", **SMALL, num_key_value_heads=1)
    draft = close_draft(target, 0.1) if kind == "close" else small
    return DraftModel(draft, target, 4, 3, budget=budget)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("llama", kind) for kind in ("head", "close", "small", "nodes")),
     ("gpt2", "close"), ("gemma3_text", "nodes")],
)  # fmt: skip
def test_text_is_plain_decoding(family, kind, mode):
    target, rows, config = tiny(family), prompts(), settings(**MODES[mode])
    drafter = Recorder(make(kind, target, rule=("ratio", "rate", "ratio")[mode]))
    seeds = [0, 1, 2, 3]
    want = alone(target, rows, config, seeds)
    for part in (slice(0, None), slice(-1, None)):
        got = speculative(target, rows[part], config, seeds=seeds[part], drafter=drafter)
        assert (got.tokens, got.finish) == (want[0][part], want[1][part])
    assert max(tree.n_nodes for tree, *_ in drafter.steps) <= drafter.max_nodes


def test_sizes_and_depths_vary():
    target = tiny("llama")
    for kind in ("head", "close"):
        drafter = Recorder(make(kind, target))
        config = settings(do_sample=True, **FREE, max_new_tokens=40)
        speculative(target, prompts()[:1], config, seeds=[0], drafter=drafter)
        assert len({tree.n_nodes for tree, *_ in drafter.steps}) > 2
        assert len({int(tree.depth.max()) for tree, *_ in drafter.steps}) > 1
        assert sum(drafter.inner.budget._accepted) > 0  # both drafters tell it what became of it


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("kind", ["close", "nodes"])
def test_pruning_leaves_the_draft_models_cache_alone(kind, mode):
    target, rows = tiny("llama"), prompts()
    drafter = make(kind, target)
    for n_tokens in (2, 9, NEW):
        config = settings(**MODES[mode], **FREE, max_new_tokens=n_tokens)
        got = speculative(target, rows, config, seeds=range(4), drafter=Recorder(drafter))
        for b, row in enumerate(rows):
            known = int(drafter.frontier._known[b])
            assert known > len(row)
            fresh = keys_of(drafter.draft, (row + got.tokens[b])[:known])
            for layer, want in enumerate(fresh):
                keys = drafter.frontier._cache._views[layer][0][b, :, :known]
                torch.testing.assert_close(keys, want, rtol=0, atol=1e-10)


def test_an_ended_draft_costs_nothing_more(monkeypatch):
    target = tiny("llama")
    budget = NodeBudget(FLAT, [0.01, 1e9])  # no second level
    drafter = DraftModel(close_draft(target, 0.1), target, 4, 3, budget=budget)
    calls, forward = [], drafter.draft.forward
    monkeypatch.setattr(drafter.draft, "forward", lambda *a: calls.append(1) or forward(*a))
    seen = Recorder(drafter)
    got = speculative(target, prompts(), settings(**FREE), drafter=seen)
    assert len(calls) == 1 + got.stats.forwards
    assert {tree.n_nodes for tree, *_ in seen.steps} == {4}
    assert got.stats.drafted_at[1:] == [0, 0, 0]


def test_rows_that_outgrow_the_draft_model():
    target, rows, config = tiny("llama"), prompts(), settings(**FREE)
    draft = tiny("llama", **SMALL, num_key_value_heads=1, max_position_embeddings=17)
    drafter = DraftModel(draft, target, 4, 3, budget=NodeBudget(FLAT, [1e-3]))
    seen = Recorder(drafter)
    got = speculative(target, rows, config, drafter=seen)
    assert got.tokens == alone(target, rows, config)[0]
    # Where one level alone has room, and where none has, nothing deeper is verified.
    assert {1, 4} < {tree.n_nodes for tree, *_ in seen.steps}


def test_best_nodes_of_a_draft_model():
    """`nodes` keeps the best of the tree that is drafted without it."""
    target = tiny("llama")
    draft = close_draft(target, 0.1)
    whole, best = (Recorder(DraftModel(draft, target, 4, 3, nodes=n)) for n in (None, 6))
    for seen in (whole, best):
        speculative(target, prompts()[:1], settings(**FREE, max_new_tokens=2), drafter=seen)
    (tree, *_), (small, *_) = whole.steps[0], best.steps[0]
    assert (tree.n_nodes, small.n_nodes) == (13, 6) and best.max_nodes == 6
    wanted = tree.log_q[0].sort(descending=True).values[:6]
    assert torch.equal(small.log_q[0].sort(descending=True).values, wanted)


# ------------------------------------------------------------------------------ where from


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of eval/costs.py, and its content."""
    target = tiny("llama")
    head = HeadDrafter(make_head(target, "own"), target, TreeConfig(2, 3))
    table = CostMeter(target, new_tokens=(1, 3, 7), contexts=(8, 16), batches=(1, 2),
                      drafters={"head:2x3": head}).run(3)  # fmt: skip
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    write_result(str(path), TreeConfig(), target, asdict(table))
    return path, json.loads(path.read_text()), table, target


def test_from_costs(measured):
    path, content, table, target = measured
    for costs in (path, content):
        budget = NodeBudget.from_costs(costs, 2, 8, target=target, rule="rate")
        assert budget.max_nodes == 7 and budget.rule == "rate"
        draft = next(d for d in table.drafters if (d.batch, d.context) == (2, 8))
        assert budget.level_s == [level.q1_s for level in draft.levels]
        whole = max(draft.draft.q1_s, sum(budget.level_s))
        assert budget.start_s + sum(budget.level_s) == pytest.approx(whole)
        for n in (1, 3, 7):
            larger = [table.t(m, 8, 2) for m in (1, 3, 7) if m >= n]
            assert budget._t[n] == min(larger)
        assert budget._t[2] == pytest.approx((budget._t[1] + budget._t[3]) / 2)
    longest = NodeBudget.from_costs(path)
    assert longest._t[7] == table.t(7, 16, 1)


def test_foreign_costs_are_refused(measured, tmp_path):
    path, content, _, target = measured
    for changes, named in (
        (dict(batch=3), r"batch 3 .* there are \(batch, context\) \[\(1, 8\)"),
        (dict(context=9), "context 9"),
        (dict(drafter="other"), r"'other', one is needed; there are \['head:2x3'\]"),
        (dict(target=tiny("gpt2")), "measured with target"),
    ):
        with pytest.raises(InputError, match=named):
            NodeBudget.from_costs(path, **changes)
    assert NodeBudget.from_costs(path, target=tiny("gpt2"), allow_other=True)
    facts = content["provenance"]
    for key, value in (("device", "Another CPU"), ("threads", 99)):
        other = {**content, "provenance": {**facts, key: value}}
        with pytest.raises(InputError, match=f"measured with {key} {value}"):
            NodeBudget.from_costs(other, target=target)
    with pytest.raises(InputError, match="0 measured drafters"):
        NodeBudget.from_costs({**content, "drafters": []})
    (tmp_path / "other.json").write_text('{"methods": []}')
    with pytest.raises(InputError, match=r"other\.json holds no cost table"):
        NodeBudget.from_costs(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"missing\.json cannot be read"):
        NodeBudget.from_costs(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(({2: 1.0}, [1.0]), "N = 1"), (({1: 1.0}, []), "level_s"), (({1: 0.0}, [1.0]), "> 0"),
     (({1: 1.0}, [1.0], -1.0), "start_s"), (({1: 1.0}, [1.0], 0.0, ), None)],
)  # fmt: skip
def test_impossible_costs_are_refused(arguments, named):
    if named is None:
        with pytest.raises(InputError, match="rule 'both'"):
            NodeBudget(*arguments, rule="both")
        return
    with pytest.raises(InputError, match=named):
        NodeBudget(*arguments)
    with pytest.raises(InputError, match="nodes 0"):
        DraftModel(tiny("gpt2"), tiny("llama"), nodes=0)


def test_a_draft_is_priced_by_the_levels_that_were_drafted():
    budget = NodeBudget({1: 1.0}, [0.1, 0.2], 0.05)
    assert budget.draft_s([1.0, 0.5]) == pytest.approx(0.25)
    assert budget.draft_s([1.0, 1.0, 1.0]) == pytest.approx(0.55)  # deeper ones cost the last
