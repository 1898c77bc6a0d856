"""One level of a beam search over a tree of tokens, for whatever scores the children.

Sources: beam search as a draft, ReDrafter (arXiv 2403.09919); trees of all levels, EAGLE-2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from redrafter.decode.warp import score_dtype
from redrafter.products import kernels_for

#: columns below which a CPU finds the best of all as fast as the best of blocks, and of a block
_MANY, _BLOCK = 1 << 14, 64


class Level(NamedTuple):
    """The best W children of a frontier, in order.

    tokens: (B, W), places among the scored columns; place: (B, W), each one's parent in the
    frontier; log_q: (B, W), along the path
    """

    tokens: Tensor
    place: Tensor
    log_q: Tensor


def best_children(scores: Tensor, log_q: Tensor, width: int) -> Level:
    """scores: (B, w, V), of what follows each node of the frontier, in any scale; log_q: (B, w), of
    the paths that lead to them; width: W. Which of equal ones is found may differ."""
    kernels = kernels_for(scores) if torch.is_inference_mode_enabled() else None
    if kernels is not None and log_q.dtype is scores.dtype and width <= scores.shape[-1]:
        return Level(*kernels.best_children(scores, log_q, width))
    # The best W of all children are among the best W of each parent.
    top, ids = best_columns(scores.log_softmax(-1, dtype=score_dtype(scores.dtype)), width)
    total = top + log_q[:, :, None]
    if scores.shape[1] == 1:  # a root, or a chain: they are in order already
        best, ids = total[:, 0], ids[:, 0]
        return Level(ids, torch.zeros_like(ids), best)
    best, index = total.flatten(1).topk(width, dim=-1)
    return Level(ids.flatten(1).gather(1, index), index // width, best)


def best_columns(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`x.topk(n)` over the last dimension; which of equal ones it finds may differ.

    `topk` makes a pair of every number and its index. Of many columns that costs several times what
    the maxima of blocks do, and the best n lie in the n blocks that have the best maxima.
    """
    columns = x.shape[-1]
    if columns < _MANY or n * _BLOCK >= columns or x.device.type != "cpu":
        return x.topk(n, dim=-1)
    whole = columns - columns % _BLOCK
    maxima = x[..., :whole].unflatten(-1, (-1, _BLOCK)).amax(-1)
    first = maxima.topk(n, dim=-1, sorted=False).indices * _BLOCK
    index = (first[..., None] + torch.arange(_BLOCK)).flatten(-2)
    rest = torch.arange(whole, columns).expand(*x.shape[:-1], -1)
    index = torch.cat([index, rest], -1)
    best, place = x.gather(-1, index).topk(n, dim=-1)
    return best, index.gather(-1, place)
