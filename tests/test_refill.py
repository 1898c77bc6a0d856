"""Rows that leave the batch and rows that enter it change no text: float64, token for token,
against `plain` on each row alone."""

import pytest
import torch
from models import CONTEXT, FAMILIES, NEW, alone, prompts, settings, tiny
from transformers import StoppingCriteriaList

from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.refill import SlotCache, refilled

LENGTHS = (9, 3, 14, 8, 1, 30, 5, 11, 2, 7, 21, 4, 6, 13)
CONFIGS = {
    "greedy": settings(),
    "sampled": settings(do_sample=True, temperature=1.3),
    "warped": settings(
        do_sample=True, temperature=1.5, top_k=12, top_p=0.9, repetition_penalty=1.3,
        min_length=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["greedy", "warped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_every_row_alone(family, name):
    target, rows, config = tiny(family), prompts(LENGTHS[:6]), CONFIGS[name]
    want, finish = alone(target, rows, config)
    for slots in (1, 3) if family == "llama" else (3,):
        made = refilled(target, rows, config, slots=slots, seeds=range(len(rows)))
        assert (made.tokens, made.finish) == (want, finish), slots
        assert made.stats.emitted == made.stats.steps == [len(text) - 1 for text in want]


def test_rows_end_at_every_kind_of_place():
    """A first token that ends its row, the last one allowed, the context's end, and in between;
    some of them in one step, some when others wait, some when none does."""
    target, rows = tiny("llama"), prompts([*LENGTHS * 4, CONTEXT - 1, CONTEXT - 3])
    config = settings(do_sample=True, temperature=2.0)
    want, finish = alone(target, rows, config)
    lengths = [len(text) for text in want]
    assert {1, 2, NEW} <= set(lengths) and len(set(lengths)) > 10
    assert len(want[-1]) <= 3 and {"eos", "length"} == set(finish)
    seen = []
    made = refilled(
        target, rows, config, slots=6, seeds=range(len(rows)), ended=seen.append
    )
    assert (made.tokens, made.finish) == (want, finish)
    assert sorted(seen) == list(range(len(rows)))
    # The same rows in another order, each with its own seed
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    made = refilled(target, [rows[i] for i in order], config, slots=7, seeds=order)
    assert made.tokens == [want[i] for i in order]


def test_forwards_hold_live_rows_alone_and_places_are_filled_again(monkeypatch):
    target, rows = tiny("llama"), prompts(LENGTHS * 3)
    shapes, forward = [], target.forward

    def spy(tokens, *more, **kwargs):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *more, **kwargs)

    monkeypatch.setattr(target, "forward", spy, raising=False)
    made = refilled(target, rows, CONFIGS["sampled"], slots=8, seeds=range(len(rows)))
    reads = [(b, n) for b, n in shapes if n > 1]
    steps = [b for b, n in shapes if n == 1]
    assert max(b for b, _ in shapes) == 8 and sum(b for b, _ in reads) == len(rows) - 3
    # the rows whose prompt is one token are read together; all others go one token a forward
    assert sum(steps) - 3 == sum(len(text) - 1 for text in made.tokens) == made.stats.nodes_verified
    full = steps[: max(i for i, (_, n) in enumerate(shapes) if n > 1)]
    assert sum(full) / len(full) > 6.5


def test_keys_and_values_take_what_a_batch_of_plain_takes():
    """The bound: `slots` rows of the longest prompt and answer, whatever is waiting."""
    target, rows = tiny("llama"), prompts((30, 3, 14, 8))
    sizes = []

    class Watched(SlotCache):
        def commit(self, lengths, path=None):
            super().commit(lengths, path)
            sizes.append((self.n_bytes, len(self._groups)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redrafter.decode.refill.SlotCache", Watched)
        refilled(target, rows * 5, settings(), slots=4)
    layers, heads, dim = 2, 2, 8
    want = 2 * layers * 4 * heads * (30 + NEW + 1) * dim * 8
    assert set(sizes) == {(want, 1)}


def test_leaving_rows_give_their_places_to_the_last_ones():
    cache = SlotCache(2, 6, 5, torch.device("cpu"))
    lengths = [3, 1, 5, 2, 4]

    def states(row, layer):
        return torch.full((1, 2, 5, 3), 10.0 * row + layer)

    def padding(n_rows, length, width=5):
        return torch.arange(width).expand(n_rows, -1) >= length

    for row, length in enumerate(lengths):
        cache.enter(padding(1, length))
        assert cache.get_seq_length() == 0 and cache.width == 5
        for layer in range(2):
            keys, values = cache.update(states(row, layer), -states(row, layer), layer)
            want = states(row, layer) * (torch.arange(5) < length)[:, None]
            assert torch.equal(keys, want) and torch.equal(values, -keys)
        cache.entered([length])
    assert cache.leave([0, 2, 4]) == [3, 1] and cache.lengths == [2, 1]
    cache.prepare(1)
    new = torch.full((2, 2, 1, 3), 99.0)
    for layer in range(2):
        keys, _ = cache.update(new, new, layer)
        assert keys.shape == (2, 2, 3, 3)
        assert keys[0, 0, :, 0].tolist() == [30.0 + layer, 30.0 + layer, 99.0]
        assert keys[1, 0, :, 0].tolist() == [10.0 + layer, 99.0, 0]
    for store in cache._groups:  # nothing is left of a row that is gone
        assert not store[:, 2:].any() and not store[:, :, :, 3:].any()
    cache.enter(padding(4, 2, 2))
    with pytest.raises(RuntimeError, match="cannot take 5"):
        cache.enter(padding(5, 2, 2))


def test_criteria_and_bad_requests_are_those_of_plain():
    target, rows = tiny("llama"), prompts(LENGTHS)

    def stop(ids, scores):
        return ids.shape[1] % 7 == 0

    criteria = StoppingCriteriaList([stop])
    made = refilled(target, rows, settings(), slots=3, stopping_criteria=criteria)
    want, finish = alone(
        target, rows, settings(), [0] * len(rows), stopping_criteria=criteria
    )
    assert (made.tokens, made.finish) == (want, finish) and "criteria" in finish
    for bad in ([[]], [[1] * CONTEXT], [[10**6]]):
        with pytest.raises(InputError) as ours:
            refilled(target, bad, settings(), slots=3)
        with pytest.raises(InputError) as theirs:
            plain(target, bad, settings())
        assert str(ours.value) == str(theirs.value)
