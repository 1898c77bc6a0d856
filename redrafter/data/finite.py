"""Rows whose numbers are not finite: found, left out of what is learned from, and named.

A target in a narrow dtype overflows on some texts (float16 ends at 65504), and a store in one on
some states. Whatever reads or writes rows with numbers asks here: what goes into a store
(`states.py`, `records/store.py`), what is read from one that was made before rows were judged
(`reading.py`), and `data/check.py`. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.data.columns import PER_ROW
from redrafter.data.rows import row_names
from redrafter.data.store import Store

#: stands in a column of tokens for one that would have been chosen from such scores
OVERFLOWED = -2
_READ_ROWS = 16  # rows in memory at a time


def choice(logits: Tensor) -> Tensor:
    """(..., V) -> (...) int64, the greedy tokens; OVERFLOWED where the best score is not a finite
    number (nan hides every other score; -inf is a token that is forbidden)."""
    best = logits.max(-1)
    return best.indices.masked_fill(~best.values.isfinite(), OVERFLOWED)


def finite_rows(columns: dict[str, Tensor], lengths: Tensor) -> Tensor:
    """(R,) bool: rows of which every number is finite, and every token chosen from such.

    columns: of a shard, the flat ones (S, ...) are looked at; lengths: (R,), tokens per row
    """
    sizes, good = lengths.tolist(), torch.ones(len(lengths), dtype=torch.bool)
    for name in _judged(columns):
        pieces = columns[name].split(sizes)
        if name == "continuation":
            found = [bool((piece != OVERFLOWED).all()) for piece in pieces]
        else:  # the least and the largest number: one pass, without a mask of the size of the row
            found = [
                not piece.numel() or all(x.isfinite() for x in piece.aminmax()) for piece in pieces
            ]
        good &= torch.tensor(found, dtype=torch.bool)
    return good


def _judged(columns: dict[str, Tensor]) -> list[str]:
    return [name for name, c in columns.items() if c.is_floating_point() or name == "continuation"]


def rows_kept(columns: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """A shard's columns of some of its rows. keep: (R,) bool"""
    if bool(keep.all()):
        return columns
    tokens = keep.repeat_interleave(columns["length"].long())
    return {name: c[keep if name in PER_ROW else tokens] for name, c in columns.items()}


def left_out(source_rows: Tensor, reason: str) -> list[dict[str, Any]]:
    """What a shard's receipt says of rows that are left out. source_rows: (M,)"""
    return [{"source_row": row, "reason": reason, "failed": False} for row in source_rows.tolist()]


def check_finite(store: Store) -> None:
    """Raises InputError naming the shards and rows of a store that hold numbers that are not
    finite, as stores may that were made before such rows were left out."""
    columns = [name for name, (dtype, _) in store.columns.items()
               if dtype.is_floating_point or name == "continuation"]  # fmt: skip
    found = {}
    for number, shard in enumerate(store.shards if columns else ()):
        bad = []
        for rows in (store.shard == number).nonzero()[:, 0].split(_READ_ROWS):
            read = store.read(rows, columns)
            bad += rows[~finite_rows(read, read.pop("offsets").diff())].tolist()
        if bad:
            found[shard["file"]] = bad
    if found:
        shards = "; ".join(f"{file}: {row_names(rows)}" for file, rows in found.items())
        raise InputError(
            f"{store.name} holds numbers that are not finite ({shards}): make it anew, which "
            "leaves such rows out, or with a wider target.dtype or states.dtype, which keeps them; "
            "a training that reads it leaves them out, too"
        )
