"""Targets with recurrent layers: chains are verified exactly, whatever of them is accepted."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from families import TABLE, build
from models import make_tree, prompts, shared
from transformers import GenerationConfig

from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.ratio import RULES
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import best_path
from redrafter.drafters.model import DraftModel
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.skipping import LayerSkipping
from redrafter.targets.model import Target
from redrafter.targets.recurrent import StateCache

#: a convolution's state alone; a scan that goes on from a state; one that reads token by token
KINDS = ("lfm2", "qwen3_next", "jamba")
DEPTH, NEW, SEEDS = 3, 10, (3, 4, 5, 6)
FREE = dict(max_new_tokens=NEW, eos_token_id=-1)
CONFIGS = {
    "greedy": GenerationConfig(**FREE),
    "seeded": GenerationConfig(**FREE, do_sample=True, temperature=1.3),
}


@shared
def target_of(family: str) -> Target:
    return Target(build(family))


def chains() -> list[str]:
    """Every exact family whose configuration has mixers (a table's word costs no model)."""
    return [f for f, known in TABLE.items() if known == "exact: chains"]


def rows_of(target: Target) -> list[list[int]]:
    return [[3 + t % (target.vocab_size - 8) for t in row] for row in prompts((9, 3, 14, 8))]


@functools.cache
def texts_of(family: str, kind: str) -> list[list[int]]:
    """Whole texts that go on behind the rows' ends. That rows in a batch are those alone is seen
    by drafting for one alone, and against the bare model in `test_families.py`."""
    target, config = target_of(family), copy.deepcopy(CONFIGS[kind])
    config.max_new_tokens += DEPTH
    made = plain(target, rows_of(target), config, seeds=SEEDS).tokens
    return [row + text for row, text in zip(rows_of(target), made, strict=True)]


def drafted(family: str, kind: str, rows: list[int], acceptance: float, width: int = 1):
    """New tokens of some rows as plain made them, and as a drafter of set acceptance did."""
    target, texts = target_of(family), texts_of(family, kind)
    given = [rows_of(target)[row] for row in rows]
    drafter = ReplayDrafter(
        [texts[row] for row in rows], target.vocab_size, DEPTH, width, acceptance, seed=1
    )
    made = speculative(
        target, given, CONFIGS[kind], seeds=[SEEDS[row] for row in rows], drafter=drafter
    )
    want = [texts[row][len(given[i]) :][:NEW] for i, row in enumerate(rows)]
    return made, want


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, "greedy") for f in chains()), *((f, "seeded") for f in KINDS)]
)
def test_texts_are_plains_whatever_is_accepted(family, kind):
    """Alone and in a ragged batch of four; every accepted length from nothing to all occurs."""
    assert target_of(family).verifies == "chains"
    lengths = set()
    for rows, acceptance in (([0, 1, 2, 3], 0.7), ([2], 0.6), ([1], 1.0)):
        made, want = drafted(family, kind, rows, acceptance)
        assert made.tokens == want
        lengths |= {n for row in made.stats.lengths for n in row}
    assert lengths >= {1, 2, 3, 4}


@pytest.mark.parametrize("family", KINDS)
def test_a_state_kept_one_token_too_far_is_seen(family, monkeypatch):
    target_of(family)  # before the fault, which its probe would see
    behind = StateCache._behind
    monkeypatch.setattr(
        StateCache, "_behind", lambda self, r, n, rows: behind(self, r, min(n + 1, self._n), rows)
    )
    made, want = drafted(family, "greedy", [2], 0.5)
    assert made.tokens != want


@pytest.mark.parametrize("family", KINDS)
def test_the_probe_sees_a_state_kept_one_token_too_far(family, monkeypatch):
    behind = StateCache._behind
    monkeypatch.setattr(
        StateCache, "_behind", lambda self, r, n, rows: behind(self, r, min(n + 1, self._n), rows)
    )
    with pytest.raises(InputError, match="does not go on from the keys and states"):
        Target(build(family))


@pytest.mark.parametrize("family", KINDS)
def test_the_best_path_of_a_tree_is_verified(family):
    made, want = drafted(family, "greedy", [0, 1, 2, 3], 0.8, width=3)
    assert made.tokens == want
    assert sum(made.stats.accepted_at) > 0


def test_best_path_follows_scores_else_the_first_child():
    tree = make_tree([[9, 1, 2, 3, 4, 5]], [0, 0, 0, 1, 2, 2])
    assert best_path(tree, 3).tokens[:, :3].tolist() == [[9, 1, 3]]
    assert best_path(tree, 3).valid.tolist() == [[True, True, True, False]]
    tree.log_q = torch.tensor([[0.0, -2.0, -1.0, -2.5, -3.0, -2.0]])
    found = best_path(tree, 2)
    assert found.tokens.tolist() == [[9, 2, 5]]
    assert found.log_q.tolist() == [[0.0, -1.0, -2.0]]
    tree.valid[0, 2:] = False
    assert best_path(tree, 2).valid.tolist() == [[True, True, False]]


@pytest.mark.parametrize("rule", RULES)
def test_a_ratio_rule_takes_no_part_of_what_was_drawn(rule):
    target = target_of("lfm2")
    wide = ReplayDrafter(texts_of("lfm2", "seeded"), target.vocab_size, DEPTH, width=2)
    with pytest.raises(InputError, match="only one path can be verified"):
        speculative(target, rows_of(target), CONFIGS["seeded"], drafter=wide, rule=rule)


@pytest.mark.parametrize("family", KINDS)
def test_only_what_was_accepted_is_read_again(family, monkeypatch):
    """What a partial acceptance costs: the mixers alone, over the accepted tokens, where the state
    cannot be had for nothing."""
    target = target_of(family)
    counts = {"lm_head": 0, "mixer": 0}
    mixer = next(m for m in target.model.modules() if isinstance(m.forward, functools.partial))
    inner = mixer.conv if family == "lfm2" else mixer.out_proj

    def count(name):
        return lambda module, args: counts.__setitem__(name, counts[name] + args[0].shape[1])

    rows = rows_of(target)[2:3]
    drafter = ReplayDrafter([texts_of(family, "greedy")[2]], target.vocab_size, DEPTH, 1, 0.5)
    project, hooks = target.project, []

    def projected(hidden):
        counts["lm_head"] += hidden.shape[1]
        return project(hidden)

    monkeypatch.setattr(target, "project", projected)
    if family != "lfm2":
        hooks.append(inner.register_forward_pre_hook(count("mixer")))
    try:
        made = speculative(target, rows, CONFIGS["greedy"], drafter=drafter)
    finally:
        for hook in hooks:
            hook.remove()
    read = made.stats.nodes_verified
    assert counts["lm_head"] == 1 + read  # the prefill's, and every node once
    partial = sum(n for n in made.stats.lengths[0] if n < 1 + DEPTH)
    again = {"lfm2": -read - len(rows[0]), "qwen3_next": partial, "jamba": 0}[family]
    assert counts["mixer"] == len(rows[0]) + read + again


def test_a_nan_in_a_draft_spoils_no_state(monkeypatch):
    """A drafted token whose keys are not finite makes the root's numbers be taken from a forward of
    its own; the states go on from there."""
    target = target_of("qwen3_next")
    poison = 7
    _, want = drafted("qwen3_next", "greedy", [2], 0.5)
    forward, spoilt = target.forward, []

    def nan_at_poison(tokens, positions, masks, cache, keep=None, **how):
        out = forward(tokens, positions, masks, cache, keep, **how)
        bad = (tokens == poison).any(1) & (tokens.shape[1] > 1)
        if keep is None and bool(bad.any()):
            spoilt.append(True)
            out.logits[bad] = float("nan")
            for reading in cache._reads:
                reading.hidden[bad] = float("nan")
            for state in cache._now.values():
                state[bad] = float("nan")
        return out

    class Poisoned(ReplayDrafter):
        def tree(self):
            tree = super().tree()
            tree.tokens[:, -1] = poison
            return tree

    monkeypatch.setattr(target, "forward", nan_at_poison)
    text = texts_of("qwen3_next", "greedy")[2]
    drafter = Poisoned([text], target.vocab_size, DEPTH, 1, 1.0)
    got = speculative(target, rows_of(target)[2:3], CONFIGS["greedy"], drafter=drafter)
    assert spoilt and got.tokens == want


def test_drafters_that_cannot_go_back_are_refused():
    target = target_of("qwen3_next")
    with pytest.raises(InputError, match="recurrent layers"):
        LayerSkipping(target)
    with pytest.raises(InputError, match="recurrent layers"):
        DraftModel(target, target)


def test_what_a_state_cache_refuses():
    cache = StateCache(2, 1, 8, torch.device("cpu"))
    cache.prepare(2)
    with pytest.raises(RuntimeError, match="never goes back"):
        cache.commit([1], torch.tensor([[0]]))
    cache.commit([2])
    with pytest.raises(RuntimeError, match="never goes back"):
        cache.commit([1])
    with pytest.raises(NotImplementedError, match="not said"):
        cache.update_conv_state(torch.zeros(1, 2, 3), 0)


def test_a_ragged_prefill_without_its_padding_is_an_error():
    target = target_of("qwen3_next")
    cache = target.new_cache(2, 8)
    position = torch.arange(4)[None]
    cache.prepare(4)
    masks = target.masks(position[:, :, None] >= position[:, None], position, position)
    with torch.inference_mode():
        target.forward(torch.ones(2, 4).long(), position.expand(2, -1), masks, cache)
    with pytest.raises(RuntimeError, match="padding"):
        cache.commit([4, 2])


def test_a_model_is_watched_once_and_works_as_before():
    model = build("lfm2")
    ids = torch.arange(10, 18)[None]
    before = model(input_ids=ids).logits
    first = Target(model)
    Target(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    made = plain(first, ids, GenerationConfig(**FREE)).tokens[0]
    own = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    assert own[0, 8:].tolist() == made
