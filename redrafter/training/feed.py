"""Which positions every optimiser step learns from, and what is known about them.

A *start* is a position t whose token t+2 is supervised: there a draft could begin. The alignment is
that of `redrafter/heads/base.py`: depth k (1..K) of start t reads h_t and tokens t+1 .. t+k, and
predicts token t+1+k. With labels `local` the tokens after t are not the text's but those that
the target says when it goes on greedily from t; a start is then a t whose token t+1 is supervised.

The order is a pure function of (seed, step), so a resumed run needs no state but its step. Rows are
shuffled, cut into buffers, and the starts of each buffer are shuffled (for heads that read the
prefix, groups of them: `row_states.py`). Nothing here can look past the end of a row: every index
is clamped to it, and masked where it was.

Of several processes each owns rows of every buffer, reads (or makes the states of) only those, and
gives their starts: together the starts of a step are the same for any number of processes.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.data.reading import Hybrid, Order, Part, Stored, epoch_order, generator
from redrafter.data.states import decoded
from redrafter.targets.model import Target
from redrafter.training.normalizers import Normalizers, needs_normalizers
from redrafter.training.row_states import RowStates, grouped, joined_rows, rows_of

Labels = Literal["tokens", "greedy", "local"]
Teacher = Literal["states", "top_k"]


@dataclass
class Batch:
    """P start positions with K depths each.

    context: (P, (1 + a) H), h_t, and behind it what the head's `aux_layers` gave
    tokens: (P, K) int64, t+1 .. t+K
    labels: (P, K) int64, what depth k should predict (a column of the head's logits)
    mask: (P, K) bool, False where that lies past the row's end, is not supervised, or lies behind
        something that is not
    teacher: (P, K, H) or None, h_{t+1} .. h_{t+K}: what the target predicts the same tokens from
    teacher_log_z: (P, K) or None, log of the sum of exp(logits) of those predictions, for
        a head that has some of their columns only (`normalizers.py`)
    teacher_ids, teacher_log_p: (P, K, k) or None, the k most probable of those predictions
    rows: for a head that reads the prefix, what its layer makes the starts' contexts from
    """

    context: Tensor
    tokens: Tensor
    labels: Tensor
    mask: Tensor
    teacher: Tensor | None = None
    teacher_log_z: Tensor | None = None
    teacher_ids: Tensor | None = None
    teacher_log_p: Tensor | None = None
    rows: RowStates | None = None

    def split(self, parts: int) -> list[Batch]:
        """Micro-batches, equal but for one position."""
        pieces = [[None] * parts if f is None else f.tensor_split(parts) for f in self._fields()]
        rows = [None] * parts if self.rows is None else self.rows.split(parts)
        return [Batch(*piece, rows=r) for *piece, r in zip(*pieces, rows, strict=True)]

    def at(self, depths: slice) -> Batch:
        """The same starts, some of their depths; for what comes behind the head."""
        context, *by_depth = self._fields()
        return Batch(context, *(None if f is None else f[:, depths] for f in by_depth))

    def _fields(self) -> list[Tensor | None]:
        return [
            self.context, self.tokens, self.labels, self.mask,
            self.teacher, self.teacher_log_z, self.teacher_ids, self.teacher_log_p,
        ]  # fmt: skip


@dataclass
class _Epoch:
    """rows: buffer by buffer; ends: starts up to the end of each buffer; steps: whole batches."""

    number: int
    buffers: list[Order]
    ends: list[int]
    steps: int


class Feed:
    """Batches of start positions.

    parts, weights: where rows come from, and their shares of an epoch
    positions: P of an optimiser step; depth: K
    draft_ids: (Vd,) of a head with a pruned vocabulary: other labels are not supervised
    teacher: what batches carry of the target's own predictions: the hidden states that it predicts
        from, the most probable tokens (of stores that hold them), or nothing
    row_starts: starts of a row that are learned from together, whose batches then have `rows`; None
        shuffles them one by one
    share: (r, R), process r of R; its part of a step's positions varies a little around positions/R
    wait_s: seconds that `step` has waited for rows so far
    Raises InputError where there are too few positions.
    """

    def __init__(
        self,
        target: Target,
        parts: Sequence[Part],
        weights: Sequence[float] | None = None,
        *,
        positions: int,
        depth: int,
        seed: int,
        buffer_rows: int = 512,
        labels: Labels = "tokens",
        draft_ids: Tensor | None = None,
        teacher: Teacher | None = None,
        row_starts: int | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        self.share, self.row_starts = share, row_starts
        self.target, self.parts = target, list(parts)
        self.weights = [1.0] * len(parts) if weights is None else list(weights)
        self.positions, self.depth, self.seed, self.labels = positions, depth, seed, labels
        self.buffer_rows, self.teacher = buffer_rows, teacher
        # Rows know both counts: tokens with one, or two, tokens of their row before them.
        self._counts = [p.starts[:, 0 if labels == "local" else 1] for p in self.parts]
        kept = None if draft_ids is None else draft_ids.cpu()
        self._to_draft = draft_columns(kept, target.vocab_size)
        needed = needs_normalizers(target, draft_ids is not None, teacher)
        self._normalizers: Normalizers | None = None
        if needed:
            stores = [p.store.digest if isinstance(p, Stored) else None for p in self.parts]
            self._normalizers = Normalizers(target, stores)
        self._epochs: dict[int, _Epoch] = {}
        self._first_step = [0]  # of each epoch known so far
        self._loaded: tuple[tuple[int, int], dict[str, Tensor], Tensor] | None = None
        self._next: tuple[tuple[int, int], Future] | None = None
        self.wait_s = 0.0
        # Reading can overlap with training; making states would only compete with it.
        ahead = all(isinstance(p, Stored) for p in self.parts)
        self._pool = ThreadPoolExecutor(1, "read-ahead") if ahead else None
        for part in self.parts:
            if isinstance(part, Hybrid):
                buffers = [b.row for b in self._epoch(0).buffers]
                part.begin(buffers, {"seed": seed, "buffer_rows": buffer_rows})
        self.steps_per_epoch = self._epoch(0).steps

    # -- order -----------------------------------------------------------------------------

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = epoch_order([p.n_rows for p in self.parts], self.weights, self.seed, number)
            counts = torch.zeros(len(order.row), dtype=torch.long)
            for i, of_part in enumerate(self._counts):
                mine = order.part == i
                counts[mine] = of_part[order.row[mine]]
            cuts = list(range(0, len(order.row), self.buffer_rows))
            buffers = [
                Order(order.part[c : c + self.buffer_rows], order.row[c : c + self.buffer_rows])
                for c in cuts
            ]
            ends = counts.cumsum(0)[[min(c + self.buffer_rows, len(counts)) - 1 for c in cuts]]
            steps = int(ends[-1]) // self.positions
            if not steps:
                raise InputError(
                    f"{int(ends[-1])} positions to learn from are fewer than the {self.positions} "
                    "of one optimiser step: give more rows, or lower optim.batch_positions"
                )
            # The one before may still be needed to tell where this one starts.
            self._epochs = {n: e for n, e in self._epochs.items() if n >= number - 1}
            self._epochs[number] = _Epoch(number, buffers, ends.tolist(), steps)
        return self._epochs[number]

    def _find(self, step: int) -> tuple[_Epoch, int]:
        """The epoch of a step, and the step's place in it."""
        while self._first_step[-1] <= step:
            last = len(self._first_step) - 1
            self._first_step.append(self._first_step[-1] + self._epoch(last).steps)
        number = next(i for i, first in enumerate(self._first_step) if first > step) - 1
        return self._epoch(number), step - self._first_step[number]

    # -- buffers ---------------------------------------------------------------------------

    def _load(self, place: tuple[int, int], buffer: Order) -> tuple[dict[str, Tensor], Tensor]:
        """Columns of a buffer's own rows, and all of its starts in the order that they are used in;
        -1 for one of another process, or of a row that is not there."""
        rows = [buffer.row[buffer.part == i] for i in range(len(self.parts))]
        counts = torch.cat([c[r] for c, r in zip(self._counts, rows, strict=True)])
        own = owners(counts, self.share[1]) == self.share[0]
        kept = own.clone()
        kept[0] |= not bool(own.any())  # there must be columns, even if nothing is used of them
        sizes, pieces = [len(r) for r in rows], []
        for number, (part, r, k, o) in enumerate(
            zip(self.parts, rows, kept.split(sizes), own.split(sizes), strict=True)
        ):
            if bool(k.any()):
                piece = part.load(r[k], place)
                there = piece.pop("there")
                o[k] &= there  # in `own`, of which it is a view
                pieces.append({**piece, "keys": _keys(number, r[k][there])})
        columns, starts = self._with_starts(pieces[0] if len(pieces) == 1 else _joined(pieces))
        mine = own.repeat_interleave(counts)
        random = generator(self.seed, *place)
        if self.row_starts is None:
            order = torch.randperm(len(mine), generator=random)
        else:
            order = grouped(counts, self.row_starts, random)
        place_of = torch.full((len(mine),), -1)
        place_of[mine] = starts[: int(mine.sum())]
        return columns, place_of[order]

    def _with_starts(self, columns: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Columns of rows, with `end` (where each position's row ends); and their starts,
        ascending."""
        offsets = columns["offsets"]
        columns["end"] = torch.repeat_interleave(offsets[1:], offsets[1:] - offsets[:-1])
        return columns, starts_of(columns["supervised"], columns["end"], self.labels)

    def _buffer(self, epoch: _Epoch, number: int) -> tuple[dict[str, Tensor], Tensor]:
        place = (epoch.number, number)
        if self._loaded is None or self._loaded[0] != place:
            clock = time.perf_counter()
            ahead, self._next = self._next, None
            found = ahead[1].result() if ahead is not None else None
            if found is None or ahead[0] != place:
                found = self._load(place, epoch.buffers[number])
            self._normalize(found[0])
            self._loaded = (place, *found)
            self.wait_s += time.perf_counter() - clock
            if self._pool is not None:
                if number + 1 < len(epoch.buffers):
                    after, buffer = (epoch.number, number + 1), epoch.buffers[number + 1]
                else:
                    after, buffer = (epoch.number + 1, 0), self._epoch(epoch.number + 1).buffers[0]
                self._next = (after, self._pool.submit(self._load, after, buffer))
        return self._loaded[1:]

    def _normalize(self, columns: dict[str, Tensor]) -> None:
        if self._normalizers is not None:
            keys = columns["keys"]
            columns["teacher_log_z"] = self._normalizers.of(columns, columns["offsets"], keys)

    def end(self, step: int) -> list[str]:
        """No step from `step` on will be asked for. Returns what the user should know."""
        return [text for part in self.parts for text in part.end(step >= self.steps_per_epoch)]

    # -- batches ---------------------------------------------------------------------------

    def step(self, step: int) -> Batch:
        """This process's positions of optimiser step `step` (0, 1, ...), on the target's device."""
        epoch, within = self._find(step)
        begin = within * self.positions
        end = begin + self.positions
        pieces, number = [], bisect_right(epoch.ends, begin)
        while begin < end:
            low = epoch.ends[number - 1] if number else 0
            columns, starts = self._buffer(epoch, number)
            t = starts[begin - low : end - low]
            pieces.append(self._gather(columns, t[t >= 0]))
            begin, number = epoch.ends[number], number + 1
        return self._to_device(_joined_batches(pieces))

    def batches(self, positions: int) -> list[Batch]:
        """Every start of this process's rows once, in order, `positions` at a time, at least one
        batch (for measuring; few rows)."""
        part, (rank, world) = self.parts[0], self.share
        rows = torch.arange(rank, part.n_rows, world)
        piece = part.load(rows if len(rows) else torch.zeros(1).long(), (0, 0))
        piece["keys"] = _keys(0, rows[piece.pop("there")] if len(rows) else torch.zeros(1).long())
        columns, starts = self._with_starts(piece)
        self._normalize(columns)
        starts = starts if len(rows) else starts[:0]
        return [self._to_device(self._gather(columns, s)) for s in starts.split(positions)]

    def _to_device(self, batch: Batch) -> Batch:
        device = self.target.device
        rows = None if batch.rows is None else batch.rows.to(device)
        return Batch(*[None if f is None else f.to(device) for f in batch._fields()], rows=rows)

    def _gather(self, columns: dict[str, Tensor], t: Tensor) -> Batch:
        """t: (P,) positions in the buffer."""
        t = t if self.row_starts is None else t.sort().values  # rows one after the other
        batch = gather(
            columns, t, self.depth, self.target.dtype, labels=self.labels,
            to_draft=self._to_draft, teacher=self.teacher, last=self.target.hidden_size,
        )  # fmt: skip
        if self.row_starts is not None:
            batch.rows = rows_of(columns, t, self.target.dtype)
        return batch


def gather(
    columns: dict[str, Tensor],
    t: Tensor,
    depth: int,
    dtype: torch.dtype,
    *,
    labels: Labels = "tokens",
    to_draft: Tensor | None = None,
    teacher: Teacher | None = None,
    last: int | None = None,
) -> Batch:
    """What is known of some starts.

    columns: of rows one after the other, on one device: `tokens`, `states` (h_t), `supervised`,
        and `end`, where each position's row ends; further ones as `labels` and `teacher` ask for
    t: (P,) int64, positions; to_draft: see `draft_columns`
    last: H, where `states` may hold those of further layers behind h_t
    """
    stop = columns["end"][t] - 1
    depths = torch.arange(1, depth + 1, device=t.device)
    seen = torch.minimum(t[:, None] + depths, stop[:, None])  # (P, K): t+1 .. t+K
    if labels == "local":
        said = columns["continuation"][t, : depth + 1].long()  # t+1 .. t+K+1
        tokens, wanted, mask = said[:, :-1], said[:, 1:], said[:, 1:] >= 0
        tokens, wanted = tokens.clamp(min=0), wanted.clamp(min=0)
    else:
        after = torch.minimum(seen + 1, stop[:, None])  # t+2 .. t+K+1
        mask = (t[:, None] + depths < stop[:, None]) & columns["supervised"][after]
        mask = mask.cumprod(1).bool()  # a draft ends where a masked turn begins
        tokens = columns["tokens"][seen].long()
        wanted = columns["tokens"][after].long()
        if labels == "greedy":
            wanted = columns["continuation"][seen, 0].long().clamp(min=0)
    if to_draft is not None:
        wanted = to_draft[wanted]
        mask = mask & (wanted >= 0)
        wanted = wanted.clamp(min=0)
    batch = Batch(decoded(columns, t, dtype), tokens, wanted, mask)
    if teacher == "states":
        batch.teacher = decoded(columns, seen, dtype, last)
        if "teacher_log_z" in columns:
            batch.teacher_log_z = columns["teacher_log_z"][seen]
    elif teacher == "top_k":
        batch.teacher_ids = columns["teacher_ids"][seen].long()
        batch.teacher_log_p = columns["teacher_log_p"][seen]
    return batch


def draft_columns(draft_ids: Tensor | None, vocab_size: int) -> Tensor | None:
    """(V,) int64, the column of a pruned draft vocabulary that each token has, -1 for none; None
    where it is not pruned. draft_ids: (Vd,) int64"""
    if draft_ids is None:
        return None
    columns = torch.full((vocab_size,), -1, device=draft_ids.device)
    columns[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return columns


def owners(counts: Tensor, n: int) -> Tensor:
    """(R,) int64, which of n processes each of R rows belongs to: dealt out from the largest to the
    smallest, to and fro, so that all get about as many starts. counts: (R,), starts of the rows"""
    deal = torch.cat((torch.arange(n), torch.arange(n).flip(0))).repeat(len(counts) // (2 * n) + 1)
    found = torch.empty(len(counts), dtype=torch.long)
    found[counts.argsort(descending=True, stable=True)] = deal[: len(counts)]
    return found


def _keys(part: int, rows: Tensor) -> Tensor:
    """(R, 2) int64, which part each row is of, and its number there."""
    return torch.stack((torch.full_like(rows, part), rows), dim=1)


def starts_of(supervised: Tensor, end: Tensor, labels: Labels) -> Tensor:
    """Positions where a draft could begin, ascending.

    supervised: (S,) bool; end: (S,) int64, where the position's row ends
    """
    after = 1 if labels == "local" else 2
    t = torch.arange(max(0, len(supervised) - after))
    return t[(t + after < end[t]) & supervised[t + after]]


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of several parts, one after the other."""
    if "continuation" in pieces[0]:  # stores may hold more greedy tokens than are needed
        n = min(p["continuation"].shape[1] for p in pieces)
        pieces = [{**p, "continuation": p["continuation"][:, :n]} for p in pieces]
    joined = {k: torch.cat([p[k] for p in pieces]) for k in pieces[0] if k != "offsets"}
    offsets, at = [torch.zeros(1, dtype=torch.long)], 0
    for piece in pieces:
        offsets.append(piece["offsets"][1:] + at)
        at += int(piece["offsets"][-1])
    return {**joined, "offsets": torch.cat(offsets)}


def _joined_batches(pieces: list[Batch]) -> Batch:
    if len(pieces) == 1:
        return pieces[0]
    columns = zip(*(p._fields() for p in pieces), strict=True)
    rows = None if pieces[0].rows is None else joined_rows([p.rows for p in pieces])
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    return Batch(*joined, rows=rows)


def frequent_ids(parts: Sequence[Part], n: int, vocab_size: int) -> Tensor:
    """(n,) int64, the most frequent supervised tokens, in ascending order of id."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for part in parts:
        store = part.store if isinstance(part, Stored) else part.rows
        kept = torch.arange(part.n_rows) if isinstance(part, Stored) else part.kept
        for chunk in kept.split(4096):
            rows = store.rows(chunk)
            counts += torch.bincount(rows.tokens[rows.supervised], minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:n].sort().values
