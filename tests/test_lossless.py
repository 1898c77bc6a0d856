"""Is a changed token found, and is a near-tie told from a fault? By planting both."""

import copy

import pytest
import torch
from models import EOS, alone, prompts, settings, tiny

import redrafter.evaluation.lossless as lossless
from redrafter.drafters.bigram import CountedBigrams, count_bigrams
from redrafter.drafting import Strategy
from redrafter.targets.model import Target, TargetOutput


class Planted:
    """A target whose forwards over a tree (not the prefill) are changed by `fault(logits)`."""

    def __init__(self, target: Target, fault):
        self._target, self.fault = target, fault

    def __getattr__(self, name):
        return getattr(self._target, name)

    def forward(self, *args, keep=None, **kwargs) -> TargetOutput:
        out = self._target.forward(*args, keep=keep, **kwargs)
        return out if keep is not None else TargetOutput(self.fault(out.logits), out.hidden)


def check(target, config, **options):
    rows = prompts((9, 3, 14, 8, 5))
    texts, _ = alone(target, rows, config)
    known = [row + text for row, text in zip(rows, texts, strict=True)]
    drafter = CountedBigrams(count_bigrams(known, target.vocab_size, 3), width=3, depth=3)
    plain_of = lossless.references(target, rows, config)
    return lossless.check_mode(
        target, lambda texts: Strategy(drafter), rows, config, plain_of, (1, 4), **options
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_clean_run_is_lossless(sampled):
    result = check(tiny("llama"), settings(do_sample=sampled, temperature=0.7))
    assert (result.near_ties, result.unexplained, result.far_logits) == (0, 0, 0)
    assert result.rows_equal == result.rows_compared == 10
    assert result.compared_tokens > 100
    assert result.temperature == (0.7 if sampled else 0.0)
    assert 0 < result.largest_difference < result.rounding < 1e-10


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_whose_scores_are_not_finite_are_compared_up_to_there(sampled):
    """One ends before its first token, others within their text."""
    config = settings(do_sample=sampled, temperature=0.7, eos_token_id=-1)
    rows = prompts((9, 3, 14, 8, 5))
    sound, _ = alone(tiny("llama"), rows, config, range(5))
    others = {t for row in (*rows[:1], *rows[2:]) for t in row}
    # of the prompt of one row, and of the text of others
    bad = [next(t for t in found if t not in others) for found in (rows[1], sound[0][2:], sound[2])]
    target = Target(copy.deepcopy(tiny("llama").model))
    target.model.get_input_embeddings().weight.data[bad] = float("inf")
    want, finish = alone(target, rows, config, range(5))
    assert "not_finite" in finish and want[1] == [] and len({len(text) for text in want}) > 2
    result = check(target, config)
    assert (result.near_ties, result.unexplained, result.far_logits) == (0, 0, 0)
    assert result.rows_equal == result.rows_compared == 10
    assert result.compared_tokens == 2 * sum(map(len, want))
    # A row that goes on where plain decoding ends is found.
    assert check(target, config, speculative_target=tiny("llama")).unexplained > 0


def test_drafters_that_watch_forwards_are_let():
    target, rows, watched = tiny("llama"), prompts((5,)), []

    class Watching(CountedBigrams):
        def watch(self, prefill):
            watched.append(prefill)
            return super().watch(prefill)

    drafter = Watching(count_bigrams(rows, target.vocab_size, 1), 1, 1)
    plain_of = lossless.references(target, rows, settings())
    lossless.check_mode(target, lambda texts: Strategy(drafter), rows, settings(), plain_of, (1,))
    assert watched[0] and len(watched) > 1 and not any(watched[1:])


@pytest.mark.parametrize("sampled", [False, True])
def test_planted_logits_are_found(sampled):
    def fault(logits):
        random = torch.Generator().manual_seed(0)
        return logits + torch.randn(logits.shape, generator=random, dtype=logits.dtype)

    target = tiny("llama")
    result = check(target, settings(do_sample=sampled), speculative_target=Planted(target, fault))
    # Every token is the argmax of the scores it was chosen by, so each gap is within twice the
    # difference: only the bound on that difference tells.
    assert result.unexplained > 0 and result.near_ties == 0 and result.far_logits > 0
    assert all(case.gap <= 2 * case.difference for case in result.cases if case.gap is not None)


def test_small_faults_show_even_where_no_token_changes():
    target = tiny("llama")
    result = check(target, settings(), speculative_target=Planted(target, lambda x: x + 1e-6))
    assert result.rows_equal == result.rows_compared and result.unexplained == 0
    assert result.far_logits > 0


def test_planted_acceptance_fault_is_found(monkeypatch):
    import redrafter.decode.speculative as loop

    real = loop.verify

    def faulty(*args):
        verdict = real(*args)
        verdict.tokens[:, 0] = (verdict.tokens[:, 0] + (verdict.count == 0)) % 48
        return verdict

    monkeypatch.setattr(loop, "verify", faulty)
    result = check(tiny("llama"), settings())
    wrong = [case for case in result.cases if not case.explained]
    assert wrong and all(c.gap is None or c.gap > 2 * c.difference for c in wrong)


def test_planted_tie_is_explained():
    """Tokens of equal score, and a tree whose rounding prefers the other one."""
    target = Target(copy.deepcopy(tiny("llama").model).float())
    with torch.inference_mode():
        half = target.vocab_size // 2
        target.lm_head.weight[half:] = target.lm_head.weight[:half]
    nudge = torch.zeros(target.vocab_size)
    nudge[target.vocab_size // 2 :] = 1e-5
    greedy = settings(eos_token_id=-1)
    result = check(target, greedy, speculative_target=Planted(target, lambda x: x + nudge))
    assert result.near_ties > 50 and result.unexplained == 0 and result.rows_equal == 0
    assert {c.gap for c in result.cases} == {0.0}
    assert len(result.told()["cases"]) == lossless.MAX_CASES < result.near_ties
    # The same preference, but larger than rounding can be.
    result = check(target, greedy, speculative_target=Planted(target, lambda x: x + 1000 * nudge))
    assert result.unexplained > 50 and result.near_ties == 0


@pytest.mark.parametrize(
    ("gap", "difference", "explained"),
    [(0.9e-5, 0.5e-5, True), (1.1e-5, 0.5e-5, False), (1e-5, 1.1e-4, False), (1e-5, 0.9e-4, True)],
)
def test_near_tie_rule_on_both_sides(gap, difference, explained):
    scores = torch.tensor([[1.0 + gap, 1.0, 0.0]], dtype=torch.float64)
    ours = scores + torch.tensor([[0.0, 0.0, difference]])
    own = lossless.Reference([1], "length", scores, rounding=1e-4)
    result = lossless.ModeResult(0.0, 1)
    lossless.compare_row(result, own, [1], "length", ours, prompt=0, batch_size=1)
    assert (result.near_ties, result.unexplained) == (int(explained), int(not explained))


@pytest.mark.parametrize("sampled", [False, True])
def test_prompts_compared_in_parts(sampled):
    """The counts are those of all at once, and a fault is reported under its prompt's number."""
    target, config = tiny("llama"), settings(do_sample=sampled)
    rows, wrong = prompts((9, 3, 14, 8, 5, 4)), 4

    def compared(first, last, seed, planted):
        some = rows[first:last]
        plain_of = lossless.references(target, some, config, seed)
        counted = count_bigrams(rows, target.vocab_size, 2)
        decoding = target if not planted else Planted(target, lambda x: x.flip(-1))
        return lossless.check_mode(
            target, lambda texts: Strategy(CountedBigrams(counted, 2, 2)), some, config, plain_of,
            (1, 2), seed, speculative_target=decoding, first=first,
        )  # fmt: skip

    whole = compared(0, 6, 7, False)
    parts = [compared(i, i + 2, 7 + i, False) for i in (0, 2, 4)]
    assert lossless.ModeResult.together(parts) == whole
    assert whole.compared_tokens > 100 and whole.largest_difference > 0
    parts[2] = compared(wrong, 6, 7 + wrong, True)
    found = lossless.ModeResult.together(parts)
    assert {case.prompt for case in found.cases} == {4, 5} and found.unexplained > 0
    assert found.rows_equal < found.rows_compared == 12


def test_parts_are_judged_by_the_most_that_rounding_did():
    scores = torch.tensor([[1.0 + 1e-5, 1.0, 0.0]], dtype=torch.float64)
    ours = scores + torch.tensor([[0.0, 0.0, 5e-5]])
    parts = [lossless.ModeResult(0.0, 1), lossless.ModeResult(0.0, 1)]
    for part, rounding, token in zip(parts, (1e-5, 1e-4), (1, 0), strict=True):
        own = lossless.Reference([token], "length", scores, rounding)
        lossless.compare_row(part, own, [token], "length", ours, prompt=0, batch_size=1)
    assert (parts[0].unexplained, parts[0].far_logits) == (1, 1)
    assert (parts[1].near_ties, parts[1].far_logits) == (0, 0)
    whole = lossless.ModeResult.together(parts)
    assert (whole.near_ties, whole.unexplained, whole.far_logits) == (1, 0, 0)
    assert whole.cases[0].rounding == whole.rounding == 1e-4
    # With `target.exact invariant` rounding explains nothing, however the parts are joined.
    own = lossless.Reference([1], "length", scores, 1e-4)
    lossless.compare_row(part := lossless.ModeResult(0.0, 1), own, [1], "length", ours, 0, 1, True)
    assert lossless.ModeResult.together([part]).unexplained == 1


@pytest.mark.parametrize(("tokens", "finish"), [([0], "eos"), ([0, 1], "length"), ([0], "length")])
def test_stopping_elsewhere_is_a_difference(tokens, finish):
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    own = lossless.Reference([0, 1], "eos", scores, rounding=1e-4)
    result = lossless.ModeResult(0.0, 1)
    lossless.compare_row(result, own, tokens, finish, scores[: len(tokens)], 0, 1)
    assert (result.unexplained, result.cases[0].explained) == (1, False)


def test_teacher_forcing_follows_the_given_text():
    target, row = tiny("qwen3"), prompts((9,))[0]
    config = settings(do_sample=True)
    own = lossless.reference(target, row, config, seed=5)
    again = lossless.reference(target, row, config, seed=5, text=own.tokens)
    assert own.tokens == again.tokens and torch.equal(own.scores, again.scores)
    other = [(token + 1) % target.vocab_size for token in own.tokens]
    other = [token + 1 if token in EOS else token for token in other]
    forced = lossless.reference(target, row, config, seed=5, text=other)
    assert forced.tokens[: len(other)] == other
    assert torch.equal(forced.scores[0], own.scores[0])
    assert not torch.equal(forced.scores[1], own.scores[1])


def test_equal_lengths_are_made_ragged():
    assert [len(r) for r in lossless.ragged([[1] * 9] * 5)] == [9, 8, 7, 6, 9]
    assert lossless.ragged([[1], [1, 2]]) == [[1], [1, 2]]
    assert lossless.ragged([[1]] * 3) == [[1]] * 3, "a prompt keeps a token"
