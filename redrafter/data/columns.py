"""The columns of a shard (see `store.py`): what they are, and the sums that show damage."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

PER_ROW = ("row", "source_row", "length", "check")  # all other columns are flat


def row_checks(columns: dict[str, Tensor]) -> Tensor:
    """(R, C) int64: CRC-32 over each flat column's part of a row, columns in order of name."""
    ends = columns["length"].cumsum(0).tolist()
    flat = [bytes_of(columns[name]) for name in sorted(columns) if name not in PER_ROW]
    return torch.tensor(
        [
            [zlib.crc32(data[begin * width : end * width]) for data, width in flat]
            for begin, end in zip([0, *ends], ends, strict=False)
        ]
    )


def index_check(columns: dict[str, Tensor]) -> int:
    """CRC-32 over the columns that have one entry per row."""
    return zlib.crc32(b"".join(columns[name].numpy().tobytes() for name in PER_ROW))


def layout_of(columns: dict[str, Tensor]) -> dict[str, list]:
    """Flat column -> [dtype, shape per token]."""
    return {
        name: [str(c.dtype).removeprefix("torch."), list(c.shape[1:])]
        for name, c in sorted(columns.items())
        if name not in PER_ROW
    }


def bytes_of(column: Tensor) -> tuple[memoryview, int]:
    """A flat column as bytes, and how many of them a token has."""
    width = column[:1].numel() * column.element_size() if len(column) else 1
    return memoryview(column.contiguous().view(-1).view(torch.uint8).numpy()), width
