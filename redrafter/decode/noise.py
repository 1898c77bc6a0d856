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

# Numbers computed ahead at most: 8 MiB of float64.
_AHEAD = 1 << 20
# Numbers that a CPU makes at a time, in some twenty passes: more would not stay in its caches.
_PIECE = 1 << 15


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes it a logical shift.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every input bit moves every output bit; in place."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MUL_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MUL_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _counters(seed: Tensor, position: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(B, P) and (n,): the i-th number of (seed, position) is made of the sum of its two."""
    place = torch.arange(1, n + 1, device=position.device) * _GOLDEN
    return _mix_(_mix_(seed + _GOLDEN)[:, None] + (position + 1) * _GOLDEN), place


def _numbers(counter: Tensor) -> Tensor:
    """float64 in (0, 1); writes to `counter`"""
    bits = _mix_(counter)
    # 52 bits, centred in their cell, so u is never 0 or 1 (with 53 the largest would round to 1,
    # and infinite noise on a token of probability 0 is nan)
    return _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """seed: (B,) int64; position: (B, P) int64, absolute. Returns (B, P, V) float64.

    With it, argmax_v(log p(v) + gumbel) is distributed as p.
    """
    stream, place = _counters(seed, position, vocab_size)
    if stream.device.type != "cpu" or stream.numel() * vocab_size <= _PIECE:
        return _gumbel(stream[:, :, None] + place)
    noise = torch.empty(*stream.shape, vocab_size, dtype=torch.float64)
    at_once = max(1, _PIECE // vocab_size)
    for some, rows in zip(
        noise.flatten(0, 1).split(at_once), stream.reshape(-1, 1).split(at_once), strict=True
    ):
        for piece, columns in zip(some.split(_PIECE, 1), place.split(_PIECE), strict=True):
            piece.copy_(_gumbel(rows + columns))
    return noise


def _gumbel(counter: Tensor) -> Tensor:
    return _numbers(counter).log_().neg_().log_().neg_()


#: Streams of numbers that have nothing to do with the noise that tokens are chosen with, nor with
#: each other: what a drafter draws with, and what a ratio rule accepts with.
DRAWING, ACCEPTING = 1, 2


def private_uniform(seed: Tensor, stream: int, position: Tensor, n: int) -> Tensor:
    """(B, P, n) float64 in (0, 1) of a stream of its own.

    A ratio rule needs that what was drawn, and what it is accepted with, be independent of each
    other and of what came before: every (stream, position, i) may be used once.
    """
    own = torch.full_like(seed, stream).mul_(_MUL_1)
    stream, place = _counters(_mix_(own.add_(seed)), position, n)
    return _numbers(stream[:, :, None] + place)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse of the cumulative distribution. p: (..., V) >= 0, not all 0; u: (..., n) in (0, 1).

    Returns (..., n) int64; never a token of probability 0. p need not sum to 1.
    """
    total = p.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(total, u * total[..., -1:], right=True)
    # Rounding can take u * total to the total itself: then it is the last token that has any.
    last = (total < total[..., -1:]).sum(-1, keepdim=True)
    return torch.minimum(index, last)


class NoiseAhead:
    """`gumbel` of a generation, some positions ahead of their use.

    Where the vocabulary is small, a block costs little more than one position: this is what keeps
    sampling nearly as cheap as greedy decoding. Values are those of `gumbel`, always, rounded to
    the dtype of the scores that they are added to; none is computed twice in a row of calls that
    go forward.
    """

    def __init__(self, seed: Tensor, vocab_size: int, dtype: torch.dtype = torch.float64):
        self.seed, self.vocab_size, self.dtype = seed, vocab_size, dtype
        self.span = max(1, min(64, _AHEAD // (len(seed) * vocab_size)))
        self._base: list[int] = []
        self._block = torch.empty(0, 0, 0)
        self._single: tuple[Tensor, ...] = ()

    def __call__(self, first: list[int], n: int) -> Tensor:
        """(B, n, V): the noise of positions first[b] .. first[b] + n - 1 of every row."""
        skip = [f - b for f, b in zip(first, self._base, strict=False)]
        if not skip or min(skip) < 0 or max(skip) + n > self._block.shape[1]:
            self._refill(first, n)
            skip = [0] * len(first)
        if min(skip) == max(skip):
            return self._block[:, skip[0] : skip[0] + n]
        row = torch.arange(len(skip), device=self._block.device)[:, None]
        where = torch.tensor(skip, device=row.device)[:, None]
        return self._block[row, where + torch.arange(n, device=row.device)]

    def at(self, position: list[int]) -> Tensor:
        """(B, V): the noise of one position per row. A single row pays for no indexing."""
        if len(position) > 1:
            return self(position, 1)[:, 0]
        if not self._base or not 0 <= position[0] - self._base[0] < len(self._single):
            self._refill(position, 1)
        return self._single[position[0] - self._base[0]]

    def _refill(self, first: list[int], n: int) -> None:
        device, known = self.seed.device, self._known(first)
        ahead = torch.arange(known.shape[1], max(n, self.span), device=device)
        position = torch.tensor(first, device=device)[:, None] + ahead
        new = gumbel(self.seed, position, self.vocab_size).to(self.dtype)
        self._block = torch.cat([known, new], 1) if known.shape[1] else new
        self._single = self._block.unbind(1)
        self._base = list(first)

    def _known(self, first: list[int]) -> Tensor:
        """(B, m, V): what the block holds of each row's positions from `first` on."""
        skip = [f - b for f, b in zip(first, self._base, strict=False)]
        most = self._block.shape[1] - max(skip, default=0)
        if not skip or min(skip) < 0 or most <= 0:
            return self._block.new_empty(len(first), 0, self.vocab_size)
        return self(first, most)
