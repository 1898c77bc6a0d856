"""Rows with hidden states for the trainer, wherever they come from, and the order they come in.

A *part* gives rows by number: from a store (`Stored`), made when asked for (`Fresh`), or made and
written by the first epoch and read by the later ones (`Hybrid`). Row i is the same row in all
three, so the order, which knows numbers only, is the same too.

A row whose numbers are not finite is not given: of the rows asked for, `there` says which are. (A
store that is made anew holds no such row, so nothing is missing of it, and its rows have other
numbers.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from redrafter.contracts import InputError
from redrafter.data.build_rows import need_rows
from redrafter.data.columns import PER_ROW
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.finite import finite_rows, rows_kept
from redrafter.data.rows import offsets_of, row_names
from redrafter.data.states import (
    StateMaker,
    estimate,
    facts_of,
    picked_columns,
    state_columns,
    unique_rows,
)
from redrafter.data.store import Store, open_job
from redrafter.processes import by_main, everyone, mine


class LeftOut:
    """Rows of a store that are not learned from, as their numbers are not finite.

    remedy: what to do about it
    """

    def __init__(self, store: Store, remedy: str):
        self.store, self.remedy = store, remedy
        self.rows: set[int] = set()

    def note(self, rows: Tensor) -> None:
        """rows: (M,) of the store, those found now; the first ones are told of at once."""
        first = bool(len(rows)) and not self.rows
        self.rows |= set(rows.tolist())
        if first:
            warnings.warn(self._text(self.rows), stacklevel=3)

    def told(self) -> list[str]:
        """What all processes together left out, for the end of a run; for all of them to call."""
        rows = set().union(*everyone(self.rows))
        return [self._text(rows)] if rows else []

    def _text(self, rows: set[int]) -> str:
        names = row_names(sorted(rows))
        return (
            f"{self.store.name}: {len(rows)} of {self.store.n_rows} rows are not learned from, as "
            f"their numbers are not finite ({names}): {self.remedy}"
        )


class Stored:
    """Rows of a store of states.

    columns: those to read; None reads all
    layers: those whose states are wanted beside the last one's; None: all that the store holds
    Raises InputError where it does not hold those of one of them.
    """

    def __init__(
        self,
        store: Store,
        columns: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ):
        self.store = store
        self.shown = store.identity.get("aux_layers", [])
        self.layers = self.shown if layers is None else layers
        if lacking := [a for a in self.layers if a not in self.shown]:
            raise InputError(
                f"{store.name} holds no hidden states of layers {lacking}, which head.aux_layers "
                f"{list(self.layers)} needs: make it with --states.aux_layers '{list(self.layers)}'"
            )
        self.columns = sorted(store.columns) if columns is None else columns
        self.n_rows, self.starts = store.n_rows, store.starts
        self.left_out = LeftOut(store, "make the store anew, with a wider dtype to keep them")

    def load(self, rows: Tensor, place: tuple[int, int]) -> dict[str, Tensor]:
        """Flat columns of the rows that are there, their `offsets`, and `there`, (R,) bool.
        place: epoch and buffer asked for."""
        found = picked_columns(self.store.read(rows, self.columns), self.shown, self.layers)
        lengths = found.pop("offsets").diff()
        there = finite_rows(found, lengths)
        self.left_out.note(rows[~there])
        return _columns({**found, "length": lengths}, there)

    def end(self, whole_epoch: bool) -> list[str]:
        """A run ends. Returns what the user should know."""
        return self.left_out.told()


class Fresh:
    """Rows of tokens whose states are made anew every time.

    Where processes share the target's weights, all of them call `load` together, each for its own
    rows (one at least).
    """

    def __init__(self, rows: Store, maker: StateMaker):
        self.rows, self.maker = rows, maker
        self.kept = unique_rows(rows)
        self.n_rows, self.starts = len(self.kept), rows.starts[self.kept]
        self.left_out = LeftOut(rows, maker.overflow())

    def load(self, rows: Tensor, place: tuple[int, int]) -> dict[str, Tensor]:
        with self.maker.target.together():
            made, _ = state_columns(self.maker, self.rows, self.kept[rows])
        return self._given(rows, made)

    def end(self, whole_epoch: bool) -> list[str]:
        return self.left_out.told()

    def _given(self, rows: Tensor, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a shard made for some rows."""
        there = torch.isin(self.kept[rows], shard["row"])
        self.left_out.note(self.kept[rows[~there]])
        return _columns(shard, there)


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
            self.stored = Stored(need_rows(open_filled(self.job), self.rows.name))
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
            return self._read(self.stored, rows, place)
        whole = torch.equal(rows, self.buffers[buffer])
        if whole and self.job.receipts.get(buffer, {}).get("file"):
            return self._given(rows, self.job.read(buffer))
        made, rejected = state_columns(self.maker, self.rows, self.kept[rows])
        if whole and buffer in mine(len(self.buffers)):
            self.job.write(buffer, made, rejected)
        return self._given(rows, made)

    def _read(self, stored: Stored, rows: Tensor, place: tuple[int, int]) -> dict[str, Tensor]:
        """From the store, which lacks the rows that the first epoch left out."""
        wanted, known = self.kept[rows], stored.store.row
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        there = known[at] == wanted
        found = stored.load(at[there], place)
        there[there.clone()] = found["there"]
        return {**found, "there": there}

    def end(self, whole_epoch: bool) -> list[str]:
        """Makes the store complete if an epoch was trained, else says what is there."""
        told = super().end(whole_epoch)
        if self.stored is not None:
            return told
        written = len(set().union(*everyone(set(self.job.receipts))))
        if whole_epoch or written == len(self.buffers):
            self._complete()
            return told
        return [
            *told,
            f"{self.job.folder}: {written} of {len(self.buffers)} shards of hidden "
            "states are written, as the run was shorter than an epoch; a longer one with this "
            "data.folder and seed writes the rest",
        ]

    def _complete(self) -> None:
        """Also what no step of the first epoch needed: the starts that fill no batch."""

        def make(buffer: int, bar: tqdm) -> Shard:
            return state_columns(self.maker, self.rows, self.kept[self.buffers[buffer]], bar)

        facts = facts_of(self.rows, self.kept)
        store = fill(
            self.job, self.sizes, make, what="hidden states", unit="token", progress=False, **facts
        )
        self.stored = Stored(need_rows(store, self.rows.name))


Part = Stored | Fresh | Hybrid


def _columns(shard: dict[str, Tensor], there: Tensor) -> dict[str, Tensor]:
    """What a part gives of a shard. there: (R,) bool, of the rows asked for; the shard has all of
    them, or those that are there."""
    if len(shard["length"]) == len(there):
        shard = rows_kept(shard, there)
    kept = {k: v for k, v in shard.items() if k not in PER_ROW}
    return {**kept, "offsets": offsets_of(shard["length"].long()), "there": there}


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
