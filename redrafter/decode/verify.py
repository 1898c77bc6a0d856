"""The one acceptance rule: walk the tree along the argmax.

A token at absolute position t of a row is argmax_v(scores_v + noise(seed, t, v)); greedy decoding
has no noise. The target's choice at a node does not depend on what the tree contains, so neither
does the text (design: seeded, drafter-invariant speculative decoding).

Scores among which one is nan or +inf, or all are -inf, choose nothing: the row ends there. The
best score is then not finite either, which is how it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redrafter.contracts import TokenTree


@dataclass
class Verdict:
    """path:   (B, K+1) int64, accepted node per depth, the root first; 0 beyond `count`
    count:  (B,) int64, accepted drafted tokens, 0..K; -1 where the root's own scores are not finite
            and the step emits nothing. A drafted token whose own scores are not finite is the
            target's next one, and not accepted: it becomes the new root
    tokens: (B, K+1) int64, what the step emits: the accepted tokens, then the target's own next
            one; the first count + 1 entries are real
    """

    path: Tensor
    count: Tensor
    tokens: Tensor


def choose(scores: Tensor, noise: Tensor | None) -> Tensor:
    """argmax_v(scores + noise). scores, noise: (..., V); returns (...) int64."""
    return choose_scored(scores, noise)[0]


def choose_scored(scores: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """argmax_v(scores + noise) and the maximum itself. scores, noise: (..., V).

    Returns (...) int64 tokens and (...) float; where that is not finite, the token means nothing.
    Used by `plain` and `verify` alike, so that a token has one definition.
    """
    best, token = (scores if noise is None else scores + noise.to(scores.dtype)).max(-1)
    return token, best


def to_host(token: Tensor, best: Tensor) -> list[list[int]]:
    """What `choose_scored` chose for (B,) rows, in one read: a token each, or none."""
    # 0 * inf is nan too; float32 holds every id up to 2^24.
    coded = torch.add(token, best, alpha=0).tolist()
    return [[int(t)] if t == t else [] for t in coded]


def _not_finite(best: Tensor) -> Tensor:
    return (best - best).isnan()


def verify(
    scores: Tensor, tree: TokenTree, noise: Tensor | None, seen: Tensor, max_depth: int
) -> Verdict:
    """Pure: the accepted path of every row and the token that follows it.

    scores: (B, N, V) processed target logits at every node
    noise:  (B, K+1, V), row d is the noise of the choice made at depth d; None when greedy
    seen:   (B, N, N) bool from `tree.ancestors`
    max_depth: K, 0 of a tree that is its root alone
    """
    if tree.n_nodes == 1:  # a step that drafts nothing pays for no walk
        tokens, best = choose_scored(scores, noise)
        return Verdict(torch.zeros_like(tokens), -_not_finite(best)[:, 0].long(), tokens)
    if noise is not None:
        noise = noise.to(scores.dtype).gather(
            1, tree.depth[:, :, None].expand(-1, -1, noise.shape[-1])
        )
    choice, best = choose_scored(scores, noise)  # (B, N)
    agrees = (tree.tokens == choice.gather(1, tree.parent)) & tree.valid
    agrees[:, 0] = True
    agrees.masked_fill_(_not_finite(best), False)  # nothing can follow it
    accepted = ~(seen & ~agrees[:, None, :]).any(-1)  # all of a node's ancestors agree
    # Equal siblings may both be accepted; any deepest node gives the same text.
    count, best = torch.where(accepted, tree.depth, -1).max(1)
    row = torch.arange(len(best), device=best.device)
    on_path = seen[row, best]  # (B, N)
    # Scatter each node of the path to its depth; all others go to a column that is dropped.
    slot = torch.where(on_path, tree.depth, max_depth + 1)
    node = torch.arange(tree.n_nodes, device=best.device).expand_as(slot)
    path = torch.zeros_like(slot[:, :1]).expand(-1, max_depth + 2).clone()
    path = path.scatter_(1, slot, node)[:, : max_depth + 1]
    # The choice at each node of the path is the token it emits: the next node's, or the bonus.
    return Verdict(path, count, choice.gather(1, path))
