"""Recurrent layers verify chains: their states are kept as of each row's last committed token.

A state is one tensor for all of a text: of the tokens that went into it none can be masked or cut
off, so a tree cannot be verified. A chain can: a forward reads it from the committed state, and
when part of it is rejected the state that stood behind the accepted part is what counts.

    state behind    "a b"                    committed
    a forward reads       c d e              the root and two drafted tokens
    accepted              c d                `commit`: the state behind "a b c d"

    all was accepted        the state at the end, for nothing
    a convolution's state   is the last inputs, and all of them are known: cut out, for nothing
    a mixer that reads      token by token (see below): each token's state was kept
    any other               reads the accepted tokens again, from its own inputs, which were kept;
                            no other part of the model reads them again

So rows may accept different lengths, and a prompt may be padded on the right: what is behind a
row's last token is never in its state. A scan that takes no first state (Mamba's first kind in
transformers) reads several tokens behind a state only one by one. Which states there are is what
the mixers ask a cache for: any class that keeps its state elsewhere fails the probe by name.
Source: ours; rolling back a state by reading the accepted part again is also how engines do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.targets.cache import RowCache

#: what transformers' mixers call their cache
_CACHE_NAMES = ("cache_params", "past_key_values")
#: what a mixer asks of a cache, and what it hands its scan where that can go on from a state
_ASKS = {"update_conv_state", "update_recurrent_state"}
_GOES_ON = {"initial_state", "initial_states"}

#: ("conv" or "recurrent", layer, number of the state in the layer)
Key = tuple[str, int, int]


@dataclass
class _Read:
    """A mixer's part of a forward: its own `forward`, its name for a cache, its inputs (B, n, H)
    and its other arguments.

    keys: of the states that it has; steps: of a mixer that read token by token, these behind each
    """

    own: Callable[..., Any]
    cache_name: str
    hidden: Tensor
    others: dict[str, Any]
    keys: set[Key] = field(default_factory=set)
    steps: list[dict[Key, Tensor]] = field(default_factory=list)

    def run(self, cache: StateCache, start: int, stop: int, rows: Tensor | None = None) -> Tensor:
        """Tokens `start` to `stop`, all or of some rows, (R, stop - start, H)."""
        cache.reading = self

        def part(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.shape[1:2] != self.hidden.shape[1:2]:
                return x
            x = x[:, start:stop]
            return x if rows is None or len(x) == 1 else x[rows]

        others = {name: part(x) for name, x in self.others.items()}
        return self.own(part(self.hidden), **{self.cache_name: cache}, **others)


class StateCache(RowCache):
    """A `RowCache` for models with recurrent layers: keys and values as there, and states."""

    shared = False  # layers without attention have no keys

    def __init__(self, n_layers: int, batch_size: int, capacity: int, device: torch.device):
        super().__init__(n_layers, batch_size, capacity, device)
        self._kept: dict[Key, Tensor] = {}  # (B, ...), as of the committed tokens
        self.reading: _Read | None = None
        self._is_aside = False
        self._begin(0, keeps_inputs=False)

    def _begin(self, n: int, keeps_inputs: bool) -> None:
        self._n, self._keeps_inputs = n, keeps_inputs
        self._now: dict[Key, Tensor] = {}  # as of the last token that its mixer has read
        self._windows: dict[Key, Tensor] = {}  # (B, C, k + n): what a convolution sees
        self._reads: list[_Read] = []

    # -- what transformers' mixers ask of a cache ------------------------------------------

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state(("recurrent", layer_idx, state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0,
        conv_kernel_size: int | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """New inputs (B, C, n) of a convolution. Returns (B, C, k + n): with those before them."""
        key = ("conv", layer_idx, state_idx)
        before = self._state(key)
        if conv_kernel_size is None:
            raise NotImplementedError("a convolution's state whose length is not said")
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:2], conv_kernel_size)
        self._windows[key] = torch.cat([before, conv_states], -1)
        self._now[key] = self._windows[key][..., -conv_kernel_size:]
        return self._windows[key]

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self._state(("recurrent", layer_idx, state_idx))
        self._now["recurrent", layer_idx, state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None):
        return any(
            layer_idx in (None, layer) and state_idx in (None, index)
            for _, layer, index in (*self._kept, *self._now)
        )

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether a convolution is to show its inputs, rather than change the state in place."""
        return True

    def _state(self, key: Key) -> Tensor | None:
        """As it stands in this forward; a copy of the kept one, as kernels write to it."""
        if self.reading is not None:
            self.reading.keys.add(key)
        if key not in self._now and key in self._kept:
            self._now[key] = self._kept[key].clone()
        return self._now.get(key)

    def read(self, mixer: nn.Module, reading: _Read) -> Tensor:
        """A mixer's forward, (B, n, H), from the committed state."""
        n = reading.hidden.shape[1]
        self._reads.append(reading)
        if n == 1 or _goes_on(type(mixer)) or not self._has_state(mixer.layer_idx):
            out = reading.run(self, 0, n)
        else:
            out = []
            for token in range(n):
                out.append(reading.run(self, token, token + 1))
                states = {key: self._now[key].clone() for key in reading.keys}
                reading.steps.append(states)
            out = torch.cat(out, 1)
        self.reading = None
        if not self._keeps_inputs:
            reading.hidden, reading.others = reading.hidden.new_empty(0), {}
        return out

    def _has_state(self, layer: int) -> bool:
        return any(what == "recurrent" and at == layer for what, at, _ in self._kept)

    # -- what the loop does ----------------------------------------------------------------

    def prepare(self, n: int, padding: Tensor | None = None) -> None:
        """As a `RowCache`. Of a first forward without padding all is committed, or nothing."""
        super().prepare(n, padding)
        goes_on = n > 1 and bool(self._kept)
        self._begin(n, keeps_inputs=goes_on or padding is not None or self._is_aside)

    def commit(self, lengths: list[int], path: Tensor | None = None) -> None:
        """As a `RowCache`, of a chain: the entries lie in order, and none is given up again."""
        counts = [new - old for new, old in zip(lengths, self.lengths, strict=True)]
        if path is not None or min(counts) < 0:
            raise RuntimeError("a recurrent state follows a chain and never goes back")
        if self._reads:
            self._keep([min(count, self._n) for count in counts])
        self._begin(0, keeps_inputs=False)
        super().commit(lengths, path)

    def _keep(self, counts: list[int]) -> None:
        """The states behind the first `counts` tokens of every row's forward."""
        if min(counts) == self._n:
            self._kept.update(self._now)
            return
        if not self._keeps_inputs and any(0 < count < self._n for count in counts):
            raise RuntimeError("a ragged prefill needs to be told its padding")
        for count in sorted({*counts} - {0}):
            rows = [row for row, own in enumerate(counts) if own == count]
            at = torch.tensor(rows, device=self.device)
            for reading in self._reads:
                for key, state in self._behind(reading, count, at).items():
                    if key not in self._kept:
                        self._kept[key] = state.new_zeros(len(counts), *state.shape[1:])
                    self._kept[key].index_copy_(0, at.to(state.device), state)

    def _behind(self, reading: _Read, count: int, rows: Tensor) -> dict[Key, Tensor]:
        """A mixer's states behind the first `count` tokens of `rows` (R,) int64."""
        if count == self._n:
            return {key: self._now[key][rows] for key in reading.keys}
        if reading.steps:
            return {key: state[rows] for key, state in reading.steps[count - 1].items()}
        if reading.keys <= self._windows.keys():
            windows = {key: self._windows[key] for key in reading.keys}
            width = self._n
            return {k: w[rows, :, count : w.shape[2] - width + count] for k, w in windows.items()}
        again = StateCache(self.n_layers, len(rows), self.capacity, self.device)
        again._kept = {k: self._kept[k][rows] for k in reading.keys if k in self._kept}
        reading.run(again, 0, count, rows)
        return again._now

    def rehearse(self, count: int) -> None:
        rows = torch.arange(len(self.lengths), device=self.device)
        for reading in self._reads:
            self._behind(reading, count, rows)

    @contextmanager
    def aside(self, rows: Tensor) -> Iterator[None]:
        """Around a forward over the root alone that comes between a forward and its `commit`: of
        `rows` (B,) bool, what the mixers read and made of the root there is what counts."""
        first = self._n, self._keeps_inputs, self._now, self._windows, self._reads
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False
        now, windows, roots = self._now, self._windows, self._reads
        self._n, self._keeps_inputs, self._now, self._windows, self._reads = first
        at = rows.nonzero()[:, 0]
        for reading, root in zip(self._reads, roots, strict=True):
            reading.hidden = reading.hidden.clone()
            reading.hidden[at, 0] = root.hidden[at, 0]
            for key, state in (reading.steps[0] if reading.steps else {}).items():
                state[at] = now[key][at]
        for key, window in windows.items():
            self._windows[key][at, :, : window.shape[2]] = window[at]

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for keys, values and states."""
        states = sum(state.numel() * state.element_size() for state in self._kept.values())
        return super().n_bytes + states


def find_mixers(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that keep a state in its cache; a `StateCache` sees from now on what
    they read. With any other cache they are as they were."""
    mixers = [m for m in model.modules() if hasattr(m, "layer_idx") and _asks(type(m))]
    for mixer in mixers:
        if not isinstance(mixer.forward, partial):  # of an earlier target of this model
            names = tuple(inspect.signature(type(mixer).forward).parameters)[1:]
            mixer.forward = partial(_forward, mixer, mixer.forward, names)
    return mixers


def _forward(
    mixer: nn.Module, own: Callable[..., Any], names: Sequence[str], *args: Any, **kwargs: Any
) -> Any:
    given = dict(zip(names, args, strict=False)) | kwargs
    name = next((n for n in _CACHE_NAMES if isinstance(given.get(n), StateCache)), None)
    if name is None:
        return own(*args, **kwargs)
    hidden, cache = given.pop(names[0]), given.pop(name)
    return cache.read(mixer, _Read(own, name, hidden, given))


@cache
def _asks(kind: type[nn.Module]) -> bool:
    return bool(_ASKS & {*inspect.unwrap(kind.forward).__code__.co_names})


@cache
def _goes_on(kind: type[nn.Module]) -> bool:
    """Whether its scan of several tokens takes a first state: the names of keyword arguments are
    among a function's constants. The probe finds out whether it is true."""
    constants = inspect.unwrap(kind.forward).__code__.co_consts
    return any(_GOES_ON & {*names} for names in constants if isinstance(names, tuple))
