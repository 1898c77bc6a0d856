"""The levels of a recurrent head's draft, each in one call of the library's kernels.

What `RecurrentHead.advance`, `features` and `logits` compute, up to rounding. Of a few rows each of
these maps takes some tens of microseconds on a CPU, and to ask for it takes as long in Python: so
they are asked for together, and laid out once for all drafts; each begins with a look at whether
the head is still what it was. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from redrafter.products import Linear, PackedProduct, kernels_for, state_of

_FLOAT = 4  # bytes


class _Room(NamedTuple):
    """Where the drafts of so many rows keep what depends on c alone.

    c: (B, 1, H); of_c: (B, 1, E), what the first map makes of it, by the step `first`; steps: see
        `_steps_of`
    """

    c: Tensor
    of_c: Tensor
    first: Any
    steps: dict[tuple[bool, int], tuple[Any, Tensor]]


class ReadyLevels:
    """What there is to read with, while the head stays as it is: made by `make`, given every
    draft's context by `take_up`. A thread has its own, as two may draft with one head.

    context: (B, 1, H) c of each row, by which a draft is known
    table: (V, H) W e + b of every token, or None
    maps: W; U; the first map's part of s; those behind it, the last of which makes logits
    """

    def __init__(self, head: Any, kernels: Any, table: Tensor | None, maps: _Maps):
        self.of_e, self.of_u, self.of_s, *self.behind = maps.panels
        _, self.bias, *self.biases = maps.biases
        self.kernels, self.table, self.maps = kernels, table, maps
        self.thread = get_ident()
        self.adds = not head._projects  # whether the first map is a residual block's
        self.context: Tensor | None = None
        self._rooms: dict[int, _Room] = {}

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the head has other memory

    @staticmethod
    def for_draft(
        last: ReadyLevels | None, head: Any, target: Any, context: Tensor
    ) -> ReadyLevels | None:
        """`last` where the head is what it was; None where torch's operations are to do it: no
        kernels, or other maps, shapes, dtypes."""
        if not _is_plain(context) or context.shape != (len(context), 1, head.rnn_w.in_features):
            return None
        if last is None or not last.is_current(head, target):
            last = ReadyLevels.make(head, target)
        if last is not None:
            last.take_up(context)
        return last

    @staticmethod
    def make(head: Any, target: Any) -> ReadyLevels | None:
        kernels = kernels_for(head.rnn_w.weight)
        maps = None if kernels is None else _Maps.of(head)
        return maps and ReadyLevels(head, kernels, head._read_ahead(target), maps)

    def is_current(self, head: Any, target: Any) -> bool:
        """Whether what was looked up is what would be found now. Asked by every draft."""
        known = self.thread == get_ident() and kernels_for(head.rnn_w.weight) is self.kernels
        known = known and self.maps.are_of(head)
        return known and (self.table is None or head._read_ahead(target) is self.table)

    def take_up(self, context: Tensor) -> None:
        """The rows of a new draft."""
        room = self._rooms.get(len(context))
        if room is None:
            room = self._rooms[len(context)] = self._room_for(context)
        self.context, self.room = context, room
        room.c.copy_(context)
        self.kernels.take(room.first, len(context))

    def _room_for(self, context: Tensor) -> _Room:
        rows, c = len(context), torch.empty_like(context)
        of_c, bias = context.new_empty((rows, 1, self.of_s.out)), self.maps.bias_of_c
        add = None if bias is None else bias.data_ptr()
        first = self.kernels.step(rows, of_c.data_ptr(), self.maps.of_c, c.data_ptr(), add=add)
        return _Room(c, of_c, self.kernels.steps([first]), {})

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
        both = self.room.c.new_empty((batch, width, 2 * hidden))  # x = [c ; s]
        logits = both.new_empty((batch, width, self.behind[-1].out))
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
        found = self.room.steps.get((begins, rows))
        if found is not None:
            return found
        hidden = self.of_u.out
        size = rows * max([hidden, self.of_s.out, *(panels.out for panels in self.behind[:-1])])
        room = self.room.c.new_empty((2, size))
        here, there = room.data_ptr(), room.data_ptr() + size * _FLOAT
        steps = self._first_steps(begins, rows, width, here)
        step = self.kernels.step
        for panels, bias in zip(self.behind[:-1], self.biases, strict=True):
            block = bias is not None
            add, onto = (bias.data_ptr(), here) if block else (None, None)
            steps.append(step(rows, there, panels, here, add=add, onto=onto, silu=block))
            here, there = there, here
        steps.append(step(rows, here, self.behind[-1], here))
        self.room.steps[begins, rows] = found = self.kernels.steps(steps), room
        return found

    def _first_steps(self, begins: bool, rows: int, width: int, here: int) -> list[Any]:
        """Up to the first map behind the recurrence, which writes to `here`."""
        step, hidden, c = self.kernels.step, self.of_u.out, self.room.c.data_ptr()
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
        said = dict(add=self.room.of_c.data_ptr(), each=width, x_stride=2 * hidden, silu=self.adds)
        return [*steps, step(rows, here, self.of_s, **said)]


class _Maps:
    """A head's maps, and what they were found by.

    panels: W; U; the first map's part of s; those behind it; the vocabulary's
    biases: of W and U, and of those behind the first up to the vocabulary's; None where one adds
    none
    of_c, bias_of_c: the first map's part of c
    """

    def __init__(
        self, head: Any, linears: list[nn.Module], made: list[PackedProduct], panels: list[Any]
    ):
        self.linears, self.made, self.rounds = linears, made, head.rounds
        self.of_c, *self.panels = panels
        self.parts = list(_parts(head))
        self.biases = [b if (b := linear.bias) is None else b.detach() for linear in linears]
        self.bias_of_c = head._first.linear.bias
        #: kept, so that no other memory lies where theirs does
        self.weights = [part for _, _, part in self.parts if isinstance(part, Tensor)]
        self.memory = [weight.detach() for weight in self.weights]
        self.state = [*map(state_of, self.weights)]

    @staticmethod
    def of(head: Any) -> _Maps | None:
        """None where one is no plain matrix."""
        blocks = range(0 if head._projects else 1, head._n_blocks)
        linears = [head.rnn_w, head.rnn_u, *(head.lm_head[i].linear for i in blocks)]
        linears += [head.to_hidden] if head.draws_on_target else []
        first, matrix = head._split_first(), head.vocab_matrix()
        # A matrix may be made anew in every call; a map may be adapted.
        known = isinstance(matrix, nn.Parameter) or matrix is head._frozen_matrix
        if first is None or not known or any(type(linear) is not Linear for linear in linears):
            return None
        made = [first.of_c, *(linear.product() for linear in linears), head._product(matrix)]
        made[3:3] = [first.of_s]
        panels = [p if p is None else p.ready() for p in made]
        biases = [map.bias for map in (first.linear, *linears) if map.bias is not None]
        plain = all(_is_plain(bias) and bias.is_contiguous() for bias in biases)
        if any(p is None for p in panels) or not plain:
            return None
        return _Maps(head, linears, made, panels)

    def are_of(self, head: Any) -> bool:
        """Whether `of` would find the same."""
        return (
            head.rounds == self.rounds
            and all(places.get(name) is part for places, name, part in self.parts)
            and all(type(linear) is Linear for linear in self.linears)
            and self.state == [*map(state_of, self.weights)]
            # The target's may have been laid out anew.
            and self.made[-1].panels is self.panels[-1]
        )


def _parts(head: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where every part that a level reads with is kept, its name there, and the part."""
    for module in head.modules():
        for places in (module._modules, module._parameters):
            yield from ((places, name, part) for name, part in places.items())
    yield head.__dict__, "_frozen_matrix", head._frozen_matrix


def _is_plain(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and torch.is_inference_mode_enabled()
