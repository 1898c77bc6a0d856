"""Additive attention masks. Floats, never bool: eager attention adds whatever it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def additive_masks(
    allowed: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    windows: dict[str, int | None],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """0 where a query may look, the dtype's minimum elsewhere.

    allowed: (B or 1, N, S) bool, before windows
    query_position: (B or 1, N), key_position: (B or 1, S), absolute positions
    windows: mask name -> window in tokens, None for all (a key is seen iff q - k < window)
    Returns name -> (B or 1, 1, N, S).
    """
    masks = {}
    for name, window in windows.items():
        seen = allowed
        if window is not None:
            seen = seen & (query_position[:, :, None] - key_position[:, None, :] < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks[name] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return masks


def for_rows(masks: Tensor | dict[str, Tensor], n: int) -> Tensor | dict[str, Tensor]:
    """Masks (B or 1, ...) as views of n rows: some classes (XGLM, MVP) refuse to broadcast."""
    if isinstance(masks, dict):
        return {name: for_rows(mask, n) for name, mask in masks.items()}
    return masks if len(masks) == n else masks.expand(n, -1, -1, -1)
