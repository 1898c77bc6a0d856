"""A key-value cache with a length per row, allocated once.

New keys and values are written behind each row's committed part; after verification the accepted
ones are moved to their place and the length grows. Nothing else is ever copied, so the bytes
moved per step are bounded by the tree's size, whatever the context's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import Cache


class RowCache(Cache):
    """Pre-allocated (B, heads, M, d) per layer; `lengths` committed entries per row.

    Before a forward over n new tokens call `prepare(n)`; after it `commit(...)`. A drafter that
    borrows the cache simply never commits.

    lengths: committed entries per row, known on the host (the loop reads them anyway)
    bytes_moved: bytes written by the last `prepare` .. `commit` round
    shared: whether every layer has keys, so that those of one shape can lie in one tensor
    """

    shared = True

    def __init__(self, n_layers: int, batch_size: int, capacity: int, device: torch.device):
        self.n_layers = n_layers
        self.capacity = capacity
        self.device = device
        self.lengths = [0] * batch_size
        self._length: Tensor | None = None
        self.bytes_moved = 0
        # Layers of one shape lie in one tensor, (2 * layers, B, heads, M, d): one move commits all.
        self._groups: list[Tensor] = []
        self._views: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self._slots: Tensor | None = None
        self._padding: Tensor | None = None
        self._start = self._width = 0
        self._uniform = True

    # -- what transformers asks of a cache -------------------------------------------------

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write (B, heads, n, d) at every row's own offset; return all keys and values so far."""
        keys, values = self._stores(key_states, value_states, layer_idx)
        for store, new in ((keys, key_states), (values, value_states)):
            if self._padding is not None:
                new = new.masked_fill(self._padding.to(new.device)[:, None, :, None], 0)
            if self._uniform:
                store[:, :, self._start : self._start + new.shape[2]].copy_(new)
            else:
                index = self._slots.to(store.device)[:, None, :, None].expand_as(new)
                store.scatter_(2, index, new)
            self.bytes_moved += new.numel() * new.element_size()
        return keys[:, :, : self._width], values[:, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.capacity

    get_max_length = get_max_cache_shape

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self._width, 0

    @property
    def is_initialized(self) -> bool:
        return self._views[0] is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.n_layers

    # Windows are in the masks; every layer keeps every key.
    is_linear = is_dummy = is_sliding

    def __len__(self) -> int:
        return self.n_layers

    def __repr__(self) -> str:
        return f"RowCache({self.n_layers} layers, {self.capacity} entries, lengths {self.lengths})"

    # -- what kernels that go through all layers ask of it ----------------------------------

    def views(self) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of each layer, (B, heads, M, d); None where they are not all of one shape
        in one tensor, or before the first forward has made them."""
        if len(self._groups) != 1 or None in self._views:
            return None
        return self._views

    def places(self, n: int) -> Tensor:
        """(B, n) int64, contiguous: where the next forward's tokens go."""
        if not self._uniform:
            return self._slots.contiguous()
        row = torch.arange(self._start, self._start + n, device=self.device)
        return row.expand(len(self.lengths), n).contiguous()

    @property
    def padding(self) -> Tensor | None:
        """(B, n) bool, contiguous: of which of them zeros are kept."""
        return None if self._padding is None else self._padding.contiguous()

    def count(self, entries: int) -> None:
        """So many were written beside `update`."""
        self.bytes_moved += entries * self._groups[0].element_size()

    # -- what the loop does ----------------------------------------------------------------

    @property
    def width(self) -> int:
        """S, keys that the next forward sees per row."""
        return self._width

    @property
    def length(self) -> Tensor:
        """(B,) int64: `lengths` on the device, made when first asked for."""
        if self._length is None:
            self._length = torch.tensor(self.lengths, device=self.device)
        return self._length

    @property
    def uniform(self) -> bool:
        """Whether every row's next entries go to the same place. Token counts do not tell: a
        finished row's last token may be committed where a live one's is not."""
        return self._uniform

    def prepare(self, n: int, padding: Tensor | None = None) -> None:
        """The next forward brings n tokens per row.

        padding: (B, n) bool, those that belong to no text. Zeros are kept of them: a masked key
        has weight 0, and 0 * nan would be nan
        """
        self._padding = padding
        self._start, self._width = self.lengths[0], max(self.lengths) + n
        if self._width > self.capacity:
            raise RuntimeError(f"cache of {self.capacity} entries cannot hold {self._width}")
        self._uniform = all(length == self._start for length in self.lengths)
        if not self._uniform:
            self._slots = self.length[:, None] + torch.arange(n, device=self.device)
        self.bytes_moved = 0

    def commit(self, lengths: list[int], path: Tensor | None = None) -> None:
        """Keep the nodes on `path`; `lengths` are the committed entries per row afterwards.

        path: (B, P) int64, node that becomes the i-th new entry of its row; beyond the row's new
              length its content is irrelevant. None where the entries already lie in order.
        """
        if path is not None and path.shape[1] > 1:
            # Entry 0 (the root) is always in place.
            target = self.length[:, None] + torch.arange(1, path.shape[1], device=self.device)
            source = self.length[:, None] + path[:, 1:]
            for store in self._groups:
                shape = (*store.shape[:3], path.shape[1] - 1, store.shape[4])
                where = source.to(store.device)[None, :, None, :, None].expand(shape)
                # gather copies, so overlapping source and target are safe
                moved = store.gather(3, where)
                store.scatter_(
                    3, target.to(store.device)[None, :, None, :, None].expand(shape), moved
                )
                self.bytes_moved += moved.numel() * moved.element_size()
        self.lengths = list(lengths)
        self._length = None

    def aside(self, rows: Tensor) -> AbstractContextManager[None]:
        """Around a forward over the root alone that comes between a forward and its `commit`; of
        `rows` (B,) bool it is the one that counts. Nothing to do: its keys are overwritten."""
        return nullcontext()

    def rehearse(self, count: int) -> None:
        """For who measures: what `commit` will cost of `count` of the tokens that the forward
        brought. Nothing here; moving the entries of a branch is left out."""

    def clear(self, rows: Tensor) -> None:
        """Forget what lies behind the committed entries of some rows. rows: (B,) bool"""
        behind = torch.arange(self.capacity, device=self.device) >= self.length[:, None]
        behind = (behind & rows[:, None])[None, :, None, :, None]
        for store in self._groups:
            store.masked_fill_(behind.to(store.device), 0)

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(store.numel() * store.element_size() for store in self._groups)

    def data_ptrs(self) -> list[int]:
        return [store.data_ptr() for store in self._groups]

    def _stores(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(B, heads, M, d) of the rows that the next forward works on."""
        return self._views[layer_idx] or self._allocate(keys, values, layer_idx)

    def _allocate(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        def zeros(n: int, like: Tensor) -> Tensor:
            batch, heads, _, dim = like.shape
            self._groups.append(like.new_zeros(n, batch, heads, self.capacity, dim))
            return self._groups[-1]

        alike = keys.shape == values.shape
        if self.shared and not self._groups and alike:
            zeros(2 * self.n_layers, keys)
        first = self._groups[0] if self._groups else None
        if self.shared and alike and len(first) == 2 * self.n_layers and _fits(first, keys):
            view = (first[2 * layer_idx], first[2 * layer_idx + 1])
        else:  # a model that mixes head sizes (DeepSeek: keys and values differ) or devices
            view = (zeros(1, keys)[0], zeros(1, values)[0])
        self._views[layer_idx] = view
        return view


def _fits(store: Tensor, states: Tensor) -> bool:
    """Whether (n, B, heads, M, d) has the heads, their size and the device of (B, heads, n, d)."""
    return (
        store.shape[1:3] == states.shape[:2]
        and store.shape[4] == states.shape[3]
        and store.device == states.device
    )
