"""Mixtures: the merge against path sets, the budget, what is learned, and the text."""

import itertools
import math

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
from test_draft_model import BOTH, MODES, close_draft

from redrafter.contracts import Drafter, InputError, RowState, TokenTree
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import count_bigrams
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.frontier import ModelFrontier
from redrafter.drafters.hindsight import Past
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.mixture import Calibration, Lead, Mixture, in_order, merge
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


@pytest.mark.parametrize("mode", BOTH)
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
        tree, scores = merge(parts, 12)
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
    seqs = RowState(ids, now, length, live)
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
    assert past.ripe(RowState(ids, length + 40, length, live))
    assert past.ripe(RowState(ids, now, length, torch.zeros(4, dtype=torch.bool)))


def test_calibration_counts():
    c = Calibration(3, 2.0, torch.device("cpu"))
    log_q, depth = torch.tensor([[-0.5, -0.5, -0.2]]), torch.tensor([[1, 1, 2]])
    yes, every = torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool)
    own = ~every
    torch.testing.assert_close(c.log_p(log_q, depth, own), log_q)  # the prior alone
    for _ in range(200):
        c.learn(log_q, depth, own, yes, every)
    p = c.log_p(log_q, depth, own).exp()[0].tolist()
    assert p[0] == pytest.approx(0.5, abs=0.01) and p[2] == pytest.approx(1.0, abs=0.03)
    near = c.log_p(torch.tensor([[-0.45, -0.55]]), depth[:, :2], own[:, :2]).exp()[0]
    assert near[0] > p[0] > near[1]  # one bin: its order stays
    # Nodes that others have too are another matter, of which nothing is known yet.
    torch.testing.assert_close(c.log_p(log_q, depth, every), log_q)
    c.learn(log_q, depth, own, yes, own)  # nothing known: nothing learned
    assert c.log_p(log_q, depth, own).exp()[0].tolist() == p
    assert c.log_p(torch.tensor([[float("-inf")]]), depth[:, :1], own[:, :1]) == float("-inf")


def test_a_bin_follows_its_depth_until_it_knows_better():
    c = Calibration(1, 2.0, torch.device("cpu"))
    sure, unsure = -0.1, -2.0

    def nodes(value, n=1):
        depth = torch.ones(1, n, dtype=torch.long)
        return torch.full((1, n), value), depth, torch.zeros(1, n, dtype=torch.bool)

    def learn(value, n, right):
        right = (torch.arange(n) % 20 < right)[None]
        c.learn(*nodes(value, n), right, torch.ones_like(right))

    def p(value):
        return c.log_p(*nodes(value)).exp().item()

    learn(sure, 20, 9)  # half as many as the scores say
    assert p(unsure) < 0.6 * math.exp(unsure)  # by the depth's ratio alone
    learn(unsure, 60000, 4)  # each bin by a law of its own
    learn(sure, 60000, 10)
    assert p(unsure) == pytest.approx(0.2, abs=0.01)
    assert p(sure) == pytest.approx(0.5, abs=0.01)


def test_scores_that_are_right_already_are_left_alone():
    """What the counts of 100 steps take from a member whose scores are true: with a ratio for every
    bin of however few nodes 0.57 % of the right nodes among the best 16, now 0.08 %."""
    depth = torch.arange(1, 6).repeat_interleave(6)[None]
    every = torch.ones_like(depth, dtype=torch.bool)
    kept = best = 0.0
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        c = Calibration(5, 2.0, torch.device("cpu"))
        for _ in range(100):
            log_q = -torch.rand(1, 30, generator=random) * (1.2 * depth + 1)
            p = log_q.exp()
            chosen = c.log_p(log_q, depth, ~every).topk(16).indices
            kept, best = kept + p.gather(1, chosen).sum(), best + p.topk(16).values.sum()
            c.learn(log_q, depth, ~every, torch.rand(1, 30, generator=random) < p, every)
    assert 1 - kept / best < 0.002


class Fixed(Drafter):
    """The same tree in every step."""

    def __init__(self, tokens, parent, log_q):
        self.max_depth, self.max_nodes = 3, len(tokens)
        depth = [0]
        for node in range(1, len(tokens)):
            depth.append(depth[parent[node]] + 1)
        self.parts = [torch.tensor([x]) for x in (tokens, parent, depth)]
        self.log_q = torch.tensor([log_q])

    def start(self):
        pass

    def extend(self, level):
        pass

    def tree(self):
        valid = torch.ones_like(self.parts[0], dtype=torch.bool)
        return TokenTree(*self.parts, valid, self.log_q)


def test_what_a_member_adds_is_judged_by_itself():
    """A member repeats the other's best guess, right in three of five steps, and adds one that is
    never right, as sure of both. Its guesses are right in three of ten cases, the other's third
    level in one of five; still, that level is what the last node is for."""
    chain = Fixed([0, 1, 1, 1], [0, 0, 1, 2], [0.0, -0.5, -1.0, -1.6])
    echo = Fixed([0, 1, 2], [0, 0, 0], [0.0, -0.3, -0.3])
    draft = Mixture({"chain": chain, "echo": echo}, 4)
    text = [0]
    for right in [3, 0, 1, 2, 0] * 30:
        text += [1] * right + [3]
    ids = torch.tensor([text + [0] * 4])
    one = torch.ones(1, dtype=torch.long)
    seqs = RowState(ids, one, one, one > 0)
    draft.begin(seqs)
    for right in [3, 0, 1, 2, 0] * 30:
        draft.start()
        seen = draft.tree()
        # The root stands for any token: only where it is matters here.
        seqs.length = seqs.length + right + 1
    assert seen.tokens[0].tolist() == [0, 1, 1, 1]
    draft.start()
    draft.tree()  # all but the last of those before have been judged
    assert draft.report()["echo"] == {"judged_nodes": 298, "right_nodes": 90}


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
        "sure": Sure(texts, target.vocab_size, 4, 1, 0.0, False, 0),
        "good": ReplayDrafter(texts, target.vocab_size, 4, 1, 1.0, False, 0),
    }
    seen = Recorder(Mixture(both, 5))
    first = speculative(target, rows, config, drafter=seen)
    assert first.tokens == alone(target, rows, config)[0]
    again = speculative(target, rows, config, drafter=seen)
    assert all(tree.n_nodes <= 5 for tree, *_ in seen.steps)
    # What was counted is kept: in the second generation the good one has all the nodes.
    assert again.stats.tokens_per_step > 4.5 > first.stats.tokens_per_step > 2.5


def test_the_mixture_must_lead_by_two_standard_errors():
    lead, known = Lead(2, torch.device("cpu")), torch.tensor([True, False])
    assert int(lead.first()) == 0, "the first member before anything is known"
    levels = torch.tensor([[1, 2, 3], [9, 0, 9]])
    for n, first in enumerate([1, 1, 1, 1, 2], start=1):  # ahead by n, of which sqrt(n) is chance
        lead.learn(levels, known)
        assert lead.levels.tolist() == [n, 2 * n], "rows that are not known are left out"
        assert int(lead.first()) == first == (2 if n > 2 * n**0.5 else 1)
    lead.learn(torch.tensor([[30, 2, 3], [0, 0, 0]]), known)
    assert int(lead.first()) == 0


def test_a_member_s_nodes_come_first_and_others_fill_the_rest():
    """root - a - b of the first member, root - c of the second, likelier by the mixture."""
    tree = TokenTree(
        torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 0]]), torch.tensor([[0, 1, 2, 1]]),
        torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.0, -3.0, -4.0, -1.0]]),
    )  # fmt: skip
    no = float("-inf")
    scores = torch.tensor([[[0.0, -1.0, -2.0, no], [0.0, no, no, -5.0]]])
    assert in_order(scores, tree, 3).tolist() == [[[0, 1, 2], [0, 3, 1], [0, 3, 1]]]
    assert in_order(scores, tree, 4).tolist() == [[[0, 1, 2, 3], [0, 3, 1, 2], [0, 3, 1, 2]]]
    tree.valid[0, 3] = False
    assert in_order(scores, tree, 3).tolist() == [[[0, 1, 2]] * 3]


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
