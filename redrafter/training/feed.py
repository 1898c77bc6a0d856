"""Which positions every optimiser step learns from, and what is known about them.

A *start* is a position t whose token t+2 is supervised: there a draft could begin. The alignment is
that of `redrafter/heads/recurrent.py`: depth k (1..K) of start t reads h_t and e_{t+1} .. e_{t+k}
and predicts token t+1+k.

The order is a pure function of (seed, step), so a resumed run needs no state but its step. Rows are
shuffled, cut into buffers, and the starts of each buffer are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from redrafter.config import DataConfig
from redrafter.contracts import InputError
from redrafter.data.answers import Answers, batches_by_length, right_padded
from redrafter.target.model import Target


@dataclass
class Batch:
    """P start positions with K depths each.

    context: (P, H), h_t                       tokens: (P, K) int64, t+1 .. t+K
    labels: (P, K) int64, what depth k should predict (a column of the head's logits)
    mask: (P, K) bool, False where that lies past the row's end or is not supervised
    teacher: (P, K, H) or None, h_{t+1} .. h_{t+K}: what the target predicts the same tokens from
    """

    context: Tensor
    tokens: Tensor
    labels: Tensor
    mask: Tensor
    teacher: Tensor | None = None

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches."""
        fields = [self.context, self.tokens, self.labels, self.mask, self.teacher]
        pieces = [[None] * parts if f is None else f.chunk(parts) for f in fields]
        return [Batch(*piece) for piece in zip(*pieces, strict=True)]


class Feed:
    """Batches of start positions of `answers`.

    positions: P of an optimiser step; depth: K
    draft_ids: (Vd,) of a head with a pruned vocabulary: other labels are not supervised
    teacher: whether batches carry the hidden states that the target predicts from
    Raises InputError where there are too few positions, or states do not fit in the memory given.
    """

    def __init__(
        self,
        target: Target,
        answers: Answers,
        config: DataConfig,
        *,
        positions: int,
        depth: int,
        seed: int,
        draft_ids: Tensor | None = None,
        teacher: bool = False,
        progress: bool = False,
    ):
        self.target, self.answers, self.config = target, answers, config
        self.positions, self.depth, self.seed = positions, depth, seed
        self.teacher, self.progress = teacher, progress
        device = target.device
        lengths = answers.lengths()
        row = torch.repeat_interleave(torch.arange(answers.n_rows), lengths)
        starts = _starts(answers, row)
        if len(starts) < positions:
            raise InputError(
                f"{len(starts)} positions to learn from are fewer than the {positions} of one "
                "optimiser step: give more prompts, or lower optim.batch_positions"
            )
        self.steps_per_epoch = len(starts) // positions
        self._starts = starts
        self._starts_per_row = torch.bincount(row[starts], minlength=answers.n_rows)
        self._first_start = self._starts_per_row.cumsum(0) - self._starts_per_row
        self._tokens = answers.tokens.to(device)
        self._supervised = answers.supervised.to(device)
        self._row_end = answers.offsets[1:][row].to(device)
        self._to_draft = None
        if draft_ids is not None:
            self._to_draft = torch.full((target.vocab_size,), -1, device=device)
            self._to_draft[draft_ids] = torch.arange(len(draft_ids), device=device)
        self._epoch = -1
        self._states = self._greedy = None
        self._buffer = None
        if config.keep_states == "memory":
            self._check_memory()
            self._states, self._greedy = self._run_target(range(answers.n_rows))

    def _check_memory(self) -> None:
        numbers = len(self.answers.tokens) * self.target.hidden_size
        wanted = numbers * torch.empty(0, dtype=self.target.dtype).element_size()
        if wanted > self.config.max_state_bytes:
            raise InputError(
                f"hidden states of {len(self.answers.tokens)} tokens need {wanted} bytes, "
                f"data.max_state_bytes is {self.config.max_state_bytes}: raise it, set "
                "data.keep_states none (states are then made anew in every epoch), or lower "
                "data.n_prompts"
            )

    def _run_target(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Hidden states (S, H), and greedy predictions (S,) of the *next* token where labels are
        to be greedy; both indexed like `answers.tokens`, filled for `rows` only."""
        answers, target = self.answers, self.target
        greedy = self.config.labels == "greedy"
        whole = len(rows) == answers.n_rows
        # A partial result is stored densely; `_slot` knows where.
        size = len(answers.tokens) if whole else int(answers.lengths()[list(rows)].sum())
        states = torch.empty(size, target.hidden_size, dtype=target.dtype, device=target.device)
        picks = torch.empty(size, dtype=torch.long, device=target.device) if greedy else None
        if not whole:
            self._slot = torch.zeros(len(answers.tokens), dtype=torch.long, device=target.device)
        at = 0
        bar = tqdm(
            total=len(rows), desc="hidden states", unit="row", disable=not (self.progress and whole)
        )
        with bar, torch.no_grad():
            for batch in batches_by_length(answers, rows, self.config.forward_tokens):
                tokens, lengths = right_padded(answers, batch)
                place = torch.arange(tokens.shape[1])
                real = (place < lengths[:, None]).to(target.device)
                hidden = target.states(tokens.to(target.device), lengths.to(target.device))[real]
                where = (answers.offsets[batch][:, None] + place).to(target.device)[real]
                if not whole:
                    self._slot[where] = torch.arange(at, at + len(where), device=target.device)
                    where = self._slot[where]
                    at += len(where)
                states[where] = hidden
                if greedy:
                    picks[where] = target.project(hidden).argmax(-1)
                bar.update(len(batch))
        return states, picks

    def _start_epoch(self, epoch: int) -> None:
        """The epoch's order: `_order` (starts), and which buffer each stretch of it belongs to."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(self.answers.n_rows, generator=generator)
        pieces, self._buffers, self._buffer_end, end = [], [], [], 0
        for chunk in rows.split(self.config.buffer_rows):
            counts = self._starts_per_row[chunk]
            first = torch.repeat_interleave(self._first_start[chunk], counts)
            within = torch.arange(len(first)) - torch.repeat_interleave(
                counts.cumsum(0) - counts, counts
            )
            starts = self._starts[first + within]
            pieces.append(starts[torch.randperm(len(starts), generator=generator)])
            end += len(starts)
            self._buffers.append(chunk.tolist())
            self._buffer_end.append(end)
        self._order = torch.cat(pieces)
        self._epoch, self._buffer = epoch, None

    def step(self, step: int) -> Batch:
        """All positions of optimiser step `step` (0, 1, ...)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        begin = within * self.positions
        end = begin + self.positions
        if self._states is not None:
            return self._gather(self._order[begin:end], self._states, self._greedy, None)
        pieces, low = [], 0
        for number, high in enumerate(self._buffer_end):
            if low < end and begin < high:
                if self._buffer is None or self._buffer[0] != number:
                    self._buffer = (number, *self._run_target(self._buffers[number]))
                starts = self._order[max(low, begin) : min(high, end)]
                pieces.append(self._gather(starts, *self._buffer[1:], self._slot))
            low = high
        return _joined(pieces)

    def batches(self, positions: int) -> list[Batch]:
        """Every start once, in order, `positions` at a time (for measuring; states in memory)."""
        starts = self._starts.split(positions)
        return [self._gather(s, self._states, self._greedy, None) for s in starts]

    def _gather(
        self, starts: Tensor, states: Tensor, greedy: Tensor | None, slot: Tensor | None
    ) -> Batch:
        """starts: (P,) flat positions t. states, greedy: by flat position, through `slot` if given.
        """
        t = starts.to(self._tokens.device)
        last = self._row_end[t] - 1
        depths = torch.arange(1, self.depth + 1, device=t.device)
        seen = torch.minimum(t[:, None] + depths, last[:, None])  # (P, K): t+1 .. t+K
        label = torch.minimum(seen + 1, last[:, None])  # t+2 .. t+K+1
        mask = (t[:, None] + depths < last[:, None]) & self._supervised[label]

        def read(values: Tensor, index: Tensor) -> Tensor:
            return values[index if slot is None else slot[index]]

        labels = self._tokens[label] if greedy is None else read(greedy, seen)
        if self._to_draft is not None:
            labels = self._to_draft[labels]
            mask = mask & (labels >= 0)
            labels = labels.clamp(min=0)
        teacher = read(states, seen) if self.teacher else None
        return Batch(read(states, t), self._tokens[seen], labels, mask, teacher)


def _starts(answers: Answers, row: Tensor) -> Tensor:
    """Flat positions t whose token t+2 is supervised and of the same row."""
    t = torch.arange(len(answers.tokens) - 2)
    return t[(row[t] == row[t + 2]) & answers.supervised[t + 2]]


def _joined(pieces: list[Batch]) -> Batch:
    if len(pieces) == 1:
        return pieces[0]
    columns = zip(*([p.context, p.tokens, p.labels, p.mask, p.teacher] for p in pieces),
                  strict=True)
    return Batch(*[None if column[0] is None else torch.cat(column) for column in columns])


def frequent_ids(answers: Answers, n: int, vocab_size: int) -> Tensor:
    """(n,) int64, the most frequent tokens of the answers, in ascending order of id."""
    counts = torch.bincount(answers.tokens[answers.supervised], minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:n].sort().values
