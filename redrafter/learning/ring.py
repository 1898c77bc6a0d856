"""The newest text that was decoded, with the target's hidden states, to learn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from redrafter.training.feed import starts_of

_Piece = tuple[list[int], Tensor]  # n tokens, and (n, H): the states that predicted each of them


class Ring:
    """Rows of text, piece by piece as they are emitted; the oldest pieces make room.

    Of a row's tokens x_1 .. x_n and the states h_0 .. h_{n-1} that predicted them, columns hold
    (?, h_0), (x_1, h_1), ..., (x_n, ?): the alignment of `heads/base.py`. What stands for ? is read
    by no supervised position.

    capacity: tokens that are kept
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._rows: deque[deque[_Piece]] = deque()
        self._open: list[deque[_Piece]] = []
        self.n_tokens = 0

    def begin(self, n_rows: int) -> None:
        """New rows; those before are complete."""
        self._open = [deque() for _ in range(n_rows)]
        self._rows = deque(row for row in self._rows if row)
        self._rows.extend(self._open)

    def add(self, tokens: Sequence[list[int]], hidden: Tensor) -> None:
        """What a step emitted.

        tokens: per row, the real ones; hidden: (B, n, .), the states that predicted
            them, and what a head reads beside them
        """
        with torch.inference_mode(False):  # else nothing kept here could be learned from
            for row, new, states in zip(self._open, tokens, hidden, strict=True):
                if new:
                    row.append((new, states[: len(new)].clone()))
                    self.n_tokens += len(new)
        while self.n_tokens > self.capacity:
            oldest = next(row for row in self._rows if row)
            self.n_tokens -= len(oldest.popleft()[0])

    def columns(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """What `training.feed.gather` reads, and the starts (M,) in it, ascending; None where no
        token of a row has one before it."""
        rows = [row for row in self._rows if row]
        if not any(sum(len(new) for new, _ in row) > 1 for row in rows):
            return None
        tokens: list[int] = []
        states: list[Tensor] = []
        ends: list[int] = []
        for row in rows:
            begin = len(tokens)
            tokens.append(0)
            for new, hidden in row:
                tokens += new
                states.append(hidden)
            states.append(torch.zeros_like(states[-1][:1]))
            ends += [len(tokens)] * (len(tokens) - begin)
        known = {
            "tokens": torch.tensor(tokens),
            "end": torch.tensor(ends),
            "supervised": torch.ones(len(tokens), dtype=torch.bool),
        }
        starts = starts_of(known["supervised"], known["end"], "tokens")
        joined = torch.cat(states)
        columns = {name: column.to(joined.device) for name, column in known.items()}
        return {**columns, "states": joined}, starts.to(joined.device)
