"""Rows with hidden states for the trainer, wherever they come from, and the order they come in.

A *part* gives rows by number: from a store (`Stored`), made when asked for (`Fresh`), or made and
written by the first epoch and read by the later ones (`Hybrid`). Row i is the same row in all
three, so the order, which knows numbers only, is the same too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from redrafter.contracts import InputError
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.rows import offsets_of
from redrafter.data.states import StateMaker, estimate, facts_of, state_columns, unique_rows
from redrafter.data.store import Store, open_job
from redrafter.processes import by_main, everyone, mine

#: columns of a store that are not read into a buffer
_UNREAD = ("row", "source_row", "length", "check")


class Stored:
    """Rows of a store of states. columns: those to read; None reads all."""

    def __init__(self, store: Store, columns: Sequence[str] | None = None):
        self.store = store
        self.columns = sorted(store.columns) if columns is None else columns
        self.n_rows, self.starts = store.n_rows, store.starts

    def load(self, rows: Tensor, place: tuple[int, int]) -> dict[str, Tensor]:
        """Flat columns of some rows, and `offsets` (R + 1,). place: epoch and buffer asked for."""
        return self.store.read(rows, self.columns)


class Fresh:
    """Rows of tokens whose states are made anew every time.

    Where processes share the target's weights, all of them call `load` together, each for its own
    rows (one at least).
    """

    def __init__(self, rows: Store, maker: StateMaker):
        self.rows, self.maker = rows, maker
        self.kept = unique_rows(rows)
        self.n_rows, self.starts = len(self.kept), rows.starts[self.kept]

    def load(self, rows: Tensor, place: tuple[int, int]) -> dict[str, Tensor]:
        with self.maker.target.together():
            return _columns(state_columns(self.maker, self.rows, self.kept[rows]))


class Hybrid(Fresh):
    """The first epoch's buffers become the shards of a store; later epochs read it.

    buffers: the first epoch's rows, buffer by buffer
    identity: what those depend on (the seed and the buffers' size)
    Of several processes one writes a shard, and only if it loads the whole buffer; what is missing
    after the first epoch is then made by all, each its share: where every process loads its own
    rows of each buffer, the states are made twice. `begin`, `end` and the first `load` of the
    second epoch are for all processes together.
    `begin` raises InputError where config.max_bytes or the disk is too small for it.
    """

    def __init__(self, rows: Store, maker: StateMaker, folder: Path, named: bool):
        super().__init__(rows, maker)
        self.folder, self.named = folder, named
        self.stored: Stored | None = None

    def begin(self, buffers: Sequence[Tensor], identity: dict) -> None:
        whole = {**self.maker.identity(), "rows": self.rows.digest, "order": identity}
        self.buffers = buffers
        self.job = open_job(self.folder, "states", whole, self.named)
        if self.job.complete:
            self.stored = Stored(open_filled(self.job))
            return
        lengths = self.rows.lengths[self.kept]
        sizes = self.sizes = [int(lengths[b].sum()) for b in buffers]
        left = sum(size for i, size in enumerate(sizes) if i not in self.job.receipts)
        by_main(
            lambda: estimate(self.maker, self.job, self.rows, self.kept, sum(sizes), left, False)
        )

    def load(self, rows: Tensor, place: tuple[int, int]) -> dict[str, Tensor]:
        epoch, buffer = place
        if self.stored is None and epoch > 0:
            self._complete()
        if self.stored is not None:
            return self.stored.load(rows, place)
        whole = torch.equal(rows, self.buffers[buffer])
        if whole and buffer in self.job.receipts:
            return _columns(self.job.read(buffer))
        made = state_columns(self.maker, self.rows, self.kept[rows])
        if whole and buffer in mine(len(self.buffers)):
            self.job.write(buffer, made)
        return _columns(made)

    def end(self, whole_epoch: bool) -> str | None:
        """A run ends. Makes the store complete if an epoch was trained, else says what is there."""
        if self.stored is not None:
            return None
        written = len(set().union(*everyone(set(self.job.receipts))))
        if whole_epoch or written == len(self.buffers):
            self._complete()
            return None
        return (
            f"{self.job.folder}: {written} of {len(self.buffers)} shards of hidden "
            "states are written, as the run was shorter than an epoch; a longer one with this "
            "data.folder and seed writes the rest"
        )

    def _complete(self) -> None:
        """Also what no step of the first epoch needed: the starts that fill no batch."""

        def make(buffer: int, bar: tqdm) -> Shard:
            return state_columns(self.maker, self.rows, self.kept[self.buffers[buffer]], bar), ()

        facts = facts_of(self.rows, self.kept)
        store = fill(
            self.job, self.sizes, make, what="hidden states", unit="token", progress=False, **facts
        )
        self.stored = Stored(store)


Part = Stored | Fresh | Hybrid


def _columns(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {k: v for k, v in shard.items() if k not in _UNREAD}
    return {**kept, "offsets": offsets_of(shard["length"].long())}


@dataclass(frozen=True)
class Order:
    """The rows of one epoch, in order. part: (N,) int64, which part; row: (N,) its row there."""

    part: Tensor
    row: Tensor


def epoch_order(n_rows: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> Order:
    """A pure function of its arguments, so that a resumed run needs no state but its step.

    An epoch has as many rows as all parts together. With equal shares each row comes once. With
    weights, every part gives its share of that, going round its own shuffled rows as often as
    needed (a row at least): over the epochs each of its rows comes equally often.
    """
    total, sum_of_weights = sum(n_rows), sum(weights)
    even = all(w == weights[0] for w in weights)
    parts, rows = [], []
    for number, (n, weight) in enumerate(zip(n_rows, weights, strict=True)):
        share = n if even else max(1, round(total * weight / sum_of_weights))
        first = epoch * share
        rounds = [
            torch.randperm(n, generator=generator(seed, number, r))
            for r in range(first // n, (first + share - 1) // n + 1)
        ]
        skip = first % n
        rows.append(torch.cat(rounds)[skip : skip + share] if rounds else torch.zeros(0).long())
        parts.append(torch.full((share,), number))
    part, row = torch.cat(parts), torch.cat(rows)
    if len(n_rows) > 1:
        mixed = torch.randperm(len(row), generator=generator(seed, len(n_rows), epoch))
        part, row = part[mixed], row[mixed]
    return Order(part, row)


def generator(seed: int, stream: int, index: int) -> torch.Generator:
    """Independent for each triple."""
    mixed = (seed * 1_000_003 + stream) * 1_000_003 + index
    return torch.Generator().manual_seed(mixed & (2**63 - 1))


def read_weights(stores: Sequence[str]) -> list[tuple[str, float]]:
    """PATH or PATH=WEIGHT. Raises InputError naming the one that is neither."""
    found = []
    for text in stores:
        path, equals, weight = text.rpartition("=")
        try:
            found.append((path, float(weight)) if equals else (text, 1.0))
        except ValueError:
            found.append((text, 1.0))  # a path with "=" in it
        if not 0 < found[-1][1] < math.inf:
            raise InputError(f"data.stores: {text!r}: the weight must be a number above 0")
    return found
