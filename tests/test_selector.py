"""The selector: the text never changes, the arm that pays is found, and found again."""

import itertools
import math

import pytest
from models import RandomLookahead, alone, endless, prompts, settings, tiny
from test_draft_model import BOTH, MODES, close_draft, keys_of
from test_mixture import members

from redrafter.contracts import InputError
from redrafter.decode.speculative import speculative
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.model import DraftModel
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.selector import POLICIES, Arms, Selector
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafters.suffix import SuffixDrafter


def ticking(step_s: float = 1e-3):
    """A clock that goes on by one tick whenever it is read: levels cost, whatever the machine."""
    count = itertools.count()
    return lambda: next(count) * step_s


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_text_is_plain_decoding(family, mode, policy):
    target, rows, config = tiny(family), prompts(), settings(**MODES[mode])
    want = alone(target, rows, config)
    arms = members(target, endless(target, rows, config))
    draft = Selector(arms, policy, exploration=1.0, clock=ticking())
    for lookahead in (None, RandomLookahead(4, 3)):
        got = speculative(target, rows, config, seeds=range(4), drafter=draft, lookahead=lookahead)
        assert (got.tokens, got.finish) == want
    report = got.extra["drafter"]
    assert sum(arm["share_of_steps"] for arm in report.values()) == pytest.approx(1)


def test_an_idle_arm_catches_up():
    """The second model is chosen now and then only; its cache is right all the same."""
    target, rows = tiny("llama"), prompts()
    config = settings(eos_token_id=-1, max_new_tokens=30)
    model = DraftModel(close_draft(target, 0.05), target, 3, 2)
    texts = endless(target, rows, config)
    arms = {"model": model, "replay": ReplayDrafter(texts, target.vocab_size, 4, 1, 1.0, False, 0)}
    draft = Selector(arms, "ucb", exploration=1.0, memory_steps=20, clock=ticking())
    got = speculative(target, rows, config, drafter=draft)
    assert got.tokens == alone(target, rows, config)[0]
    assert 0 < draft.chosen.count(0) < len(draft.chosen)
    assert any(a == 1 and b == 0 for a, b in itertools.pairwise(draft.chosen))
    for b, row in enumerate(rows):
        known = int(model.frontier._known[b])
        fresh = keys_of(model.draft, (row + got.tokens[b])[:known])
        for layer, want in enumerate(fresh):
            keys = model.frontier._cache._views[layer][0][b, :, :known]
            assert (keys - want).abs().max() < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
def test_an_arm_that_watches_forwards_may_be_idle(policy):
    """Before it has drafted anything, too: the first arm is the first that is tried."""
    target, rows = tiny("llama"), prompts()
    skip = LayerSkipping(target, 3, threshold=None, max_skipped=1, refresh="step")
    draft = Selector({"suffix": SuffixDrafter(4), "skip": skip}, policy, clock=ticking())
    got = speculative(target, rows, settings(), drafter=draft)
    assert got.tokens == alone(target, rows, settings())[0]
    assert draft.chosen[0] == 0 or policy == "hedge"


def test_the_tokens_of_rows_that_end_count():
    target, rows = tiny("llama"), prompts()
    draft = Selector(
        {"suffix": SuffixDrafter(4), "lookup": PromptLookup(3, 2)}, memory_steps=1e12,
        clock=ticking(),
    )  # fmt: skip
    got = speculative(target, rows, settings(), drafter=draft)
    assert sum(draft.arms.tokens) == pytest.approx(sum(got.stats.emitted))
    assert sum(draft.arms.steps) == pytest.approx(got.stats.forwards)


def test_worth_is_a_ratio_of_sums():
    arms = Arms(2, memory_steps=1e12)
    assert arms.worth(0) == math.inf and arms.overall() == 0
    arms.add(0, 1, 1.0)
    arms.add(0, 9, 1.0)  # the mean of rates would be the same here ...
    arms.add(1, 1, 0.1)
    arms.add(1, 1, 1.9)  # ... and 5.3 here
    assert arms.worth(0) == pytest.approx(5) and arms.worth(1) == pytest.approx(1)
    assert arms.overall() == pytest.approx(3)
    assert arms.ucb(0.0) == 0
    # The bonus is the arm's own: one that was tried less is tried again.
    for _ in range(50):
        arms.add(0, 5, 1.0)
    assert arms.ucb(0.0) == 0 and arms.ucb(5.0) == 1


def test_older_steps_count_less():
    arms = Arms(1, memory_steps=10)
    for _ in range(200):
        arms.add(0, 1, 1.0)
    for _ in range(10):
        arms.add(0, 3, 1.0)
    assert arms.worth(0) == pytest.approx(3 - 2 / math.e, rel=0.02)


class Sometimes(ReplayDrafter):
    """Right with a probability that can be changed."""

    def __init__(self, texts, vocab, acceptance, seed):
        super().__init__(texts, vocab, 4, 1, acceptance, False, seed)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_arm_that_pays_is_found_and_found_again(policy):
    target, rows = tiny("llama"), prompts((5,))
    config = settings(eos_token_id=-1, max_new_tokens=50)
    texts = endless(target, rows, config)
    good, bad = (Sometimes(texts, target.vocab_size, a, s) for a, s in ((0.9, 0), (0.1, 1)))
    draft = Selector({"a": good, "b": bad}, policy, memory_steps=60, clock=ticking())
    shares = []
    for generation in range(16):
        if generation == 8:  # the domain changes
            good.acceptance, bad.acceptance = bad.acceptance, good.acceptance
        speculative(target, rows, config, drafter=draft)
        shares.append(draft.chosen.count(0) / len(draft.chosen))
    assert min(shares[3:8]) > 0.5 and sum(shares[3:8]) / 5 > 0.75
    assert max(shares[12:]) < 0.5 and sum(shares[12:]) / 4 < 0.25


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cheaper_arm_wins_at_equal_tokens(policy):
    """Both are always right at the first level and never below it; one drafts six levels for it."""
    target, rows = tiny("llama"), prompts((5,))
    config = settings(eos_token_id=-1, max_new_tokens=50)
    texts = endless(target, rows, config)

    class OneRight(ReplayDrafter):
        def tree(self):
            tree = super().tree()
            wrong = (tree.tokens + 1) % self.vocab_size
            tree.tokens = tree.tokens.where(tree.depth < 2, wrong)
            return tree

    arms = {
        "deep": OneRight(texts, target.vocab_size, 6, 1, 1.0, False, 0),
        "short": OneRight(texts, target.vocab_size, 1, 1, 1.0, False, 0),
    }
    draft = Selector(arms, policy, eta=2.0, clock=ticking(0.05))
    for _ in range(4):
        speculative(target, rows, config, drafter=draft)
    assert draft.chosen.count(1) / len(draft.chosen) > 0.7


def test_bad_options_are_named():
    two = {"a": SuffixDrafter(), "b": SuffixDrafter(4)}
    for options, words in (
        ((dict(list(two.items())[:1]),), "two"),
        ((two, "exp3"), "'exp3'"),
        ((two, "ucb", -1.0), "exploration"),
        ((two, "hedge", 0.1, 0.0), "eta"),
    ):
        with pytest.raises(InputError, match=words):
            Selector(*options)
