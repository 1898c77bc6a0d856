"""The drafter of heads: its trees against a slow search, its text against plain decoding."""

import pytest
import torch
from models import alone, path_to, prompts, settings, tiny

from redrafter.config import TreeConfig
from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.noise import gumbel
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.recurrent import RecurrentHead

HEADS = {
    "own": {},
    "target": {"output": "target", "embedding_scale": "rms"},
    "gru": {"cell": "gru", "first_state": "paper", "input_norm": True},
    "pruned": {"draft_ids": torch.tensor([1, 2, 5, 9, 17, 20, 31, 40, 47])},
}
WIDTH, DEPTH = 3, 4


def make_head(target, name):
    torch.manual_seed(3)
    head = RecurrentHead.for_target(target, **HEADS[name]).double()
    with torch.no_grad():  # peaky, so that beams compete over parents
        for p in head.parameters():
            p.mul_(3.0)
    return head.eval()


def one_tree(target, drafter, noise=None, temperature=1.0):
    """The drafter's first tree on two rows, and what it was given."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (2, 12), generator=generator)
    length = torch.tensor([5, 8])
    live = torch.ones(2, dtype=torch.bool)
    seqs = RowState(ids, length, length, live, noise, temperature)
    hidden = torch.randn(2, 1, target.hidden_size, generator=generator, dtype=torch.float64)
    drafter.begin(seqs)
    drafter.observe(Truth(seqs.root[:, None], torch.ones_like(length), hidden))
    drafter.start()
    for level in range(1, drafter.max_depth + 1):
        drafter.extend(level)
    return drafter.tree(), seqs, hidden


def drafted(tree, row, node):
    """The tokens from below the root to `node`."""
    return tuple(int(tree.tokens[row, n]) for n in path_to(tree, row, node)[1:])


def slow_search(target, head, root, context, noise, temperature):
    """Per level the W best paths (as tuples) with their scores: every child of every beam."""
    ids = range(head.draft_vocab_size)
    beams, levels = [((), 0.0)], []
    for level in range(DEPTH):
        children = []
        for path, total in beams:
            state = None
            for token in (root, *path):
                state = head.step(target.embed(torch.tensor(token)), state)
            scores = head.logits(context, state)
            if noise is not None:
                scores = scores / temperature + noise[level][head.to_vocab_ids(torch.tensor(ids))]
            log_q = scores.log_softmax(-1)
            for i in ids:
                token = int(head.to_vocab_ids(torch.tensor(i)))
                children.append(((*path, token), total + float(log_q[i])))
        beams = sorted(children, key=lambda child: -child[1])[:WIDTH]
        levels.append(beams)
    return levels


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("name", HEADS)
@torch.inference_mode()
def test_levels_are_the_best_of_all_children(name, seeded):
    target = tiny("llama")
    head = make_head(target, name)
    noise = None
    if seeded:
        position = torch.tensor([[5], [8]]) + torch.arange(DEPTH + 1)
        noise = gumbel(torch.tensor([7, 8]), position, target.vocab_size)
    drafter = HeadDrafter(head, target, TreeConfig(WIDTH, DEPTH))
    tree, seqs, hidden = one_tree(target, drafter, noise, temperature=0.7)
    for row in range(2):
        row_noise = None if noise is None else noise[row]
        levels = slow_search(target, head, int(seqs.root[row]), hidden[row, 0], row_noise, 0.7)
        for depth, beams in enumerate(levels, start=1):
            nodes = (tree.depth[row] == depth).nonzero()[:, 0].tolist()
            found = {drafted(tree, row, n): float(tree.log_q[row, n]) for n in nodes}
            assert found == pytest.approx(dict(beams), abs=1e-9)


def test_models_that_tests_share_are_ordinary_ones_whoever_asks_first():
    with torch.inference_mode():
        target = tiny.__wrapped__("llama")
    assert not target.lm_head.weight.is_inference()


def test_lookaheads_trained_for_it_know_it_by_the_name_that_it_had():
    target = tiny("llama")
    identity = HeadDrafter(make_head(target, "own"), target, TreeConfig(WIDTH, DEPTH)).identity()
    assert identity["kind"] == "RecurrentDrafter"


@torch.inference_mode()
def test_noise_is_left_alone_where_asked():
    target = tiny("llama")
    head = make_head(target, "own")
    noise = gumbel(torch.tensor([7, 8]), torch.arange(5).expand(2, -1), target.vocab_size)
    blind = HeadDrafter(head, target, TreeConfig(WIDTH, DEPTH, seeded=False))
    tokens = one_tree(target, blind, noise)[0].tokens
    assert torch.equal(tokens, one_tree(target, blind)[0].tokens)
    seeing = HeadDrafter(head, target, TreeConfig(WIDTH, DEPTH))
    assert not torch.equal(tokens, one_tree(target, seeing, noise)[0].tokens)


@torch.inference_mode()
def test_shapes_are_parts_of_the_whole_tree():
    target = tiny("llama")
    head = make_head(target, "own")

    def paths(shape, nodes=None):
        drafter = HeadDrafter(head, target, TreeConfig(WIDTH, DEPTH, shape, nodes))
        tree = one_tree(target, drafter)[0]
        assert tree.n_nodes <= drafter.max_nodes
        kept = [n for n in range(tree.n_nodes) if tree.valid[0, n]]
        return {drafted(tree, 0, n): float(tree.log_q[0, n]) for n in kept}

    whole = paths("levels")
    assert len(whole) == 1 + WIDTH * DEPTH
    final = [path for path in whole if len(path) == DEPTH]
    assert set(paths("beams")) == {path[:i] for path in final for i in range(DEPTH + 1)}
    best = paths("best", 7)
    assert set(best) == set(sorted(whole, key=lambda path: -whole[path])[:7])


SHAPES = ("levels", "beams", "best")
WAYS = ({}, dict(do_sample=True, temperature=1.3), dict(do_sample=True, top_k=6))


@pytest.mark.parametrize(
    ("name", "shape", "way"),
    [(name, shape, (i + j) % 3) for i, name in enumerate(HEADS) for j, shape in enumerate(SHAPES)],
)
def test_text_is_plain_decoding(name, shape, way):
    """Every head with every shape, and either in every way to choose."""
    target, rows, seeds = tiny("llama"), prompts(), [3, 4, 5, 6]
    drafter = HeadDrafter(make_head(target, name), target, TreeConfig(WIDTH, DEPTH, shape, nodes=8))
    config = settings(**WAYS[way])
    made = speculative(target, rows, config, seeds=seeds, drafter=drafter)
    assert (made.tokens, made.finish) == alone(target, rows, config, seeds)


@pytest.mark.parametrize(
    ("tree", "named"),
    [(TreeConfig(width=0), "width 0"), (TreeConfig(depth=0), "depth 0"),
     (TreeConfig(shape="best"), "tree.nodes")],
)  # fmt: skip
def test_impossible_trees_are_refused(tree, named):
    target = tiny("llama")
    with pytest.raises(InputError, match=named):
        HeadDrafter(make_head(target, "own"), target, tree)
