"""The levels of a recurrent head's draft, each in one call of the library's kernels.

What `RecurrentHead.advance`, `features` and `logits` compute, up to rounding. Of a few rows each of
these maps takes some tens of microseconds on a CPU, and to see whether it is what it was, and to
ask for it, takes as long in Python: so that is done once per draft, and they are asked for
together. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from redrafter.products import Linear, kernels_for

_FLOAT = 4  # bytes


class ReadyLevels:
    """What there is to read with, while one draft lasts: made at its first level by `make`.

    context: (B, 1, H) c of each row, by which a draft is known
    table: (V, H) W e + b of every token, or None
    maps: the first one reads e, the next s before it; the last makes logits; with a bias or without
    """

    def __init__(
        self, head: Any, kernels: Any, table: Tensor | None, context: Tensor,
        maps: list[tuple[Any, Tensor | None]],
    ):  # fmt: skip
        (self.of_e, _), (self.of_u, self.bias), (self.of_s, _), *self.behind = maps
        self.kernels, self.table, self.context = kernels, table, context
        self.of_c = head._first.of_context(context, torch.float32, False)
        self.c = context.contiguous()
        self.adds = not head._projects  # whether the first map is a residual block's
        self._steps: dict[tuple[bool, int], tuple[Any, Tensor]] = {}

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the head has other memory

    @staticmethod
    def make(head: Any, target: Any, context: Tensor) -> ReadyLevels | None:
        """None where torch's operations are to do it: no kernels, or other maps, shapes, dtypes."""
        kernels = kernels_for(head.rnn_w.weight) if _is_plain(context) else None
        if kernels is None or context.shape != (len(context), 1, head.rnn_w.in_features):
            return None
        maps = _maps(head)
        if maps is None:
            return None
        return ReadyLevels(head, kernels, head._read_ahead(target), context, maps)

    def read(
        self, tokens: Tensor, states: Tensor | None, e: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """`DraftHead.read`; None where torch is to say what is wrong with them.

        e: (B, w, H), the tokens' embeddings, read where there is no table. Raises IndexError for a
        token that the table does not have.
        """
        (batch, _, hidden), width = self.context.shape, tokens.shape[-1]
        if tokens.shape != (batch, width) or tokens.dtype is not torch.int64 or not len(tokens):
            return None
        given = [x for x in (states, e) if x is not None]
        if any(x.shape != (batch, width, hidden) or not _is_plain(x) for x in given):
            return None
        tokens, states, e = (x if x is None else x.contiguous() for x in (tokens, states, e))
        rows, begins = batch * width, states is None
        both = self.c.new_empty((batch, width, 2 * hidden))  # x = [c ; s]
        logits = self.c.new_empty((batch, width, self.behind[-1][0].out))
        steps, _ = self._steps_of(begins, rows, width)
        x = both.data_ptr()
        s = x + hidden * _FLOAT
        n = int(e is not None and not begins)
        state, first = steps[n], steps[n + 1 + self.adds]
        if e is None:
            state.at = tokens.data_ptr()
        else:
            steps[0].x = e.data_ptr()
        if states is not None:
            state.x = states.data_ptr()
        state.y, first.x, steps[-1].y = s, s, logits.data_ptr()
        if self.adds:
            steps[n + 1].x = steps[n + 1].y = first.onto = x
        self.kernels.take(steps, rows)
        return both[..., hidden:], logits

    def _steps_of(self, begins: bool, rows: int, width: int) -> tuple[Any, Tensor]:
        """The maps for so many rows, and where they write in between; `read` says where they begin
        and end. begins: there are no states yet"""
        found = self._steps.get((begins, rows))
        if found is not None:
            return found
        hidden = self.of_u.out
        size = rows * max([hidden, self.of_s.out, *(panels.out for panels, _ in self.behind[:-1])])
        room = self.c.new_empty((2, size))
        here, there = room.data_ptr(), room.data_ptr() + size * _FLOAT
        steps = self._first_steps(begins, rows, width, here)
        step = self.kernels.step
        for panels, bias in self.behind[:-1]:
            block = bias is not None
            add, onto = (bias.data_ptr(), here) if block else (None, None)
            steps.append(step(rows, there, panels, here, add=add, onto=onto, silu=block))
            here, there = there, here
        steps.append(step(rows, here, self.behind[-1][0], here))
        self._steps[begins, rows] = found = self.kernels.steps(steps), room
        return found

    def _first_steps(self, begins: bool, rows: int, width: int, here: int) -> list[Any]:
        """Up to the first map behind the recurrence, which writes to `here`."""
        step, hidden, c = self.kernels.step, self.of_u.out, self.c.data_ptr()
        apart = dict(y_stride=2 * hidden, silu=True)
        of_u, bias = None if begins else self.of_u, self.bias.data_ptr()
        if self.table is not None:
            table = dict(add=self.table.data_ptr(), at=here, known=len(self.table))
            steps = [step(rows, here, of_u, out=hidden, **table, **apart)]
        elif begins:
            steps = [step(rows, here, self.of_e, add=bias, **apart)]
        else:
            steps = [step(rows, here, self.of_e, add=bias)]
            steps.append(step(rows, here, of_u, add=here, each=1, **apart))
        if self.adds:
            steps.append(step(rows, here, out=hidden, add=c, each=width, y_stride=2 * hidden))
        said = dict(add=self.of_c.data_ptr(), each=width, x_stride=2 * hidden, silu=self.adds)
        return [*steps, step(rows, here, self.of_s, **said)]


def _is_plain(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and torch.is_inference_mode_enabled()


def _maps(head: Any) -> list[tuple[Any, Tensor | None]] | None:
    """W; U; the first map's part of s; those behind it, with a bias where they are a residual
    block's; the vocabulary's. None where one is no plain matrix."""
    blocks = range(0 if head._projects else 1, head._n_blocks)
    linears = [head.rnn_w, head.rnn_u, *(head.lm_head[i].linear for i in blocks)]
    linears += [head.to_hidden] if head.draws_on_target else []
    first, matrix = head._split_first(), head.vocab_matrix()
    # A matrix may be made anew in every call; a map may be adapted.
    known = isinstance(matrix, nn.Parameter) or matrix is head._frozen_matrix
    if first is None or not known or any(type(linear) is not Linear for linear in linears):
        return None
    products = [linear.product() for linear in linears]
    products[2:2] = [first.of_s]
    panels = [p if p is None else p.ready() for p in (*products, head._product(matrix))]
    biases = [b if (b := linear.bias) is None else b.detach() for linear in linears]
    plain = all(b is None or (_is_plain(b) and b.is_contiguous()) for b in biases)
    if any(p is None for p in panels) or not plain:
        return None
    return list(zip(panels, [*biases[:2], None, *biases[2:], None], strict=True))
