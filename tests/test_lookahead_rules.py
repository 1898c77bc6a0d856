"""Lookaheads that are rules of thumb, and the oracle: what they decide, by hand."""

import numpy as np
import pytest
import torch

from redrafter.contracts import InputError, Lookahead, RowState, Truth
from redrafter.drafters.lookup import CHAIN_FEATURES, PromptLookup
from redrafter.lookahead.confidence import ConfidenceLookahead
from redrafter.lookahead.heuristic import HeuristicLookahead
from redrafter.lookahead.oracle import FullDepth, OracleLookahead
from redrafter.lookahead.roc import RocLookahead, best_threshold

PREFILL = Truth(torch.zeros(1, 1).long(), torch.ones(1).long())


def rows(n: int, length: int = 1) -> RowState:
    one = torch.ones(n, dtype=torch.long)
    return RowState(torch.zeros(n, 8, dtype=torch.long), one * length, one, one.bool())


def begun(lookahead: Lookahead, n: int) -> Lookahead:
    lookahead.begin(rows(n))
    lookahead.observe(torch.zeros(n).long(), torch.zeros(n).long(), PREFILL)
    return lookahead


def told(lookahead: Lookahead, drafted: list[int], accepted: list[int]) -> None:
    lookahead.observe(torch.tensor(drafted), torch.tensor(accepted), None)


# ---------------------------------------------------------------- the rules by hand


def test_heuristic_by_hand():
    rule = begun(HeuristicLookahead(), 5)
    assert rule.plan().tolist() == [5] * 5, "the prefill drafted nothing"
    # All accepted, all but one, none, a shorter chain that was accepted whole, nothing drafted.
    told(rule, [5, 5, 5, 2, 0], [5, 4, 0, 2, 0])
    assert rule.plan().tolist() == [7, 4, 4, 7, 5]
    for _ in range(5):
        told(rule, [7, 4, 1, 7, 0], [7, 0, 0, 6, 0])
    assert rule.plan().tolist() == [17, 1, 1, 2, 5]


def test_heuristic_bounds_and_generations():
    drafter = PromptLookup(6)
    rule = begun(HeuristicLookahead.of(drafter), 2)
    told(rule, [5, 5], [5, 0])
    assert rule.plan().tolist() == [6, 4], "no further than the drafter can"
    assert begun(rule, 2).plan().tolist() == [5, 5]
    assert begun(HeuristicLookahead.of(PromptLookup(3)), 1).plan().tolist() == [3]
    kept = begun(HeuristicLookahead(2, more=3, less=2, keep=True), 2)
    told(kept, [1, 1], [1, 0])
    assert begun(kept, 2).plan().tolist() == [5, 1]
    assert begun(kept, 3).plan().tolist() == [2, 2, 2]
    assert not kept.level_by_level
    for options, word in ((dict(start=0), "start 0"), (dict(more=-1), "more -1"),
                          (dict(less=-1), "less -1"), (dict(most=0), "most 0")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            HeuristicLookahead(**options)


def test_confidence_by_hand():
    stop = begun(ConfidenceLookahead(("other", "p_level"), 0.5), 3)
    assert stop.reads == ("p_level",)
    features = torch.tensor([[0.5], [0.49], [0.9]])
    assert stop.go_on(features, 1).tolist() == [True, False, True]
    assert stop.go_on(None, 2) is False, "nothing was drafted"
    both = ConfidenceLookahead(("p_level", "p_token"))
    assert both.name == "p_token" and both.threshold == 0.4
    # The score of a path, of the level just drafted.
    path = begun(ConfidenceLookahead(("best_log_q",), 0.5), 3)
    assert path.go_on(torch.tensor([[0.0], [-0.6], [-0.8]]), 1).tolist() == [True, True, False]
    for names, word in (((), "publishes nothing"), (("found",), "found, and not how sure")):
        with pytest.raises(InputError, match=word):
            ConfidenceLookahead(names)
    with pytest.raises(InputError, match="threshold 1"):
        ConfidenceLookahead(("p_level",), 1.5)


def test_confidence_in_what_is_said_of_the_level_to_come():
    """A copied chain scores a token before it is drafted; it is drafted all the same, as the token
    below the bar always is."""
    stop = begun(ConfidenceLookahead(CHAIN_FEATURES, 0.5), 3)

    def said(*scores):
        return torch.tensor(scores)[:, None]

    assert stop.reads == ("chain_score",)
    assert stop.go_on(said(-0.1, -0.8, 0.0), 0) is True  # of level 1; in row 2 there is none
    assert stop.go_on(said(-0.6, -0.9, 0.0), 1).tolist() == [True, False, False]
    assert stop.go_on(said(-0.8, -1.0, 0.0), 2).tolist() == [True, False, False]
    assert stop.go_on(said(0.0, 0.0, 0.0), 3).tolist() == [False, False, False]


def brute_force(q, right, miss_weight):
    """scikit-learn's roc_curve without dropped points, and transformers' choice."""
    best = None
    for threshold in sorted(set(q), reverse=True):
        passed = [r for x, r in zip(q, right, strict=True) if x >= threshold]
        wrong, n_right = len(passed) - sum(passed), sum(right)
        # fpr + miss_weight (1 - tpr), times both counts
        cost = wrong * n_right + miss_weight * (n_right - sum(passed)) * (len(q) - n_right)
        if best is None or cost < best[0]:
            best = cost, threshold
    return best[1]


def test_best_threshold_is_brute_forces():
    assert best_threshold(np.array([0.2, 0.4, 0.6]), np.array([False, True, True]), 3.0) == 0.4
    # To miss one of two costs more than to pass the only wrong one, unless misses cost less.
    mixed = np.array([0.2, 0.4, 0.6]), np.array([True, False, True])
    assert best_threshold(*mixed, 3.0) == 0.2 and best_threshold(*mixed, 1.0) == 0.6
    random, ties, places = np.random.default_rng(0), 0, set()
    for _ in range(400):
        n = int(random.integers(2, 30))
        q = np.sort(random.integers(0, random.integers(2, 40), n) / 40)
        right = random.random(n) < 0.2 + 0.6 * q
        right[0], right[-1] = (False, True) if random.random() < 0.5 else (True, False)
        weight = float(random.choice([0.5, 1.0, 3.0]))
        got = best_threshold(q, right, weight)
        assert got == brute_force(q.tolist(), right.tolist(), weight)
        ties += len(set(q)) < n
        places.add((got == q[0], got == q[-1]))
    assert ties > 100 and len(places) >= 3, "equal scores; ends and middles were chosen"


def test_roc_by_hand():
    """Accepted levels are 1s, the first rejected one a 0, what is behind it nothing."""
    bar = begun(RocLookahead(("p_level",)), 3)

    def step(levels, drafted, accepted):
        answers = []
        for level, q in enumerate(levels, start=1):
            answer = bar.go_on(torch.tensor(q, dtype=torch.float64)[:, None], level)
            answers.append(answer.tolist())
        told(bar, drafted, accepted)
        return answers

    # Row 0: both accepted. Row 1: the first one rejected. Row 2: stopped after level 1, accepted.
    said = step([[0.9, 0.5, 0.3], [0.8, 0.7, 0.9]], [2, 2, 1], [2, 0, 1])
    assert said == [[True, True, False], [True, True, True]]
    assert sorted(zip(bar.q, bar.right, strict=True)) == [(0.3, 1), (0.5, 0), (0.8, 1), (0.9, 1)]
    assert bar.threshold == 0.4, "four samples are too few"
    told(bar, [0, 0, 0], [0, 0, 0])  # a step without a draft
    assert len(bar.q) == 4
    # Level 3 is drafted and its q not known; of row 2 nothing is verified.
    step([[0.6, 0.45, 0.2], [0.35, 0.9, 0.9]], [3, 2, 0], [3, 1, 0])
    assert list(zip(bar.q, bar.right, strict=True)) == [
        (0.3, 1), (0.35, 1), (0.45, 1), (0.5, 0), (0.6, 1), (0.8, 1), (0.9, 0), (0.9, 1),
    ]  # fmt: skip
    # Right: .3 .35 .45 .6 .8 .9, wrong: .5 .9. From .6 on: 1/2 + 3 * 3/6; all: 1.
    assert bar.threshold == 0.3
    assert begun(bar, 2).threshold == 0.3 and len(bar.q) == 8, "kept for the next generation"
    quick = begun(RocLookahead(("p_level",), 0.2, least_samples=2, miss_weight=0.5), 2)
    quick.go_on(torch.tensor([[0.7], [0.6]], dtype=torch.float64), 1)
    told(quick, [1, 1], [1, 1])
    assert quick.threshold == 0.2, "of one kind only"
    quick.go_on(torch.tensor([[0.65], [0.6]], dtype=torch.float64), 1)
    told(quick, [1, 1], [0, 0])
    assert quick.threshold == 0.7
    for options, word in ((dict(least_samples=1), "least_samples 1"),
                          (dict(miss_weight=0.0), "miss_weight 0")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            RocLookahead(("p_level",), **options)


def test_roc_of_many_samples():
    """Equal to the estimate of all samples at once, from time to time only; none is lost."""
    bar, random = begun(RocLookahead(("p_level",)), 2), torch.Generator().manual_seed(0)
    q, right, estimates = [], [], 0
    for _ in range(1300):
        now = torch.rand(2, 2, generator=random, dtype=torch.float64)
        accepted = torch.rand(2, generator=random) < now[0]  # of one level that is verified
        for level in (1, 2):
            bar.go_on(now[level - 1 : level].T, level)
        before = bar.q
        told(bar, [1, 1], accepted.long().tolist())
        q += now[0].tolist()
        right += accepted.tolist()
        if bar.q is not before:
            estimates += 1
            order = np.argsort(q, kind="stable")
            if len(q) > 5:
                assert bar.threshold == best_threshold(
                    np.array(q)[order], np.array(right)[order], 3
                )
    assert 1140 < estimates < 1160, "after every step up to 2000 samples, then every second one"
    assert len(q) - len(bar.q) == len(bar._new) <= 2


def test_no_level_reads_the_host():
    """A meta tensor has no content that could be read."""
    with torch.device("meta"):
        seqs, features = rows(3), torch.zeros(3, len(CHAIN_FEATURES))
        for names in (("p_level",), ("best_log_q",), CHAIN_FEATURES):
            for kind in (ConfidenceLookahead, RocLookahead):
                stop = kind(names)
                stop.begin(seqs)
                answers = [stop.go_on(features[:, : len(names)], level) for level in range(3)]
                assert answers[0] is True and answers[1].is_meta and answers[2].shape == (3,)
        rule = HeuristicLookahead()
        rule.begin(seqs)
        told(rule, [1, 1, 1], [1, 0, 1])
        assert rule.plan().is_meta


def test_oracle_by_hand():
    full, seqs = FullDepth(), rows(2, 4)
    full.begin(seqs)
    full.observe(torch.tensor([0, 0]), torch.tensor([0, 0]), PREFILL)
    tree = Truth(PREFILL.tokens, PREFILL.count, tree=object())
    for length, live, accepted in (([4, 4], [1, 1], [2, 0]), ([7, 5], [1, 0], [1, 3])):
        seqs.length, seqs.live = torch.tensor(length), torch.tensor(live).bool()
        assert full.plan() is None
        seqs.length = seqs.length + 1  # the loop has moved on when it tells
        full.observe(torch.tensor([3, 3]), torch.tensor(accepted), tree)
    assert full.depths == [{4: 2, 7: 1}, {4: 0}]
    oracle = OracleLookahead(full.depths)
    oracle.begin(seqs)
    seqs.length, seqs.live = torch.tensor([7, 9]), torch.tensor([True, False])
    assert oracle.plan().tolist() == [1, 0]
    seqs.live = torch.tensor([True, True])
    with pytest.raises(InputError, match="row 1 has 9 tokens"):
        oracle.plan()
    lax = OracleLookahead(full.depths, strict=False)
    lax.begin(seqs)
    assert lax.plan()[0] == 1 and lax.plan()[1] > 100 and lax.unknown_steps == 2
    for bad, words in ((OracleLookahead(), "FullDepth first"), (OracleLookahead([{}]), "1 rows")):
        with pytest.raises(InputError, match=words):
            bad.begin(seqs)
