"""The ratio rules of the papers: accept what was drawn from q with a probability made of p / q.

Alternatives to the seeded rule (`verify.py`), for comparison. The text has the target's law too,
but it changes with the drafter, and exactness rests on the draws: every one must be tested, in the
order in which it was drawn and against the distribution it was really drawn from. Where the tree
carries no draws, its nodes are guesses that were not drawn at all, and q = 1.

At a node with draws x_1 .. x_R, p_1 = p:
  ratio   accept x_r with probability min(1, p_r(x_r) / q_r(x_r)), else p_{r+1} = norm((p_r - q_r)+)
          One draw a node is speculative sampling (2211.17192, 2302.01318). Drawn independently from
          one q, or from a q_r each: SpecInfer's multi-round rule (2305.09781), multi-candidate
          sampling with replacement (2401.06706). Without replacement q_{r+1} is q_r without x_r
          (2401.06706). Guesses (q = 1): accept x with probability p_r(x), else take x out of p_r.
  kseq    k-SEQ (SpecTr, 2310.15141), for independent draws from one q: the same threshold for all
          of a node's k draws, accept x_r with probability min(1, p(x_r) / (rho q(x_r))).
The first accepted draw is descended to; where all are rejected, or at a leaf, the next token is
drawn from what is left of p.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from redrafter.contracts import Draws, InputError, RowState, TokenTree
from redrafter.decode.noise import ACCEPTING, draw, private_uniform
from redrafter.decode.verify import Verdict

Rule = Literal["seeded", "ratio", "kseq"]
RULES = ("ratio", "kseq")
# rho of k-SEQ by halving an interval of length k: exact in float64.
_BISECTIONS = 60


def guesses(tree: TokenTree) -> Draws:
    """A tree's own children as draws with q = 1, in the order in which they stand."""
    node = torch.arange(tree.n_nodes, device=tree.tokens.device)
    child = (tree.parent[:, None, :] == node[:, None]) & (node > 0) & tree.valid[:, None, :]
    width = max(1, int(child.sum(-1).max()))
    # A stable sort puts a node's children first and leaves them in their order.
    first = torch.sort((~child).to(torch.uint8), dim=-1, stable=True)
    order = torch.where(first.values == 0, first.indices, -1)[..., :width]
    return Draws(order, "deterministic")


def accepting_noise(seqs: RowState, tree: TokenTree, max_depth: int) -> Tensor:
    """(B, K+1, R+1) uniform numbers: of every depth one per round, and one for what is left of p.

    They belong to the absolute position of the token that is decided with them, and every token
    is decided once.
    """
    rounds = tree.draws.order.shape[2] if tree.draws is not None else tree.n_nodes - 1
    depth = torch.arange(max_depth + 1, device=seqs.length.device)
    u = private_uniform(seqs.seeds, ACCEPTING, seqs.length[:, None] + depth, rounds + 1)
    # How many rounds there are is up to the batch's largest tree; no row's numbers are.
    return torch.cat([u[..., 1:], u[..., :1]], -1)


def verify_ratio(
    scores: Tensor, tree: TokenTree, uniform: Tensor, max_depth: int, rule: Rule = "ratio"
) -> Verdict:
    """Pure: the accepted path of every row and the token that follows it, by a ratio rule.

    scores: (B, N, V) processed target logits at every node; p is their softmax
    uniform: (B, K+1, R+1) in (0, 1), from `accepting_noise`: [:, d, r] tests the r-th draw below
        the node at depth d, [:, d, R] draws the token where none was accepted
    Raises InputError where the rule does not fit how the tree was drawn.
    """
    draws = tree.draws or guesses(tree)
    if tree.n_nodes == 1:
        rule = "ratio"  # nothing was drafted: what follows the root is drawn from p by either
    if rule == "kseq" and (draws.mode != "iid" or draws.source is not None):
        raise InputError(
            f"rule: kseq is for independent draws from one distribution, this tree's are "
            f"{draws.mode}{' from several' if draws.source is not None else ''}; use rule ratio"
        )
    row = torch.arange(len(scores), device=scores.device)
    walking = torch.ones_like(row, dtype=torch.bool)
    node = torch.zeros_like(row)
    path, tokens, count = [], [], torch.zeros_like(row)
    for d in range(max_depth + 1):
        p = scores[row, node].double().softmax(-1)
        finite = ~p[:, 0].isnan()  # else all of p is, every draw is rejected, and nothing follows
        count = count - (walking & ~finite).long()
        path.append(torch.where(walking & finite, node, 0))
        order = draws.order[row, node]  # (B, R)
        if d == max_depth:
            order = torch.full_like(order, -1)
        # What lies behind an invalid child was not drawn either: see `Draws.order`.
        order = torch.where(tree.valid.gather(1, order.clamp(min=0)), order, -1)
        test = _Node(p, draws, node, rule, order)
        child = torch.full_like(node, -1)
        for r in range(order.shape[1]):
            open_ = (child < 0) & (order[:, r] >= 0)
            accepted = test.round(r, tree.tokens.gather(1, order[:, r : r + 1].clamp(min=0))[:, 0],
                                  uniform[:, d, r], open_)  # fmt: skip
            child = torch.where(accepted, order[:, r], child)
        rest = draw(test.rest(), uniform[:, d, -1:])[:, 0]
        taken = tree.tokens.gather(1, child.clamp(min=0)[:, None])[:, 0]
        tokens.append(torch.where(child >= 0, taken, rest))
        walking = walking & (child >= 0)
        count = count + walking
        node = torch.where(walking, child, node)
        if scores.device.type == "cpu" and not bool(walking.any()):
            break
    missing = max_depth + 1 - len(path)
    pad = [torch.zeros_like(row)] * missing
    return Verdict(torch.stack(path + pad, 1), count, torch.stack(tokens + pad, 1))


class _Node:
    """The rounds at one node per row. p: (B, V), the target's there; order: (B, R), its draws."""

    def __init__(self, p: Tensor, draws: Draws, node: Tensor, rule: Rule, order: Tensor):
        self.p, self.mode, self.source = p, draws.mode, None
        self.row = torch.arange(len(node), device=p.device)
        if draws.log_q is not None:
            inner = node.clamp(max=draws.log_q.shape[1] - 1)  # behind them there are only leaves
            self.q = draws.q(self.row, inner, p.shape[-1])  # (B, Q, V)
            if draws.source is not None:
                self.source = draws.source[self.row, node]  # (B, R)
        self.kseq = None
        if rule == "kseq":
            self.kseq = _KSeq(p, self.q[:, 0], (order >= 0).sum(1))

    def round(self, r: int, x: Tensor, u: Tensor, open_: Tensor) -> Tensor:
        """Test draw r, the tokens x (B,), with u (B,), in the rows that are open. (B,) bool."""
        row, p = self.row, self.p
        if self.mode == "deterministic":
            accepted = u < p[row, x]
            left = p.clone()
            left[row, x] = 0.0
            return self._keep(open_, accepted, left)
        q = self.q[:, 0] if self.source is None else self.q[row, self.source[:, r].clamp(min=0)]
        if self.kseq is not None:
            return open_ & (u * self.kseq.rho * q[row, x] < p[row, x])
        accepted = u * q[row, x] < p[row, x]
        out = self._keep(open_, accepted, (p - q).clamp(min=0))
        if self.mode == "without_replacement":
            q = q.clone()
            q[row, x] = 0.0
            q = q / q.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
            self.q = torch.where((open_ & ~accepted)[:, None], q, self.q[:, 0])[:, None]
        return out

    def _keep(self, open_: Tensor, accepted: Tensor, left: Tensor) -> Tensor:
        """Put what is left of p in its place where the draw was rejected."""
        total = left.sum(-1, keepdim=True)
        # Nothing left means p == q up to rounding, where acceptance was certain.
        rejected = (open_ & ~accepted)[:, None] & (total > 0)
        self.p = torch.where(rejected, left / total, self.p)
        return open_ & accepted

    def rest(self) -> Tensor:
        """(B, V) what the next token is drawn from where no draw was accepted."""
        return self.p if self.kseq is None else self.kseq.rest


class _KSeq:
    """k-SEQ's threshold and residual. p, q: (B, V); k: (B,) draws.

    beta(r) = sum_x min(q(x), p(x) / r); rho in [1, k] solves 1 - (1 - beta(rho))^k = rho beta(rho).
    A rho below the root would make the residual negative, so the interval's upper end is taken.
    """

    def __init__(self, p: Tensor, q: Tensor, k: Tensor):
        any_drawn, k = k > 0, k.clamp(min=1).double()

        def beta(rho: Tensor) -> Tensor:
            return torch.minimum(q, p / rho[:, None]).sum(-1).clamp(max=1.0)

        low, high = torch.ones_like(k), k.clone()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            b = beta(middle)
            too_small = 1 - (1 - b) ** k > middle * b
            low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
        self.rho = high
        b = beta(high)
        none = (1 - b) ** k  # the chance that all are rejected
        share = torch.where(b > 0, (1 - none) / b.clamp(min=1e-300), k)
        taken = torch.minimum(q, p / high[:, None]) * share[:, None]
        rest = (p - taken).clamp(min=0)
        # Nothing left: every draw is accepted, whatever is written here. At a leaf all of p is.
        self.rest = torch.where((any_drawn & (rest.sum(-1) > 0))[:, None], rest, p)
