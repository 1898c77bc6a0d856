"""Multi-candidate drafting: every node of level l - 1 gets k_l children, from a head or a model.

What the ratio rules (`decode/ratio.py`) are made for: children are *drawn*, and every draw is kept,
in order, with the distribution it came from. Two equal draws below a node share one node, so they
share the forward, and are two draws all the same. For comparison the same tree can be filled with
the likeliest children, or with those that the seeded rule will most probably choose.
Sources: Yang et al. 2024 (MCSD, arXiv 2401.06706); several drafters, SpecInfer (2305.09781); one
child everywhere, speculative sampling (2211.17192, 2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from redrafter.contracts import Drafter, Draws, InputError, RowState, TokenTree, Truth
from redrafter.decode.noise import DRAWING, draw, private_uniform
from redrafter.drafters.features import MODEL_FEATURES, model_features
from redrafter.drafters.frontier import Frontier, log_probabilities

How = Literal["iid", "without", "top", "seeded"]
HOW = ("iid", "without", "top", "seeded")
_MODES = {"iid": "iid", "without": "without_replacement"}
_MOST_LEVELS = 64  # so that (length, level) is one counter


def n_nodes(children: Sequence[int]) -> int:
    """N of a tree by (k_1 .. k_L), the root counted: (4, 2, 2) -> 1 + 4 + 8 + 16."""
    total = width = 1
    for k in children:
        width *= k
        total += width
    return total


class MultiCandidate(Drafter):
    """A tree by (k_1 .. k_L).

    frontiers: one, or several for SpecInfer's rule: the r-th draw below a node is then from the
        r-th of them, in turn; each reads the whole tree
    children: k_1 .. k_L
    how: the children of a node are
        iid      drawn from q, each by itself (with replacement)
        without  drawn from q without replacement: the default of the paper's code
        top      the k likeliest: what a draft temperature of 0 means; q = 1 by a ratio rule
        seeded   the k best of log q + the verifier's own noise; for the seeded rule
    temperature: of the drafts; None is the target's. 0 is `top`
    When decoding greedily every way is `top`.
    Raises InputError where options contradict each other.
    """

    feature_names = MODEL_FEATURES

    def __init__(
        self,
        frontiers: Sequence[Frontier],
        children: Sequence[int] = (4, 2, 2),
        how: How = "without",
        temperature: float | None = None,
    ):
        if not children or min(children) < 1 or len(children) >= _MOST_LEVELS:
            raise InputError(
                f"multi: children {list(children)} must be 1 to {_MOST_LEVELS - 1} positive numbers"
            )
        if how not in HOW:
            raise InputError(f"multi: how={how!r} is not one of {', '.join(HOW)}")
        if temperature is not None and temperature < 0:
            raise InputError(f"multi: temperature {temperature} is negative")
        if len(frontiers) > 1 and how != "iid":
            raise InputError(
                f"multi: children of several drafters must be drawn independently, not {how!r}: "
                "set how to iid"
            )
        self.frontiers, self.children = list(frontiers), tuple(children)
        self.how: How = "top" if temperature == 0 else how
        self.temperature = temperature
        self.max_depth, self.max_nodes = len(self.children), n_nodes(children)
        self.needs = frozenset().union(*(f.needs for f in frontiers))

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        for frontier in self.frontiers:
            frontier.begin(seqs)

    def observe(self, truth: Truth) -> None:
        for frontier in self.frontiers:
            frontier.observe(truth)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "children": list(self.children), "how": self.how, "temperature": self.temperature,
            "sources": [frontier.fingerprint() for frontier in self.frontiers],
        }  # fmt: skip

    def start(self) -> None:
        root = self.seqs.root[:, None]
        logits = [frontier.start() for frontier in self.frontiers]
        rooms = [room for f in self.frontiers if (room := f.room()) is not None]
        self._room = torch.stack(rooms).amin(0) if rooms else None
        self._now = "top" if self.seqs.seeds is None else self.how
        #: tokens that the columns of q are of; q of several drafters is over the whole vocabulary
        self._ids = self.frontiers[0].ids if len(self.frontiers) == 1 else None
        self._noise = self.seqs.noise if self._now == "seeded" else None
        if self._noise is not None and self._ids is not None:
            self._noise = self._noise[..., self._ids]
        self._q: list[Tensor] = []  # per level (B, w, Q, Vd), of the nodes above it
        self._order: list[Tensor] = []  # per level (B, w, k)
        self._tokens, self._parent = [root], [torch.zeros_like(root)]
        self._valid, self._first = [torch.ones_like(root, dtype=torch.bool)], [0]
        self._total = [torch.zeros(root.shape, dtype=torch.float64, device=root.device)]
        self._levels = min(f.levels for f in self.frontiers)
        self._next = self._log_q(logits) if self._levels > 0 else None

    def _log_q(self, logits: list[Tensor]) -> Tensor:
        """(B, w, Q, Vd) log-probabilities of all frontiers."""
        temperature = self.temperature or self.seqs.temperature
        found = [log_probabilities(x, temperature) for x in logits]
        if len(found) == 1:
            return found[0][:, :, None]
        whole = zip(self.frontiers, found, strict=True)
        return torch.stack([frontier.over_vocabulary(log_q) for frontier, log_q in whole], 2)

    def extend(self, level: int) -> None:
        if level > self._levels:  # no row has room in the draft model's context
            return
        if level > 1:
            logits = [f.advance(self._tokens[-1], self._place) for f in self.frontiers]
            self._next = self._log_q(logits)
        log_q, k = self._next, self.children[level - 1]  # (B, w, Q, Vd)
        columns, exists = self._choose(log_q, k, level)  # (B, w, k)
        tokens = columns if self._ids is None else self._ids[columns]
        w = tokens.shape[1]
        source = torch.arange(k, device=tokens.device) % len(self.frontiers)
        row, above = (torch.arange(n, device=tokens.device) for n in tokens.shape[:2])
        own = log_q[row[:, None, None], above[:, None], source, columns]
        total = self._total[-1][:, :, None] + own
        valid = exists & self._valid[-1][:, :, None]
        if self._room is not None:
            valid = valid & (level <= self._room)[:, None, None]
        # A draw that equals an earlier one below the same node shares its node.
        equal = tokens[..., :, None] == tokens[..., None, :]
        earliest = equal.int().argmax(-1)  # (B, w, k): the first draw of this token
        fresh = valid & (earliest == torch.arange(k, device=tokens.device))
        child = torch.arange(w, device=tokens.device)[:, None] * k + earliest  # place in the level
        place = torch.arange(w * k, device=tokens.device) // k
        self._q.append(log_q)
        self._append(tokens.flatten(1), place.expand(len(tokens), -1), fresh.flatten(1),
                     total.flatten(1), child, valid)  # fmt: skip

    def features(self, names: Sequence[str] | None = None) -> Tensor | None:
        """Of the first drafter's q, without noise whatever the draws were made with."""
        if not self._q:
            return None
        pairs = zip(self._total, self._valid, strict=True)
        scores = [total.masked_fill(~valid, float("-inf")) for total, valid in pairs]
        log_q = self._q[-1][:, :, 0]
        return model_features(log_q, scores, names=names).float()

    def _choose(self, log_q: Tensor, k: int, level: int) -> tuple[Tensor, Tensor]:
        """Columns (B, w, k) of the children of every node of the level above, and which exist."""
        batch, w = log_q.shape[:2]
        if self._now in ("top", "seeded"):
            scores = log_q[:, :, 0]
            if self._now == "seeded":
                scores = scores + self._noise[:, level - 1 : level].to(scores.dtype)
            best, tokens = scores.topk(min(k, scores.shape[-1]), dim=-1)
            missing = (0, k - tokens.shape[-1])
            tokens = torch.nn.functional.pad(tokens, missing)
            return tokens, torch.nn.functional.pad(best, missing, value=float("-inf")).isfinite()
        # The counter of this step and level: no step begins at the same length twice.
        counter = (self.seqs.length * _MOST_LEVELS + level)[:, None]
        u = private_uniform(self.seqs.seeds, DRAWING, counter, w * k).view(batch, w, k)
        q = log_q.exp()
        if self._now == "iid":
            n = len(self.frontiers)
            tokens = torch.empty(batch, w, k, dtype=torch.long, device=q.device)
            for i in range(n):
                tokens[..., i::n] = draw(q[:, :, i], u[..., i::n])
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        q, tokens, exists = q[:, :, 0].clone(), [], []
        for r in range(k):
            exists.append(q.sum(-1) > 0)
            tokens.append(draw(q, u[..., r : r + 1]).clamp(max=q.shape[-1] - 1))
            q.scatter_(-1, tokens[-1], 0.0)
        return torch.cat(tokens, -1), torch.stack(exists, -1)

    def _append(
        self, tokens: Tensor, place: Tensor, fresh: Tensor, total: Tensor, child: Tensor,
        drawn: Tensor,
    ) -> None:  # fmt: skip
        """Add a level: all (B, w k) but child and drawn (B, w, k), the node of every draw."""
        if fresh.device.type == "cpu" and not bool(fresh.all()):
            # Nodes that exist first; an accelerator would rather read what nobody needs than wait.
            order = torch.sort((~fresh).to(torch.uint8), dim=1, stable=True).indices
            width = max(1, int(fresh.sum(1).max()))
            new_place = torch.empty_like(order)
            new_place.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
            child = new_place.gather(1, child.flatten(1)).view_as(child)
            order = order[:, :width]
            tokens, place, fresh, total = (
                x.gather(1, order) for x in (tokens, place, fresh, total)
            )
        first = self._first[-1] + self._tokens[-1].shape[1]
        self._order.append(torch.where(drawn, first + child, -1))
        self._parent.append(self._first[-1] + place)
        self._first.append(first)
        self._tokens.append(tokens)
        self._valid.append(fresh)
        self._total.append(total)
        self._place = place

    def tree(self) -> TokenTree:
        tokens = torch.cat(self._tokens, 1)
        depth = [torch.full_like(level, d) for d, level in enumerate(self._tokens)]
        tree = TokenTree(
            tokens,
            torch.cat(self._parent, 1),
            torch.cat(depth, 1),
            torch.cat(self._valid, 1),
            torch.cat(self._total, 1),
        )
        if self._now in _MODES and self._order:
            tree.draws = self._draws(tree)
        return tree

    def _draws(self, tree: TokenTree) -> Draws:
        rounds = max(self.children)
        pad = torch.nn.functional.pad
        inner = torch.cat([pad(o, (0, rounds - o.shape[2]), value=-1) for o in self._order], 1)
        order = pad(inner, (0, 0, 0, tree.n_nodes - inner.shape[1]), value=-1)
        source = None
        if len(self.frontiers) > 1:
            turn = torch.arange(rounds, device=order.device) % len(self.frontiers)
            source = turn.expand_as(order)
        return Draws(order, _MODES[self._now], torch.cat(self._q, 1), source, self._ids)
