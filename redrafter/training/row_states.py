"""What heads that read the prefix learn from: rows, of which some starts share one pass.

Their layer (`heads/prefix.py`) runs once over a row for all starts of it that a batch has, so a
batch takes `optim.row_starts` starts of a row together, where other heads take starts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from redrafter.data.rows import offsets_of
from redrafter.data.states import decoded


@dataclass
class RowStates:
    """R rows up to the last start that a batch has of each; P starts in them.

    hidden: (R, T, (1 + a) H), as `Batch.context`; tokens: (R, T) int64, t+1 of each; right-padded
        by the last ones
    row, place: (P,) int64, where every start lies, rows ascending; on the CPU whatever the device,
        for a batch is cut by them
    """

    hidden: Tensor
    tokens: Tensor
    row: Tensor
    place: Tensor

    def to(self, device: torch.device) -> RowStates:
        return RowStates(self.hidden.to(device), self.tokens.to(device), self.row, self.place)

    def split(self, parts: int) -> Iterator[RowStates]:
        """The starts in as equal parts as `Batch.split` makes them, each with its rows alone."""
        for row, place in zip(
            self.row.tensor_split(parts), self.place.tensor_split(parts), strict=True
        ):
            first, end = (int(row[0]), int(row[-1]) + 1) if len(row) else (0, 0)
            width = int(place.max()) + 1 if len(row) else 1
            kept = slice(first, end), slice(width)
            yield RowStates(self.hidden[kept], self.tokens[kept], row - first, place)


def rows_of(columns: dict[str, Tensor], starts: Tensor, dtype: torch.dtype) -> RowStates:
    """The rows of some starts of a buffer. starts: (P,) positions in it, ascending"""
    offsets = columns["offsets"]
    row = torch.searchsorted(offsets, starts, right=True) - 1
    place = starts - offsets[row]
    used, row = torch.unique_consecutive(row, return_inverse=True)
    last = torch.zeros_like(used).scatter_reduce(0, row, place, "amax")
    width = int(last.max()) + 1 if len(used) else 1
    index = offsets[used][:, None] + torch.minimum(torch.arange(width), last[:, None])
    return RowStates(
        decoded(columns, index, dtype), columns["tokens"][index + 1].long(), row, place
    )


def joined_rows(pieces: list[RowStates]) -> RowStates:
    """The rows of several pieces of a batch, one after the other."""
    width = max(piece.hidden.shape[1] for piece in pieces)
    padded = [torch.arange(width).clamp(max=piece.hidden.shape[1] - 1) for piece in pieces]
    first = offsets_of(torch.tensor([len(piece.hidden) for piece in pieces])).tolist()
    return RowStates(
        torch.cat([piece.hidden[:, at] for piece, at in zip(pieces, padded, strict=True)]),
        torch.cat([piece.tokens[:, at] for piece, at in zip(pieces, padded, strict=True)]),
        torch.cat([piece.row + n for piece, n in zip(pieces, first, strict=False)]),
        torch.cat([piece.place for piece in pieces]),
    )


def grouped(counts: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(S,) int64, an order of the starts of rows in which `size` of one row stand together: each
    row's in an order of their own, cut into groups, and these shuffled. counts: (R,), S in all"""
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    shuffled = torch.randperm(len(row), generator=generator)
    by_row = shuffled[row[shuffled].argsort(stable=True)]
    rank = torch.arange(len(row)) - offsets_of(counts)[row]
    groups = (counts + size - 1) // size
    group = offsets_of(groups)[row] + rank // size
    place = torch.randperm(int(groups.sum()), generator=generator)
    return by_row[place[group].argsort(stable=True)]
