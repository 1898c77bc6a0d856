"""Rows of tokens in flat tensors, one after the other: what the stages of the pipeline pass on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRow:
    """One row of text as tokens.

    ids: token ids
    supervised: one bool per token, True where the token is to be learned from; all False for a
        prompt that the target shall answer
    source_row: 0-based row of the source
    category: if the row has one
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    source_row: int
    category: str | None = None


@dataclass(frozen=True)
class RejectedRow:
    """A row that is left out. failed: it is malformed (else it was skipped on purpose)."""

    source_row: int
    reason: str
    failed: bool


@dataclass(frozen=True)
class Rows:
    """R rows in flat tensors.

    tokens: (S,) int64
    supervised: (S,) bool, True for the tokens to learn from
    offsets: (R + 1,) int64; row r is tokens[offsets[r] : offsets[r + 1]]
    """

    tokens: Tensor
    supervised: Tensor
    offsets: Tensor

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        """(R,) int64, tokens per row."""
        return self.offsets[1:] - self.offsets[:-1]

    def ids(self, row: int) -> list[int]:
        """Tokens of one row."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]].tolist()


def offsets_of(lengths: Tensor) -> Tensor:
    """(R + 1,) int64: where rows of these lengths (R,) begin and end when laid end to end."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def row_digest(ids: bytes, supervised: bytes) -> bytes:
    """What tells rows apart; equal for equal tokens and masks.

    ids: of int64; supervised: one byte per token. Among n rows two different ones are taken for
    equal with probability n^2 / 2^97.
    """
    return blake2b(ids + supervised, digest_size=12).digest()


def row_names(rows: Sequence[int]) -> str:
    """Some row numbers for people, the first ten of them."""
    more = f", ... {rows[-1]}" if len(rows) > 10 else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:10]))}{more}"


def right_padded(rows: Rows, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows as a batch: tokens (B, T) int64, see `padded_with_last`, and lengths (B,)."""
    pieces = [rows.tokens[rows.offsets[r] : rows.offsets[r + 1]] for r in chosen]
    lengths = torch.tensor([len(piece) for piece in pieces])
    tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    return padded_with_last(tokens, lengths), lengths


def padded_with_last(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) right-padded rows, padded with their own last token. lengths: (B,), at least 1

    A target may overflow on any other token, and 0 times a padded place that does is nan, not 0.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.gather(1, torch.minimum(place, lengths[:, None] - 1))


def batches_by_length(lengths: Tensor, chosen: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows grouped with others of similar length, at most `tokens` tokens with padding.

    lengths: (R,) int64 of all rows; chosen: the rows to group
    """
    batch: list[int] = []
    for row in sorted(chosen, key=lambda r: (int(lengths[r]), r)):
        if batch and (len(batch) + 1) * int(lengths[row]) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def starts_per_row(supervised: Tensor, lengths: Tensor) -> Tensor:
    """(R, 2) int64: tokens that are supervised and have one, or two, tokens of their row before
    them (what a draft could begin at; see `training/feed.py`)."""
    offsets = offsets_of(lengths)
    place = torch.arange(len(supervised)) - torch.repeat_interleave(offsets[:-1], lengths)
    counts = []
    for before in (1, 2):
        total = torch.cat((lengths.new_zeros(1), (supervised & (place >= before)).cumsum(0)))
        counts.append(total[offsets[1:]] - total[offsets[:-1]])
    return torch.stack(counts, 1)
