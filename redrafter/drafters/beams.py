"""One level of a beam search over a tree of tokens, for whatever scores the children.

Sources: beam search as a draft, ReDrafter (arXiv 2403.09919); trees of all levels, EAGLE-2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """The best W children of a frontier, in order.

    tokens: (B, W), places among the scored columns; place: (B, W), each one's parent in the
    frontier; log_q: (B, W), along the path; norm: (B, w), log-sum-exp of each parent's scores
    """

    tokens: Tensor
    place: Tensor
    log_q: Tensor
    norm: Tensor


def best_children(scores: Tensor, log_q: Tensor, width: int) -> Level:
    """scores: (B, w, V), of what follows each node of the frontier, in any scale; log_q: (B, w), of
    the paths that lead to them; width: W."""
    # The best W of all children are among the best W of each parent.
    top, ids = scores.topk(width, dim=-1)
    norm = scores.logsumexp(-1)
    total = top + (log_q - norm)[:, :, None]
    if scores.shape[1] == 1:  # a root, or a chain: they are in order already
        best, ids = total[:, 0], ids[:, 0]
        return Level(ids, torch.zeros_like(ids), best, norm)
    best, index = total.flatten(1).topk(width, dim=-1)
    return Level(ids.flatten(1).gather(1, index), index // width, best, norm)
