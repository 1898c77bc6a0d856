"""One forward per step, tensors allocated once, bytes per step that ignore the context's length."""

import pytest
import torch
from models import (
    CONTEXT,
    FAMILIES,
    VOCAB,
    Recorder,
    alone,
    endless,
    prompts,
    replays,
    settings,
    tiny,
)
from transformers import DynamicCache

from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.replay import ReplayDrafter
from redrafter.targets import fused as fused_module
from redrafter.targets import model as model_module
from redrafter.targets.cache import RowCache

# Largest measured: 2e-14. RMS norms round to float32 inside a float64 model, which swallows the
# difference of two shapes unless it straddles two float32 (odds about 1e-9 per value).
EXACT = 1e-12


@pytest.fixture
def caches(monkeypatch):
    """Every cache that a generation makes, with what each round of it moved."""
    made = []

    class Watched(RowCache):
        def __init__(self, *args):
            super().__init__(*args)
            self.rounds, self.pointers = [], []
            made.append(self)

        def commit(self, lengths, path=None):
            before = list(self.lengths)
            super().commit(lengths, path)
            self.rounds.append((self.width, self.bytes_moved, path is not None, before))
            self.pointers.append(self.data_ptrs())

    for module in (model_module, fused_module):  # who makes a target's caches
        monkeypatch.setattr(module, "RowCache", Watched)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_per_step_for_the_whole_batch(family, caches):
    target, rows = tiny(family), prompts()
    texts = endless(target, rows, settings())
    calls = []
    handle = target.backbone.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        drafters = replays(texts)
        if family not in ("llama", "gemma3_text"):
            drafters = {"half": drafters["half"]}
        for drafter in (None, *drafters.values()):
            calls.clear()
            got = speculative(target, rows, settings(), drafter=drafter)
            # The prefill, then one forward over every row's nodes until the last row is done.
            assert len(calls) == 1 + got.stats.forwards == 1 + max(got.stats.steps)
            assert calls[0] == (len(rows), max(map(len, rows)))
            nodes = drafter.max_nodes if drafter else 1
            assert all(call == (len(rows), nodes) for call in calls[1:])
        calls.clear()
        got = plain(target, rows, settings())
        assert len(calls) == 1 + got.stats.forwards == 1 + max(got.stats.steps)
    finally:
        handle.remove()


def test_tensors_are_allocated_once(caches):
    target, rows = tiny("llama"), prompts()
    texts = endless(target, rows, settings())
    caches.clear()
    speculative(target, rows, settings(), drafter=replays(texts)["half"])
    plain(target, rows, settings())
    assert len(caches) == 2
    for cache in caches:
        assert len(cache.pointers) > 3 and cache.pointers[0]
        assert all(p == cache.pointers[0] for p in cache.pointers)


def test_bytes_per_step_ignore_the_context(caches):
    """The same trees behind a prompt of 20 and of 400 tokens move the same bytes."""
    target = tiny("llama", max_position_embeddings=1024)
    config = settings(eos_token_id=-1)
    most = {}
    for n in (20, 400):
        rows = prompts((n, n - 7))
        texts = endless(target, rows, config)
        drafter = ReplayDrafter(texts, VOCAB, 4, 3, 0.7)
        caches.clear()
        speculative(target, rows, config, drafter=drafter)
        steps = caches[0].rounds[1:]
        assert {moved for *_, moved, _ in steps} == {True, False}
        most[n] = {moved: max(b for _, b, m, _ in steps if m == moved) for moved in (True, False)}
    assert most[20] == most[400]
    per_entry = 2 * 2 * target.n_layers * 8 * 8  # rows, keys and values, layers, width, float64
    per_entry *= target.config.num_key_value_heads
    n_nodes, depth = 1 + 4 * 3, 4
    assert most[20][False] == per_entry * n_nodes
    assert most[20][True] == per_entry * (n_nodes + depth)


class Check(Recorder):
    """After each step, compares what is committed with a fresh forward of the text so far."""

    def __init__(self, inner, target, caches):
        super().__init__(inner)
        self.target, self.caches = target, caches
        self.moved = self.checked = 0

    def observe(self, truth):
        super().observe(truth)
        cache = self.caches[-1]
        self.moved += cache.rounds[-1][2]
        for b in range(len(self.seqs.ids)):
            if not self.seqs.live[b]:
                continue  # never looked at again
            n = cache.lengths[b]
            assert n == int(self.seqs.length[b]) - 1 == int(cache.length[b])
            fresh = DynamicCache()
            text = self.seqs.ids[b : b + 1, :n]
            self.target.backbone(input_ids=text, past_key_values=fresh, use_cache=True)
            for layer, (keys, values) in enumerate(cache._views):
                for ours, theirs in (
                    (keys, fresh.layers[layer].keys),
                    (values, fresh.layers[layer].values),
                ):
                    torch.testing.assert_close(ours[b, :, :n], theirs[0], rtol=0, atol=EXACT)
            self.checked += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_entries_are_those_of_a_fresh_forward(family, caches):
    target, rows = tiny(family), prompts()
    texts = endless(target, rows, settings(eos_token_id=-1))
    for name in ("half", "often"):
        drafter = Check(replays(texts)[name], target, caches)
        got = speculative(target, rows, settings(eos_token_id=-1), drafter=drafter)
        assert got.tokens == alone(target, rows, settings(eos_token_id=-1))[0]
        assert drafter.moved > 2 and drafter.checked > 10


def filled(lengths, n, capacity=20):
    """A cache of one layer whose entry s of row b holds 100 * b + s, after a forward of n."""
    cache = RowCache(1, len(lengths), capacity, torch.device("cpu"))
    count = torch.arange(capacity, dtype=torch.float64)
    base = count[None] + 100 * torch.arange(len(lengths))[:, None]
    cache.prepare(max(lengths))
    states = base[:, None, : max(lengths), None].expand(-1, 2, -1, 3)
    cache.update(states, -states, 0)
    cache.commit(lengths)
    cache.prepare(n)
    new = base[:, None, :n, None].expand(-1, 2, -1, 3) + 0.5
    keys, values = cache.update(new, -new, 0)
    assert keys.shape == (len(lengths), 2, max(lengths) + n, 3)
    assert torch.equal(keys, -values)
    return cache, keys


def test_new_entries_go_behind_each_row():
    lengths, n = [4, 1, 6], 3
    cache, keys = filled(lengths, n)
    for b, length in enumerate(lengths):
        old = [100 * b + s for s in range(length)]
        new = [100 * b + s + 0.5 for s in range(n)]
        assert keys[b, 0, : length + n, 0].tolist() == old + new
    assert cache.get_seq_length() == max(lengths) and cache.get_mask_sizes(n) == (9, 0)
    assert cache.uniform is False and filled([2, 2], 3)[0].uniform is True


@pytest.mark.parametrize(
    "path",
    [
        [0, 1, 2, 3],  # in order
        [0, 2, 3, 5],  # each target is a later one's source
        [0, 3, 1, 2],  # not what a tree gives, but a move that a naive loop gets wrong
        [0, 5, 0, 0],  # padded
    ],
)
def test_commit_moves_in_place_though_source_and_target_overlap(path):
    lengths, n = [4, 1, 6], 6
    cache, _ = filled(lengths, n)
    count = len(path) if path[-1] else 2
    pointers = cache.data_ptrs()
    cache.commit([length + count for length in lengths], torch.tensor([path] * 3))
    assert cache.lengths == cache.length.tolist() == [length + count for length in lengths]
    cache.prepare(1)
    keys = cache._views[0][0]
    for b, length in enumerate(lengths):
        old = [100 * b + s for s in range(length)]
        new = [100 * b + s + 0.5 for s in path[:count]]
        assert keys[b, 1, : length + count, 2].tolist() == old + new
    assert cache.data_ptrs() == pointers


def test_without_commit_nothing_is_kept():
    """What a drafter that borrows the cache relies on."""
    cache, keys = filled([4, 2], 3)
    before = keys[:, :, :2].clone()
    cache.prepare(2)
    assert cache.lengths == [4, 2]
    again, _ = cache.update(
        torch.full((2, 2, 2, 3), 7.0).double(), torch.zeros(2, 2, 2, 3).double(), 0
    )
    assert again[0, 0, 4:6, 0].tolist() == [7, 7] and again[1, 0, 2:4, 0].tolist() == [7, 7]
    assert torch.equal(again[:, :, :2], before)


def test_a_full_cache_says_so():
    cache = RowCache(1, 1, CONTEXT, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"cache of {CONTEXT} entries cannot hold {CONTEXT + 1}"):
        cache.prepare(CONTEXT + 1)
