"""Draft & Verify's stop: the bar's update by hand, one bar a row, and the token below it stays."""

import pytest
import torch
from models import NEW, alone, prompts, settings, tiny

from redrafter.contracts import InputError, RowState
from redrafter.decode.speculative import speculative
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.skipping import LayerSkipping
from redrafter.lookahead.draft_exit import DraftExit

K = 4


def rows(n: int, seeds=None) -> RowState:
    one = torch.ones(n, dtype=torch.long)
    return RowState(torch.zeros(n, 8, dtype=torch.long), one, one, one.bool(), seeds=seeds)


def started(n: int, **options) -> DraftExit:
    exit_ = DraftExit(("q",), K, name="q", **options)
    exit_.begin(rows(n))
    return exit_


def told(exit_: DraftExit, drafted: list[int], accepted: list[int]) -> list[float]:
    exit_.observe(torch.tensor(drafted), torch.tensor(accepted), None)
    return exit_.threshold.tolist()


def test_the_update_by_hand():
    """th0 0.8, beta1 0.5, alpha 0.9, eps 0.01, beta2 0.9; three steps of four rows."""
    exit_ = started(4)
    # All accepted: A = .5 < .9 all the same, so every bar but the idle row's rises by .1 * .01.
    assert told(exit_, [4, 2, 2, 0], [4, 2, 1, 0]) == pytest.approx([0.801, 0.801, 0.801, 0.8])
    assert exit_.accepted.tolist() == pytest.approx([0.5, 0.5, 0.25, 0.0])
    # A = .75, .75, .125, .5: still below.
    assert told(exit_, [4, 2, 2, 1], [4, 2, 0, 1]) == pytest.approx([0.802, 0.802, 0.802, 0.801])
    for _ in range(2):  # A = .875, then .9375, and now it is enough
        before = exit_.threshold.tolist()
        after = told(exit_, [4, 2, 2, 0], [4, 2, 0, 0])
    assert exit_.accepted.tolist() == pytest.approx([0.9375, 0.9375, 0.03125, 0.5])
    step = [b - a for a, b in zip(before, after, strict=True)]
    # All K drafted: the bar stays. Fewer: it falls. Too little accepted: it rises. Idle: nothing.
    assert step == pytest.approx([0, -0.001, 0.001, 0], abs=1e-6)


def test_other_constants():
    exit_ = started(1, threshold=0.6, alpha=0.4, beta1=0.0, beta2=0.0, eps=0.1)
    assert told(exit_, [2], [1]) == pytest.approx([0.5])  # A = 1/2, th = th'
    assert told(exit_, [3], [1]) == pytest.approx([0.6])  # A = 1/3
    assert told(exit_, [4], [4]) == pytest.approx([0.6])


def test_the_bar_starts_by_mode_and_anew():
    exit_ = started(2)
    told(exit_, [1, 1], [0, 1])
    exit_.begin(rows(3))
    assert exit_.threshold.tolist() == pytest.approx([0.8] * 3)
    assert exit_.accepted.tolist() == [0.0] * 3
    exit_.begin(rows(2, seeds=torch.tensor([1, 2])))
    assert exit_.threshold.tolist() == [0.5] * 2
    assert started(1, threshold=0.25).threshold.tolist() == [0.25]


def test_it_goes_on_iff_the_token_reaches_the_bar():
    exit_ = DraftExit(("other", "q"), K, name="q", threshold=0.5)
    exit_.begin(rows(3))
    assert exit_.reads == ("q",)
    features = torch.tensor([[0.5], [0.49], [0.9]])
    assert exit_.go_on(features, 1).tolist() == [True, False, True]


class Watched(DraftExit):
    """Remembers the answers and the outcomes of every step."""

    def begin(self, seqs):
        super().begin(seqs)
        self.answers, self.steps = [], []

    def go_on(self, features, level):
        self.answers.append(super().go_on(features, level))
        assert torch.equal(self.answers[-1], features[:, 0] >= self.threshold)
        return self.answers[-1]

    def observe(self, drafted, accepted, truth):
        if truth.tree is None:  # the prefill
            return
        self.steps.append((self.answers, drafted.tolist(), accepted.tolist()))
        super().observe(drafted, accepted, truth)
        self.answers = []


@pytest.mark.parametrize("mode", [{}, dict(do_sample=True, temperature=0.7)])
def test_the_token_below_the_bar_is_verified(mode):
    """Levels drafted: those up to the first low one, that one included."""
    target, texts = tiny("llama"), prompts()
    config = settings(**mode, eos_token_id=-1)
    drafter = LayerSkipping(target, K, fixed=(1,))
    lookahead = Watched.of(drafter, threshold=0.3)
    got = speculative(target, texts, config, seeds=range(4), drafter=drafter, lookahead=lookahead)
    assert got.tokens == alone(target, texts, config)[0]
    lengths, left = set(), [NEW - 1] * len(texts)  # the prefill's own token is out already
    for answers, drafted, accepted in lookahead.steps:
        for row, (n, m) in enumerate(zip(drafted, accepted, strict=True)):
            said = [bool(answer[row]) for answer in answers]
            stop = said.index(False) + 1 if False in said else K
            assert n == min(stop, max(left[row], 0))
            if left[row] > 0:
                left[row] -= m + 1
                lengths.add(n)
    assert {1, 2, K} <= lengths


def test_what_it_cannot_read_is_refused():
    with pytest.raises(InputError, match="chain_score, not p_token"):
        DraftExit.of(PromptLookup())
    with pytest.raises(InputError, match="nothing, not p_token"):
        DraftExit((), K)
    with pytest.raises(InputError, match="eps 2"):
        DraftExit(("p_token",), K, eps=2)
