"""A fused forward that is recorded once per shape and then replayed: CUDA graphs.

On a GPU a step of few tokens is bound by launching operations, some ten to twenty in each layer; a
replay is one launch. A recording holds addresses, not Python: what it reads lies in tensors of its
own (tokens, positions, masks, places of the new keys), and in caches that are kept for the next
text of the same size. It sees as many keys as its width, of which there are few (`width_of`), so
that few recordings are needed; what lies behind the keys of a step is masked.

Up to rounding the forward it was recorded from: masked keys have weight 0, but other widths may be
summed in another order. Whatever it was not made for (a prompt, another cache, a model that
somebody looks into) runs without it. Source: torch.cuda.graph; caches and widths, ours.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from redrafter.contracts import InputError
from redrafter.targets.cache import RowCache
from redrafter.targets.fused import FusedForward

Masks = Tensor | dict[str, Tensor]
#: runs a function once or more, and returns what repeats its operations on the same tensors
Recorder = Callable[[Callable[[], None]], Callable[[], None]]

#: new tokens of a row above which a forward is not bound by launching
_MOST_TOKENS = 64
#: caches, and recordings on each, that are kept
_CACHES, _RECORDINGS = 2, 16
_LEAST_WIDTH = 256


def width_of(keys: int) -> int:
    """Keys that a recording sees where a step has so many: the next power of two, 256 at least."""
    return max(_LEAST_WIDTH, 1 << (keys - 1).bit_length())


class CudaRecorder:
    """By CUDA graphs, all of them in one pool of memory: they never run at the same time, and what
    one gives is copied before the next one runs."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # As torch asks: first on another stream, where libraries may still allocate.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        return graph.replay


class _Memory:
    """Keys and values of a cache, (2 * layers, B, heads, M, d), and what was recorded on them."""

    def __init__(self, store: Tensor):
        self.store = store
        self.recorded: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()


class KeptCache(RowCache):
    """One whose keys and values lie where those of an earlier text did."""

    def __init__(self, n_layers: int, batch_size: int, capacity: int, memory: _Memory):
        super().__init__(n_layers, batch_size, capacity, memory.store.device)
        self.memory, self._groups = memory, [memory.store]
        self._views = [tuple(memory.store[2 * i : 2 * i + 2]) for i in range(n_layers)]

    @property
    def padded(self) -> bool:
        """Whether the next tokens hold some that belong to no text."""
        return self._padding is not None

    @contextmanager
    def fixed(self, places: Tensor, width: int):
        """Inside, keys of new tokens go to places (B, N) int64, and `width` of them are seen."""
        before = self._slots, self._width, self._uniform
        self._slots, self._width, self._uniform = places, width, False
        try:
            yield
        finally:
            self._slots, self._width, self._uniform = before


class _Recorded:
    """One forward of fixed shapes."""

    def __init__(
        self,
        forward: GraphForward,
        tokens: Tensor,
        masks: Masks,
        cache: KeptCache,
        shown: Sequence[int],
        width: int,
    ):
        batch, n = tokens.shape
        self.tokens, self.positions, self.places = (torch.zeros_like(tokens) for _ in range(3))
        self.each = torch.arange(n, device=tokens.device)
        self.masks = {
            name: mask.new_zeros(batch, 1, n, width) for name, mask in _named(masks).items()
        }
        given = self.masks if isinstance(masks, dict) else self.masks[""]
        #: read by address, and replaced by the forward where a longer text comes
        self.tables = forward.steps.tables.up_to(cache.capacity, tokens.device)

        def run() -> None:
            with cache.fixed(self.places, width):
                self.hidden = forward.eager(self.tokens, self.positions, given, cache, shown)

        self.record, self.run = forward.record, run

    def __call__(
        self, tokens: Tensor, positions: Tensor, masks: Masks, cache: KeptCache
    ) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        torch.add(cache.length[:, None], self.each, out=self.places)
        for name, mask in _named(masks).items():
            keys, own = mask.shape[-1], self.masks[name]
            own[..., :keys].copy_(mask)
            own[..., keys:].fill_(torch.finfo(own.dtype).min)
        if self.run is not None:
            self.replay = self.record(self.run)
            self.run = None  # it holds the cache, whose memory others wait for
        self.replay()
        # The next replay writes to the same place.
        return self.hidden.clone()


class GraphForward(FusedForward):
    """As `FusedForward`; `new_cache` gives the caches that it replays on.

    record: None takes CUDA graphs. Raises InputError where the device has none.
    """

    def __init__(self, backbone: Any, config: Any, record: Recorder | None = None):
        self.device = backbone.embed_tokens.weight.device
        if record is None and self.device.type != "cuda":
            raise InputError(
                f"target.forward graphs: they are CUDA's, and the target is on {self.device}; "
                "leave it out"
            )
        super().__init__(backbone, config)
        self.record = record or CudaRecorder()
        self._free: list[_Memory] = []
        #: recordings made so far; each is a pause of some tenths of a second
        self.n_recorded = 0
        #: False: texts that begin from here on run without, for who compares
        self.enabled = True

    def new_cache(self, n_layers: int, n_rows: int, capacity: int) -> RowCache:
        """An empty one, of a usual size. Its memory serves another once nobody holds it."""
        if not self.enabled:
            return super().new_cache(n_layers, n_rows, capacity)
        shape = (2 * n_layers, n_rows, self.kv_heads, width_of(capacity), self.head_dim)
        memory = next((m for m in self._free if m.store.shape == shape), None)
        if memory is None:
            with torch.inference_mode(False):  # to be written to in either mode
                memory = _Memory(torch.zeros(shape, dtype=self.dtype, device=self.device))
        else:
            self._free.remove(memory)
            memory.store.zero_()  # a masked key has weight 0, and 0 * nan would be nan
        cache = KeptCache(n_layers, n_rows, capacity, memory)
        weakref.finalize(cache, _give_back, self._free, memory).atexit = False
        return cache

    def __call__(
        self, tokens: Tensor, positions: Tensor, masks: Masks, cache: Cache,
        shown: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        if not self._replays(tokens, cache):
            return self.eager(tokens, positions, masks, cache, shown)
        width = width_of(cache.width)
        key = (*tokens.shape, width, *_named(masks), tuple(shown))
        recorded = cache.memory.recorded
        found = recorded.get(key)
        if found is None:
            found = recorded[key] = _Recorded(self, tokens, masks, cache, shown, width)
            self.n_recorded += 1
            if len(recorded) > _RECORDINGS:
                recorded.popitem(last=False)
        recorded.move_to_end(key)
        return found(tokens, positions, masks, cache)

    @staticmethod
    def _replays(tokens: Tensor, cache: Cache) -> bool:
        """Whether it is a step, whose shape will come again; prompts have lengths of their own."""
        step = isinstance(cache, KeptCache) and not cache.padded and min(cache.lengths) > 0
        return step and tokens.shape[1] <= _MOST_TOKENS and torch.is_inference_mode_enabled()

    def eager(self, *args: Any) -> Tensor:
        """Without a recording."""
        return super().__call__(*args)


def _named(masks: Masks) -> dict[str, Tensor]:
    """By name, where there is one mask alone as well."""
    return masks if isinstance(masks, dict) else {"": masks}


def _give_back(free: list[_Memory], memory: _Memory) -> None:
    free.append(memory)
    del free[:-_CACHES]
