"""Counter-based Gumbel noise: a pure function of (seed, absolute position, token id).

No generator state exists, so what a row draws cannot depend on its batch, on the drafter or on
how many positions were looked at. Source: ours; the mixer is SplitMix64's finaliser (Steele, Lea
and Flood 2014; constants of Stafford's variant 13).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as a signed 64-bit integer
_MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MUL_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes it a logical shift.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every input bit moves every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MUL_1
    x = (x ^ _shift_right(x, 27)) * _MUL_2
    return x ^ _shift_right(x, 31)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """seed: (B,) int64; position: (B, P) int64, absolute. Returns (B, P, V) float64.

    With it, argmax_v(log p(v) + gumbel) is distributed as p.
    """
    token = torch.arange(1, vocab_size + 1, device=position.device)
    stream = _mix(_mix(seed + _GOLDEN)[:, None] + (position + 1) * _GOLDEN)
    bits = _mix(stream[:, :, None] + token * _GOLDEN)
    # 52 bits, centred in their cell, so u is never 0 or 1 (with 53 the largest would round to 1,
    # and infinite noise on a token of probability 0 is nan)
    u = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return u.log_().neg_().log_().neg_()
