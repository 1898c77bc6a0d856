"""Several drafters' guesses in one tree, the likeliest ones under a common budget of nodes.

Every member drafts its own tree. Equal paths become one node, and the `nodes` best nodes of all are
verified. "Best" needs one scale for drafters that know nothing of each other: what share of a
member's guesses of this depth and confidence, made by it alone or by others too, turned out right,
counted online and for guesses that were not verified too (`hindsight.py`). Where one member knows
nearly everything, estimating that scale can cost more than the others add; so the nodes of the best
member come first until the mixture has proven better (`Lead`). Made for the seeded rule, which does
not ask where guesses are from; to a ratio rule all of them are guesses with q = 1, drawn or not.
Ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree
from redrafter.decode.tree import bucket, select
from redrafter.drafters.compose import Composite
from redrafter.drafters.hindsight import Past

# Confidences are binned between these cumulative log-scores.
_EDGES = (-9.0, -6.5, -5.0, -4.0, -3.0, -2.4, -1.8, -1.3, -0.9, -0.6, -0.4, -0.25, -0.15, -0.07)


# Right nodes that a bin of confidence needs before it weighs as much as all bins of its depth.
# Tokens per step above the head's, sampled GSM8K, 200 held-out prompts that are not those of
# docs/results/drafters.md: 50, 100, 200, 400 give 0.019, 0.015, 0.023, 0.022 (95 %: 0.013 either
# way), the same but for noise; 2, and no account of `shared`, 0.006, and 0.02 less on the first 25.
_BIN_NODES = 200.0


class Calibration:
    """How many of a member's nodes were right, of how many by their scores.

    A score is a log-probability that is corrected by the ratio of the two, so nodes of one bin keep
    their order. There is a ratio per depth, learned soon, and one per bin of confidence below it,
    which starts there and leaves it as counts come in: what few nodes say would reorder a member
    whose scores are right already. Nodes that another member has as well are counted by themselves:
    what two agree on is right far more often than what one of them adds.
    prior_nodes: so many right ones per depth, as many as expected, are taken as seen beforehand
    """

    def __init__(self, max_depth: int, prior_nodes: float, device: torch.device):
        self.edges = torch.tensor(_EDGES, device=device)
        self.prior_nodes = prior_nodes
        self.right = torch.zeros(2, max_depth + 1, len(_EDGES) + 1, device=device)
        self.expected = torch.zeros_like(self.right)
        self._log_ratio: Tensor | None = None  # of every cell; None once the counts have changed

    def _cell(self, log_q: Tensor, depth: Tensor, shared: Tensor) -> Tensor:
        n_depths, n_bins = self.right.shape[1:]
        bins = torch.bucketize(log_q.float().contiguous(), self.edges)
        return (shared.long() * n_depths + depth) * n_bins + bins

    def _ratios(self) -> Tensor:
        right, expected = self.right.sum(-1, keepdim=True), self.expected.sum(-1, keepdim=True)
        of_depth = (right + self.prior_nodes) / (expected + self.prior_nodes)
        ratio = (self.right + _BIN_NODES) / (self.expected + _BIN_NODES / of_depth)
        return ratio.log().flatten()

    def log_p(self, log_q: Tensor, depth: Tensor, shared: Tensor) -> Tensor:
        """(B, N) log-probability that the node is right, at most 0; -inf stays -inf.

        log_q: (B, N) its score; depth: (B, N); shared: (B, N) bool, other members have it too
        """
        if self._log_ratio is None:
            self._log_ratio = self._ratios()
        ratio = self._log_ratio[self._cell(log_q, depth, shared)]
        return (log_q.float() + ratio).clamp(max=0.0)

    def learn(
        self, log_q: Tensor, depth: Tensor, shared: Tensor, right: Tensor, known: Tensor
    ) -> None:
        """right, known: (B, N) bool, see `Past.right`; nodes that are not known are passed over."""
        known = known & (log_q > float("-inf"))
        cell = self._cell(log_q, depth, shared).flatten()
        self.right.view(-1).index_add_(0, cell, (right & known).flatten().float())
        expected = torch.where(known, log_q.float().exp(), 0.0)
        self.expected.view(-1).index_add_(0, cell, expected.flatten())
        self._log_ratio = None


_BEHIND = -1e4  # in nats, below whatever a member says
#: standard errors by which the mixture must lead
_PROOF = 2.0


class Lead:
    """Whose nodes come first: the mixture's, once it has had more levels right than the best member
    by `_PROOF` standard errors; until then that member's, the first one's to begin with.

    Every choice is judged by the text, verified or not: how many levels its tree had right.
    """

    def __init__(self, n_members: int, device: torch.device):
        self.levels = torch.zeros(n_members, device=device)  # right ones, per member
        self.ahead = torch.zeros_like(self.levels)  # the mixture's above each member's
        self.square = torch.zeros_like(self.levels)  # of the differences, step by step

    def learn(self, levels: Tensor, known: Tensor) -> None:
        """levels: (B, M+1) right ones of each member and, last, of the mixture; known: (B,) bool"""
        levels = torch.where(known[:, None], levels.float(), 0.0)
        differ = levels[:, -1:] - levels[:, :-1]
        self.levels += levels[:, :-1].sum(0)
        self.ahead += differ.sum(0)
        self.square += differ.square().sum(0)

    def first(self) -> Tensor:
        """() int64: the member's number, M for the mixture."""
        best = self.levels.argmax()
        proven = self.ahead > _PROOF * self.square.sqrt()
        return torch.where(proven.gather(0, best[None])[0], len(self.levels), best)


def shared_nodes(scores: Tensor) -> Tensor:
    """(B, N) bool: nodes that more than one member has. scores: (B, M, N), see `merge`."""
    return (scores > float("-inf")).sum(1) > 1


def merge(trees: list[TokenTree], levels: int) -> tuple[TokenTree, Tensor]:
    """One tree of all nodes of trees with a common root; equal paths share a node. levels: of the
    deepest tree, or more.

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
    for d in range(1, levels + 1):
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


def in_order(scores: Tensor, tree: TokenTree, n: int) -> Tensor:
    """(B, M+1, n) int64: the best n nodes, the root first, with those of each member first and what
    it leaves by the mixture's score; last by the mixture's score alone. Each is ancestor-closed, as
    no score is above the parent's and equal ones keep their order.

    scores: (B, M, N), see `merge`; tree: with the mixture's score
    """
    whole = tree.log_q[:, None]
    behind = whole + _BEHIND
    own = torch.where(scores > float("-inf"), scores, behind)
    ranked = torch.cat([own, whole], 1).masked_fill(~tree.valid[:, None], float("-inf"))
    ranked[:, :, 0] = float("inf")
    return ranked.sort(dim=2, stable=True, descending=True).indices[:, :, :n]


class Mixture(Composite):
    """The best nodes of several drafters. What a member learns from the tree that was verified
    (`skip:refresh=step`, `select`) it learns from the mixture's, not from its own.

    members: name -> drafter; they share nothing
    nodes: N, the root counted; where the best member's come first, others fill what it leaves
    prior_nodes: how soon what was counted outweighs a member's own scores, see `Calibration`
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
        # Both are kept from generation to generation.
        self._calibrations: list[Calibration] = []
        self._lead: Lead | None = None

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        if not self._calibrations:
            self._calibrations = [
                Calibration(self.max_depth, self.prior_nodes, seqs.ids.device) for _ in self.members
            ]
            self._lead = Lead(len(self.members), seqs.ids.device)
        self._past: list[tuple[Past, Tensor, Tensor]] = []
        self._verified = torch.zeros(len(self.members), device=seqs.ids.device)
        self._accepted = torch.zeros_like(self._verified)

    def start(self) -> None:
        for member in self.members.values():
            member.start()

    def extend(self, level: int) -> None:
        for member in self.members.values():
            if level <= member.max_depth:
                member.extend(level)

    def tree(self) -> TokenTree:
        """Reads the host once, besides what its members do."""
        tree, scores = merge([m.tree() for m in self.members.values()], self.max_depth)
        waits = [past.waits(self.seqs).long() for past, *_ in self._past]
        n_valid, *waits = torch.stack([tree.valid.sum(1).max(), *waits]).tolist()
        self._learn(waits.index(1) if 1 in waits else len(waits))
        shared = shared_nodes(scores)
        each = [c.log_p(scores[:, i], tree.depth, shared) for i, c in enumerate(self._calibrations)]
        log_p = torch.stack(each, 1).amax(1)
        log_p[:, 0] = 0.0
        for d in range(2, self.max_depth + 1):  # no node is likelier than its parent
            bound = torch.minimum(log_p, log_p.gather(1, tree.parent))
            log_p = torch.where(tree.depth == d, bound, log_p)
        tree.log_q = log_p.masked_fill(~tree.valid, float("-inf"))
        n = min(self.max_nodes, bucket(n_valid))
        order = in_order(scores, tree, n)
        nowhere = torch.zeros(*order.shape[:2], tree.n_nodes, dtype=torch.bool, device=order.device)
        chosen = nowhere.scatter_(2, order, True)
        # A copy: the loop narrows `valid` of the tree that it is given.
        kept = replace(tree, valid=tree.valid.clone())
        past = Past(kept, self.seqs.length, self.seqs.live, self.max_depth)
        self._past.append((past, scores, chosen))
        index = order.index_select(1, self._lead.first()[None])[:, 0].sort(1).values
        return select(tree, index, torch.ones_like(index, dtype=torch.bool))

    def _learn(self, n: int) -> None:
        """Judge the first n of the past trees, which the text has outgrown."""
        for past, scores, chosen in self._past[:n]:
            right, known = past.right(self.seqs)
            drafted = past.tree.depth > 0
            known = known & drafted
            levels = (chosen & (right & drafted)[:, None]).sum(2)
            self._lead.learn(levels, known.any(1))
            shared = shared_nodes(scores)
            for i, calibration in enumerate(self._calibrations):
                calibration.learn(scores[:, i], past.tree.depth, shared, right, known)
                mine = known & (scores[:, i] > float("-inf"))
                self._verified[i] += mine.sum()
                self._accepted[i] += (mine & right).sum()
        del self._past[:n]

    def report(self) -> dict[str, Any]:
        """Per member: nodes that were drafted and judged, how many were right, its own report."""
        pairs = zip(self._verified.tolist(), self._accepted.tolist(), strict=True)
        return {
            name: {"judged_nodes": int(judged), "right_nodes": int(right), **member.report()}
            for (name, member), (judged, right) in zip(self.members.items(), pairs, strict=True)
        }
