"""The best that any ratio rule could accept of independent drafts: an oracle for reports."""

from __future__ import annotations

import torch
from torch import Tensor


def best_acceptance(p: Tensor, q: Tensor, k: int) -> float:
    """The largest chance that one of k independent drafts is accepted by a rule that is exact.

    p, q: (V,) target and draft distribution
    min over sets S of tokens of p(S) + 1 - q(S)^k. No rule can do better: what is accepted was
    drafted, so either it is one of S, which the target says with chance p(S), or a token outside of
    S was drafted, which has chance 1 - q(S)^k. The best S are the tokens of smallest p / q, so
    V + 1 sets are enough. That k = 2 drafts reach it: Khisti et al. 2024 (arXiv 2410.18234).
    """
    p, q = p.double(), q.double()
    # Tokens that are never drafted come last: with them S only gains p.
    ratio = torch.where(q > 0, p / q.clamp(min=1e-300), torch.inf)
    order = ratio.argsort()
    mass_p = torch.cat([p.new_zeros(1), p[order].cumsum(0)])
    mass_q = torch.cat([q.new_zeros(1), q[order].cumsum(0)]).clamp(max=1.0)
    return float((mass_p + 1 - mass_q**k).min())
