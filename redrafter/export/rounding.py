"""Up to where numbers of two machines count as equal."""

from __future__ import annotations

import torch

_ROUNDINGS, _SUMS, _FACTOR = 4.0, 64.0, 4.0


def rounding(dtype: torch.dtype, largest: float, here: float) -> float:
    """Another device or library adds up in another order, so numbers may differ by up to

        max((4 eps(dtype) + 64 eps(float32)) * largest, 4 * here),   the second at most largest / 4

    dtype: what the numbers were computed in; largest: the largest absolute value of the stored ones
    here: measured, how far this device differs from itself where the same is computed in other
        shapes (a row alone, a padded batch)
    The first term stands for several roundings to dtype one after the other, and for sums of many
    terms, which are kept in float32 at least. The second: two devices that each round like this one
    differ by a few times as much at most. Where rounding reaches a quarter of the numbers
    themselves, nothing is explained by it any more. Source: ours.
    """
    eps = _ROUNDINGS * torch.finfo(dtype).eps + _SUMS * torch.finfo(torch.float32).eps
    return max(eps * largest, min(_FACTOR * here, largest / 4))
