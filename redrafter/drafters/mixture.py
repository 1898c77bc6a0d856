"""Several drafters' guesses in one tree, the likeliest ones under a common budget of nodes.

Every member drafts its own tree. Equal paths become one node, and the `nodes` best nodes of all are
verified. "Best" needs one scale for drafters that know nothing of each other: what share of a
member's guesses of this depth and confidence turned out right, counted online and for guesses that
were not verified too (`hindsight.py`). Made for the seeded rule, which does not ask where guesses
are from; to a ratio rule all of them are guesses with q = 1, drawn or not. Ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, Sequences, TokenTree
from redrafter.decode.tree import best_nodes, bucket
from redrafter.drafters.compose import Composite
from redrafter.drafters.hindsight import Past

# Confidences are binned between these cumulative log-scores.
_EDGES = (-9.0, -6.5, -5.0, -4.0, -3.0, -2.4, -1.8, -1.3, -0.9, -0.6, -0.4, -0.25, -0.15, -0.07)


class Calibration:
    """Per depth and bin of confidence: how many nodes were right, of how many by their scores.

    A score is a log-probability that is corrected by the ratio of the two, so nodes of one bin keep
    their order.
    prior_nodes: so many right ones, as many as expected, are taken as seen beforehand
    """

    def __init__(self, max_depth: int, prior_nodes: float, device: torch.device):
        self.edges = torch.tensor(_EDGES, device=device)
        self.n_bins, self.prior_nodes = len(_EDGES) + 1, prior_nodes
        self.right = torch.full(((max_depth + 1) * self.n_bins,), prior_nodes, device=device)
        self.expected = self.right.clone()

    def _cell(self, log_q: Tensor, depth: Tensor) -> Tensor:
        return depth * self.n_bins + torch.bucketize(log_q.float().contiguous(), self.edges)

    def log_p(self, log_q: Tensor, depth: Tensor) -> Tensor:
        """(B, N) log-probability that the node is right, at most 0; -inf stays -inf."""
        cell = self._cell(log_q, depth)
        return (log_q.float() + (self.right[cell] / self.expected[cell]).log()).clamp(max=0.0)

    def learn(self, log_q: Tensor, depth: Tensor, right: Tensor, known: Tensor) -> None:
        known = known & (log_q > float("-inf"))
        cell = self._cell(log_q, depth).flatten()
        self.right.index_add_(0, cell, (right & known).flatten().float())
        expected = torch.where(known, log_q.float().exp(), 0.0)
        self.expected.index_add_(0, cell, expected.flatten())


def merge(trees: list[TokenTree]) -> tuple[TokenTree, Tensor]:
    """One tree of all nodes of trees with a common root; equal paths share a node.

    Returns the tree, in which a repeated node is invalid and its children hang below the one that
    stays, and (B, M, N) the cumulative log-score that each of the M trees gives to each node, -inf
    where it has no such node.
    """
    tokens, parent, depth, valid, own, start = [], [], [], [], [], 0
    for tree in trees:
        tokens.append(tree.tokens)
        # All roots but the first become copies of it.
        parent.append(torch.where(tree.depth == 0, 0, tree.parent + start))
        depth.append(tree.depth)
        valid.append(tree.valid)
        score = tree.log_q
        if score is None:  # guesses without a score: the deeper, the less likely
            score = -tree.depth.float()
        own.append(score.masked_fill(~tree.valid, float("-inf")).float())
        start += tree.n_nodes
    tokens, parent, depth, valid = (torch.cat(x, 1) for x in (tokens, parent, depth, valid))
    same = torch.zeros_like(tokens)  # the first node with this path
    alike = (tokens[:, :, None] == tokens[:, None, :]) & (depth[:, :, None] == depth[:, None, :])
    alike &= valid[:, :, None] & valid[:, None, :]
    for d in range(1, int(depth.max()) + 1):
        above = same.gather(1, parent)
        equal = alike & (above[:, :, None] == above[:, None, :])
        same = torch.where(depth == d, equal.int().argmax(-1), same)
    node = torch.arange(tokens.shape[1], device=tokens.device)
    # An invalid node equals nothing, not even itself.
    same = torch.where(valid | (depth == 0), same, node)
    scores = tokens.new_zeros(len(tokens), len(trees), len(node)).float()
    scores.fill_(float("-inf"))
    start = 0
    for i, tree in enumerate(trees):
        where = same[:, start : start + tree.n_nodes]
        scores[:, i].scatter_reduce_(1, where, own[i], "amax")
        start += tree.n_nodes
    merged = TokenTree(tokens, same.gather(1, parent), depth, valid & (same == node))
    return merged, scores


class Mixture(Composite):
    """The best nodes of several drafters. What a member learns from the tree that was verified
    (`skip:refresh=step`, `select`) it learns from the mixture's, not from its own.

    members: name -> drafter; they share nothing
    nodes: N, the root counted
    prior_nodes: how soon what was counted outweighs a member's own scores
    A node that several propose is as likely as the surest of them says; treating them as
    independent made no difference (gsm-stories-6m, head and suffix automaton, 4 x 20 prompts).
    """

    def __init__(
        self,
        members: Mapping[str, Drafter],
        nodes: int = 17,
        prior_nodes: float = 2.0,
    ):
        super().__init__("mixture", members, together=True)
        if nodes < 2:
            raise InputError(f"mixture: nodes {nodes} must be at least 2, the root counted")
        for name, member in members.items():
            if getattr(member, "budget", None) is not None:
                raise InputError(
                    f"mixture: {name} has a node budget of its own, which learns from its own "
                    "trees alone: leave it out, `nodes` is the budget here"
                )
        if not prior_nodes > 0:
            raise InputError(f"mixture: prior_nodes {prior_nodes} must be positive")
        self.prior_nodes, self.max_nodes = prior_nodes, nodes
        self._calibrations: list[Calibration] = []  # kept from generation to generation

    def begin(self, seqs: Sequences) -> None:
        super().begin(seqs)
        if not self._calibrations:
            self._calibrations = [
                Calibration(self.max_depth, self.prior_nodes, seqs.ids.device) for _ in self.members
            ]
        self._past: list[tuple[Past, Tensor]] = []
        self._verified = torch.zeros(len(self.members), device=seqs.ids.device)
        self._accepted = torch.zeros_like(self._verified)

    def start(self) -> None:
        self._learn()
        for member in self.members.values():
            member.start()

    def extend(self, level: int) -> None:
        for member in self.members.values():
            if level <= member.max_depth:
                member.extend(level)

    def tree(self) -> TokenTree:
        tree, scores = merge([m.tree() for m in self.members.values()])
        # A copy: the loop narrows `valid` of the tree that it is given.
        kept = replace(tree, valid=tree.valid.clone())
        self._past.append((Past(kept, self.seqs.length, self.seqs.live), scores))
        log_p = torch.stack(
            [c.log_p(scores[:, i], tree.depth) for i, c in enumerate(self._calibrations)], 1
        ).amax(1)
        log_p[:, 0] = 0.0
        for d in range(2, int(tree.depth.max()) + 1):  # no node is likelier than its parent
            bound = torch.minimum(log_p, log_p.gather(1, tree.parent))
            log_p = torch.where(tree.depth == d, bound, log_p)
        tree.log_q = log_p.masked_fill(~tree.valid, float("-inf"))
        return best_nodes(tree, min(self.max_nodes, bucket(int(tree.valid.sum(1).max()))))

    def _learn(self) -> None:
        """Judge the past trees that the text has outgrown."""
        while self._past and self._past[0][0].ripe(self.seqs):
            past, scores = self._past.pop(0)
            right, known = past.right(self.seqs)
            drafted = past.tree.depth > 0
            known = known & drafted
            for i, calibration in enumerate(self._calibrations):
                calibration.learn(scores[:, i], past.tree.depth, right, known)
                mine = known & (scores[:, i] > float("-inf"))
                self._verified[i] += mine.sum()
                self._accepted[i] += (mine & right).sum()

    def report(self) -> dict[str, Any]:
        """Per member: nodes that were drafted and judged, how many were right, its own report."""
        pairs = zip(self._verified.tolist(), self._accepted.tolist(), strict=True)
        return {
            name: {"judged_nodes": int(judged), "right_nodes": int(right), **member.report()}
            for (name, member), (judged, right) in zip(self.members.items(), pairs, strict=True)
        }
