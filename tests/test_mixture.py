"""Mixtures: the merge against path sets, the budget, what is learned, and the text."""

import itertools

import pytest
import torch
from models import (
    VOCAB,
    RandomLookahead,
    Recorder,
    alone,
    endless,
    path_to,
    prompts,
    random_tree,
    settings,
    tiny,
)
from test_draft_model import MODES, close_draft

from redrafter.contracts import InputError, Sequences, TokenTree
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import count_bigrams
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.frontier import ModelFrontier
from redrafter.drafters.hindsight import Past
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.mixture import Calibration, Mixture, merge
from redrafter.drafters.model import DraftModel
from redrafter.drafters.multi import MultiCandidate
from redrafter.drafters.ngrammys import NGrammys
from redrafter.drafters.recycling import TokenRecycling
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.selector import Selector
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafters.suffix import SuffixDrafter


def members(target, texts):
    return {
        "replay": ReplayDrafter(texts, target.vocab_size, 4, 2, 0.6, True, 0),
        "model": DraftModel(close_draft(target, 0.1), target, 3, 2),
        "suffix": SuffixDrafter(6, 1),
        "lookup": PromptLookup(3, 2),
        "recycling": TokenRecycling(target.vocab_size),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_text_is_plain_decoding(family, mode):
    target, rows, config = tiny(family), prompts(), settings(**MODES[mode])
    want = alone(target, rows, config)
    draft = Mixture(members(target, endless(target, rows, config)), 9)
    for lookahead in (None, RandomLookahead(4, 3)):
        got = speculative(target, rows, config, seeds=range(4), drafter=draft, lookahead=lookahead)
        assert (got.tokens, got.finish) == want
    report = got.extra["drafter"]
    assert set(report) == set(draft.members)
    assert 0 < report["replay"]["right_nodes"] < report["replay"]["judged_nodes"]


@pytest.mark.parametrize("mode", ["greedy", "t1.5"])
def test_members_of_every_other_kind(mode):
    """One that draws, one that borrows the cache, tables, one that is made of others itself."""
    target, rows, config = tiny("llama"), prompts(), settings(**MODES[mode])
    want = alone(target, rows, config)
    table = count_bigrams([r + t for r, t in zip(rows, want[0], strict=True)], VOCAB, 8)
    inner = {"lookup": PromptLookup(3, 2), "recycling": TokenRecycling(target.vocab_size)}
    whole = LayerSkipping(target, 3, fixed=())
    draft = Mixture({
        "multi": MultiCandidate([ModelFrontier(close_draft(target), target, 7)], (2, 2), "iid"),
        "skip": whole,
        "ngrammys": NGrammys(table, 4, 3),
        "select": Selector(inner, clock=itertools.count().__next__),
    }, 13)  # fmt: skip
    for _ in range(2):
        got = speculative(target, rows, config, seeds=range(4), drafter=draft)
        assert (got.tokens, got.finish) == want
    told = got.extra["drafter"]["skip"]
    assert told["right_nodes"] == told["judged_nodes"] > 0  # nobody wrote over what it had read
    with pytest.raises(InputError, match="a and b draft in the target's cache"):
        Mixture({"a": whole, "b": LayerSkipping(target, 2, fixed=(1,))})
    with pytest.raises(InputError, match="a and b draft in the target's cache"):
        Selector({"a": whole, "b": LayerSkipping(target, 2, fixed=(1,))}, "hedge")
    budget = NodeBudget({1: 1.0, 9: 1.1}, [0.1])
    with pytest.raises(InputError, match="a has a node budget"):
        Mixture({"a": DraftModel(target, target, budget=budget), "b": PromptLookup()})


def paths(tree: TokenTree, row: int) -> dict[tuple[int, ...], float]:
    """Valid drafted paths as token tuples, with the best score of each."""
    found: dict[tuple[int, ...], float] = {}
    for node in range(1, tree.n_nodes):
        way = path_to(tree, row, node)
        if all(tree.valid[row, n] for n in way):
            key = tuple(tree.tokens[row, n].item() for n in way[1:])
            score = 0.0 if tree.log_q is None else float(tree.log_q[row, node])
            found[key] = max(found.get(key, -1e9), score)
    return found


def closed(tree: TokenTree) -> TokenTree:
    """Children of invalid nodes are invalid, as the contract says."""
    for _ in range(tree.n_nodes):
        tree.valid &= tree.valid.gather(1, tree.parent)
    return tree


def test_merged_paths_are_the_union():
    random = torch.Generator().manual_seed(0)
    shared = 0
    for _ in range(30):
        parts = [closed(random_tree(random, 3, n, vocab=3, valid=0.8)) for n in (9, 6, 12)]
        for part in parts[1:]:
            part.tokens[:, 0] = parts[0].tokens[:, 0]
        tree, scores = merge(parts)
        assert (tree.parent[:, 1:] < torch.arange(1, tree.n_nodes)).all()
        assert torch.equal(
            tree.depth[:, 1:], tree.depth.gather(1, tree.parent)[:, 1:] + (tree.depth[:, 1:] > 0)
        )
        for row in range(3):
            each = [paths(part, row) for part in parts]
            union = set().union(*each)
            got = {}
            for node in tree.valid[row].nonzero()[:, 0].tolist():
                if tree.depth[row, node] == 0:
                    assert node == 0
                    continue
                way = path_to(tree, row, node)
                assert all(tree.valid[row, n] for n in way)
                key = tuple(tree.tokens[row, n].item() for n in way[1:])
                assert key not in got  # one node per path
                got[key] = scores[row, :, node].tolist()
            assert set(got) == union
            for key, told in got.items():
                for part, score in zip(each, told, strict=True):
                    want = part.get(key, float("-inf"))
                    assert score == pytest.approx(want, rel=1e-5)
            shared += sum(len(e) for e in each) - len(union)
    assert shared > 100


def test_hindsight_against_following_the_text():
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, (4, 14), generator=random)
    length, now = torch.tensor([5, 6, 4, 3]), torch.tensor([8, 14, 5, 3])
    tree = closed(random_tree(random, 4, 40, vocab=3, valid=0.9))
    live = torch.tensor([True, True, True, False])
    seqs = Sequences(ids, now, length, live)
    past = Past(tree, length, live)
    right, known = past.right(seqs)
    seen = set()
    for row in range(4):
        for node in range(40):
            if not tree.valid[row, node]:
                assert not right[row, node] and not known[row, node]
                continue
            told = [tree.tokens[row, n].item() for n in path_to(tree, row, node)[1:]]
            text = ids[row, length[row] : now[row]].tolist()
            fits = told[: len(text)] == text[: len(told)]
            is_known = (not fits or len(told) <= len(text)) and bool(live[row])
            assert bool(known[row, node]) == is_known
            if is_known:
                assert bool(right[row, node]) == fits
            seen.add((is_known, fits))
    assert seen == {(True, True), (True, False), (False, True)}
    assert not past.ripe(seqs)
    assert past.ripe(Sequences(ids, length + 40, length, live))
    assert past.ripe(Sequences(ids, now, length, torch.zeros(4, dtype=torch.bool)))


def test_calibration_counts():
    c = Calibration(3, 2.0, torch.device("cpu"))
    log_q, depth = torch.tensor([[-0.5, -0.5, -0.2]]), torch.tensor([[1, 1, 2]])
    yes = torch.tensor([[True, False, True]])
    torch.testing.assert_close(c.log_p(log_q, depth), log_q)  # the prior alone
    for _ in range(200):
        c.learn(log_q, depth, yes, torch.ones_like(yes))
    p = c.log_p(log_q, depth).exp()[0].tolist()
    assert p[0] == pytest.approx(0.5, abs=0.01) and p[2] == pytest.approx(1.0, abs=0.02)
    near = c.log_p(torch.tensor([[-0.45, -0.55]]), depth[:, :2]).exp()[0]
    assert near[0] > p[0] > near[1]  # one bin: its order stays
    c.learn(log_q, depth, yes, torch.zeros_like(yes))  # nothing known: nothing learned
    assert c.log_p(log_q, depth).exp()[0].tolist() == p
    assert c.log_p(torch.tensor([[float("-inf")]]), depth[:, :1]) == float("-inf")


def test_the_better_member_gets_the_nodes():
    """One member is always right and modest, the other never right and sure of itself."""
    target, rows = tiny("llama"), prompts()
    config = settings(eos_token_id=-1, max_new_tokens=40)
    texts = endless(target, rows, config)

    class Sure(ReplayDrafter):
        def tree(self):
            tree = super().tree()
            tree.log_q = -0.01 * tree.depth
            return tree

    both = {
        "good": ReplayDrafter(texts, target.vocab_size, 4, 1, 1.0, False, 0),
        "sure": Sure(texts, target.vocab_size, 4, 1, 0.0, False, 0),
    }
    seen = Recorder(Mixture(both, 5))
    first = speculative(target, rows, config, drafter=seen)
    assert first.tokens == alone(target, rows, config)[0]
    again = speculative(target, rows, config, drafter=seen)
    assert all(tree.n_nodes <= 5 for tree, *_ in seen.steps)
    # What was counted is kept: in the second generation the good one has all the nodes.
    assert again.stats.tokens_per_step > 4.5 > first.stats.tokens_per_step > 2.5


def test_bad_options_are_named():
    one = {"a": SuffixDrafter()}
    two = {**one, "b": PromptLookup()}
    for options, words in (
        ((one,), "two"),
        ((two, 1), "nodes 1"),
        ((two, 9, 0.0), "prior_nodes"),
    ):
        with pytest.raises(InputError, match=words):
            Mixture(*options)
