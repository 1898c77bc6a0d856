"""Tree operations against brute force: every kept node keeps its path, and nothing else changes."""

import pytest
import torch
from models import VOCAB, make_tree, path_to, random_tree

from redrafter.contracts import TokenTree, root_tree
from redrafter.decode.tree import (
    BUCKETS,
    ancestors,
    best_nodes,
    bucket,
    final_beams,
    keep_nodes,
    pad,
    select,
)

ROWS, NODES = 6, 20


def trees():
    random = torch.Generator().manual_seed(0)
    return [random_tree(random, ROWS, NODES, vocab) for vocab in (3, VOCAB)]


def tokens_to(tree: TokenTree, row: int, node: int) -> tuple[int, ...]:
    return tuple(int(tree.tokens[row, i]) for i in path_to(tree, row, node))


def check_tree(tree: TokenTree) -> None:
    """A parent's index is smaller, its depth is one less, and a valid node's path is valid."""
    for row in range(len(tree.tokens)):
        assert tree.parent[row, 0] == 0 and tree.depth[row, 0] == 0 and tree.valid[row, 0]
        for node in range(1, tree.n_nodes):
            assert tree.parent[row, node] < node
            if tree.valid[row, node]:
                path = path_to(tree, row, node)
                assert tree.depth[row, path].tolist() == list(range(len(path)))
                assert bool(tree.valid[row, path].all())


def kept_nodes(small: TokenTree, tree: TokenTree, row: int) -> list[int]:
    """Which nodes of `tree` the valid nodes of `small` are: same tokens, same scores, in order."""
    found = []
    for node in range(small.n_nodes):
        if not small.valid[row, node]:
            continue
        same = [
            i
            for i in range(tree.n_nodes)
            if small.log_q[row, node] == tree.log_q[row, i] and i not in found
            if tokens_to(small, row, node) == tokens_to(tree, row, i)
        ]
        assert same, f"node {node} of row {row} has a path that the tree did not have"
        found.append(same[0])
    assert found == sorted(found)
    return found


def test_ancestors_by_following_parents():
    for tree in trees():
        depth = int(tree.depth.max())
        seen = ancestors(tree, depth)
        for row in range(ROWS):
            for node in range(NODES):
                assert seen[row, node].nonzero()[:, 0].tolist() == path_to(tree, row, node)
        assert torch.equal(ancestors(tree, depth + 3), seen)  # a deeper limit changes nothing
    chain = make_tree([[7] * 5], [0, 0, 1, 2, 3])
    assert torch.equal(ancestors(chain, 4)[0], torch.ones(5, 5).tril().bool())


def test_ancestors_of_the_root_alone():
    tree = root_tree(torch.tensor([4, 9]))
    check_tree(tree)
    assert tree.tokens.tolist() == [[4], [9]] and ancestors(tree, 0).tolist() == [[[True]]] * 2


@pytest.mark.parametrize("n", [1, 2, 7, NODES - 1, NODES, NODES + 4])
def test_best_nodes_are_the_best(n):
    for tree in trees():
        small = best_nodes(tree, n)
        check_tree(small)
        assert small.n_nodes == min(n, NODES)
        for row in range(ROWS):
            kept = kept_nodes(small, tree, row)
            scores = tree.log_q[row].tolist()
            best = sorted(range(1, NODES), key=lambda i: -scores[i])[: n - 1]
            assert kept == sorted([0, *best])


def test_best_nodes_where_a_child_ties_with_its_parent():
    """A drafter that is sure gives a child its parent's score: the parent must come first."""
    #            root, three siblings, and sure chains below the last and the first of them
    parents = [0, 0, 0, 0, 3, 4, 5, 1, 7]
    tree = make_tree([list(range(9))] * 2, parents)
    score = [0.0, -1.0, -2.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    tree.log_q = torch.tensor([score, [0.0] * 9]).double()
    for n in range(1, 10):
        small = best_nodes(tree, n)
        check_tree(small)
        for row in range(2):
            paths = {tokens_to(small, row, i) for i in range(n)}
            assert len(paths) == n
            assert paths <= {tokens_to(tree, row, i) for i in range(9)}


def test_best_nodes_prefer_nodes_to_padding():
    tree = make_tree([[5, 6, 7, 8, 9]], [0, 0, 0, 2, 2], [[True, False, True, False, True]])
    tree.log_q = torch.tensor([[0.0, -0.1, -3.0, -3.1, -4.0]])
    small = best_nodes(tree, 3)
    check_tree(small)
    assert small.tokens.tolist() == [[5, 7, 9]] and small.valid.all()
    more = best_nodes(tree, 4)  # there is no fourth valid one
    assert sorted(more.tokens[more.valid].tolist()) == [5, 7, 9]


def test_keep_nodes_keeps_paths():
    random = torch.Generator().manual_seed(1)
    for tree in trees():
        seen = ancestors(tree, NODES)
        for share in (0.0, 0.05, 0.3, 1.0):
            chosen = torch.rand(ROWS, NODES, generator=random) < share
            chosen[:, 0] = True
            keep = (seen & chosen[:, :, None]).any(1)  # a node with all its ancestors
            n = int(keep.sum(1).max())
            small = keep_nodes(tree, keep, n)
            check_tree(small)
            assert small.n_nodes == n
            for row in range(ROWS):
                assert kept_nodes(small, tree, row) == keep[row].nonzero()[:, 0].tolist()


def test_keep_nodes_drops_the_last_where_there_are_too_many():
    tree = make_tree([[1, 2, 3, 4]], [0, 0, 1, 1])
    tree.log_q = torch.zeros(1, 4)
    small = keep_nodes(tree, torch.ones(1, 4, dtype=torch.bool), 3)
    check_tree(small)
    assert small.tokens.tolist() == [[1, 2, 3]]


def test_select_takes_every_column_along():
    tree = trees()[1]
    index = torch.tensor([[0, 1, 0]] * ROWS)
    kept = torch.tensor([[True, True, False]] * ROWS)
    small = select(tree, index, kept)
    check_tree(small)
    assert small.valid.tolist() == kept.tolist()
    for name in ("tokens", "depth", "log_q"):
        assert torch.equal(getattr(small, name)[:, :2], getattr(tree, name)[:, :2])
    tree.log_q = None
    assert select(tree, index, kept).log_q is None


def test_final_beams_keep_only_prefixes_of_the_last_level():
    width, depth = 4, 6
    random = torch.Generator().manual_seed(2)
    tokens, parent, level = [[0]], [torch.zeros(ROWS, 1).long()], [torch.zeros(ROWS, 1).long()]
    for d in range(1, depth + 1):
        first = 1 + (d - 2) * width if d > 1 else 0
        up = torch.randint(width if d > 1 else 1, (ROWS, width), generator=random)
        parent.append(first + up)
        level.append(torch.full((ROWS, width), d))
        tokens.append([0])
    parent, level = torch.cat(parent, 1), torch.cat(level, 1)
    tokens = torch.randint(VOCAB, parent.shape, generator=random)
    tree = TokenTree(tokens, parent, level, torch.ones_like(tokens).bool(), tokens.double())
    small = final_beams(tree, width, depth)
    check_tree(small)
    assert small.n_nodes in BUCKETS
    for row in range(ROWS):
        want = set()
        for leaf in range(tree.n_nodes - width, tree.n_nodes):
            want |= set(path_to(tree, row, leaf))
        assert set(kept_nodes(small, tree, row)) == want


def test_pad_adds_leaves_that_are_never_accepted():
    tree = trees()[0]
    wide = pad(tree, NODES + 5)
    check_tree(wide)
    assert wide.n_nodes == NODES + 5 and not wide.valid[:, NODES:].any()
    for name in ("tokens", "parent", "depth", "valid", "log_q"):
        assert torch.equal(getattr(wide, name)[:, :NODES], getattr(tree, name))
    assert pad(tree, NODES) is tree and pad(tree, 3) is tree


def test_bucket():
    assert [bucket(n) for n in (1, 6, 7, 8, 257)] == [1, 7, 7, 9, 257]
    assert bucket(1000) == 1000  # beyond the last one: as large as needed
    assert list(BUCKETS) == sorted(set(BUCKETS))
