"""Operations on token trees, all on the device, none looking at a row's neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.contracts import TokenTree

# Trees are padded to one of these sizes, so that shapes repeat. Each is 1 + a usual W * K.
BUCKETS = (1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 25, 33, 41, 49, 65, 81, 97, 129, 193, 257)


def bucket(n: int) -> int:
    """The smallest bucket that holds n nodes."""
    return next((size for size in BUCKETS if size >= n), n)


def ancestors(tree: TokenTree, max_depth: int) -> Tensor:
    """(B, N, N) bool: [b, i, j] is true iff j lies on the path from the root to i, i included."""
    n = tree.n_nodes
    seen = torch.eye(n, dtype=torch.bool, device=tree.tokens.device).repeat(len(tree.tokens), 1, 1)
    up = [tree.parent]
    for _ in range(1, max_depth):
        up.append(tree.parent.gather(1, up[-1]))
    return seen.scatter_(2, torch.stack(up[:max_depth], 2), True) if max_depth > 0 else seen


def level_start(level: int, width: int) -> int:
    """Index of the first node of a level where every level below the root has `width` nodes."""
    return 0 if level == 0 else 1 + (level - 1) * width


def level_depths(n: int, width: int, device: torch.device) -> Tensor:
    """(n,) int64: depth of each of the first n nodes of such a tree."""
    return (torch.arange(n, device=device) + width - 1) // width


def select(tree: TokenTree, index: Tensor, kept: Tensor) -> TokenTree:
    """The sub-tree of some nodes.

    index: (B, n) int64 node indices, ascending, ancestor-closed, 0 first
    kept:  (B, n) bool, False where `index` is padding (such a node becomes an invalid leaf)
    """
    place = torch.zeros_like(tree.parent)  # old index -> new one
    # Padding repeats index 0, whose place is 0 as well: written last or not, the same.
    order = torch.arange(index.shape[1], device=index.device).expand_as(index)
    place.scatter_(1, index, torch.where(kept, order, 0))
    parent = place.gather(1, tree.parent.gather(1, index))

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(1, index)

    valid = pick(tree.valid) & kept
    return TokenTree(pick(tree.tokens), parent, pick(tree.depth), valid, pick(tree.log_q))


def keep_nodes(tree: TokenTree, keep: Tensor, n: int) -> TokenTree:
    """The sub-tree of the nodes in `keep` (B, N) bool, at most n of them, ancestor-closed."""
    # A stable sort puts the kept nodes first and leaves them in their order.
    index = torch.sort(~keep, dim=1, stable=True).indices[:, :n]
    kept = keep.gather(1, index)
    return select(tree, torch.where(kept, index, 0), kept)


def best_nodes(tree: TokenTree, n: int) -> TokenTree:
    """The n nodes of highest cumulative score `log_q`, the root always among them.

    A child's score never exceeds its parent's, and at equal scores the stable sort prefers the
    smaller index, so the result is ancestor-closed. Source: EAGLE-2's reranking; OPT-Tree.
    """
    if n >= tree.n_nodes:
        return tree
    score = tree.log_q.masked_fill(~tree.valid, float("-inf"))
    score = torch.cat([torch.full_like(score[:, :1], float("inf")), score[:, 1:]], dim=1)
    best = torch.sort(score, dim=1, stable=True, descending=True).indices[:, :n]
    index = best.sort(dim=1).values
    return select(tree, index, torch.ones_like(index, dtype=torch.bool))


def best_path(tree: TokenTree, max_depth: int) -> TokenTree:
    """Of every row one path, for a target that verifies chains: from the root on the best child,
    by `log_q`, else the first one. Node i is at depth i; what is drawn for a ratio rule is lost.
    """
    depths = min(max_depth, tree.n_nodes - 1)
    rank = torch.arange(tree.n_nodes, 0, -1, device=tree.tokens.device).expand_as(tree.parent)
    score = rank if tree.log_q is None else tree.log_q
    node = torch.zeros_like(tree.parent[:, :1])
    path, valid = [node], [torch.ones_like(node, dtype=torch.bool)]
    for depth in range(1, depths + 1):
        children = tree.valid & (tree.parent == node) & (tree.depth == depth)
        children = children & valid[-1]
        lowest = torch.finfo(score.dtype).min if score.is_floating_point() else 0
        node = torch.where(children, score, lowest).argmax(1, keepdim=True)
        valid.append(children.gather(1, node))
        path.append(torch.where(valid[-1], node, 0))
    index, valid = torch.cat(path, 1), torch.cat(valid, 1)
    depth = torch.arange(depths + 1, device=index.device).expand_as(index)
    log_q = None if tree.log_q is None else tree.log_q.gather(1, index)
    return TokenTree(tree.tokens.gather(1, index), (depth - 1).clamp(min=0), depth, valid, log_q)


def final_beams(tree: TokenTree, width: int, max_depth: int) -> TokenTree:
    """Only the prefixes of the last level's nodes: the tree that plain beam search verifies.

    One read of the host per step, for the size of the largest row's tree.
    """
    seen = ancestors(tree, max_depth)
    keep = seen[:, -width:].any(1)
    n = bucket(int(keep.sum(1).max()))
    return keep_nodes(tree, keep, min(n, tree.n_nodes))


def pad(tree: TokenTree, n: int) -> TokenTree:
    """Add invalid leaves under the root until the tree has n nodes."""
    missing = n - tree.n_nodes
    if missing <= 0:
        return tree

    def widen(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.nn.functional.pad(x, (0, missing))

    return TokenTree(
        widen(tree.tokens),
        widen(tree.parent),
        widen(tree.depth),
        widen(tree.valid),
        widen(tree.log_q),
        tree.draws,
    )
