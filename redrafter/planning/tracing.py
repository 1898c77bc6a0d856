"""Memory of code that runs on the meta device: which tensors live at once, in bytes.

Tensors of the device "meta" have a shape and no content. The code that trains and decodes runs on
them as it is, and every storage it makes is counted from when it is made until it is freed; so the
peak is that of the code itself, at any size, and no formula has to follow it. What a kernel needs
inside (scratch of matrix products) and what an allocator keeps of freed memory is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten


def storage_bytes(tensors: Any) -> int:
    """Bytes of all tensors in any nest of containers, a shared storage counted once."""
    found = {}
    for tensor in _tensors(tensors):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@dataclass(frozen=True)
class Piece:
    """A storage: its bytes, and under which label it was made."""

    n_bytes: int
    label: str


@contextmanager
def traced() -> Iterator[Trace]:
    """Counts the storages that are made inside."""
    with _FusedAttention(), Trace() as trace:
        yield trace


class Trace(TorchDispatchMode):
    """See `traced`.

    live_bytes, peak_bytes: now, and at most
    at_peak: the pieces that lived then, by number
    Tensors that were there before (weights, a batch) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.at_peak: dict[int, Piece] = {}
        self._read: set[int] = set()
        self._live: dict[int, Piece] = {}
        self._number: dict[int, int] = {}  # address of a storage -> its number: addresses come back
        self._made = 0
        self._label = ""

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is made inside is named so."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def numbers_of(self, tensors: Any) -> set[int]:
        """Numbers of the pieces that these tensors lie in."""
        found = (t.untyped_storage()._cdata for t in _tensors(tensors))
        return {self._number[address] for address in found if address in self._number}

    def forget_peak(self) -> None:
        """Begin anew with what lives now."""
        self.peak_bytes, self.at_peak = self.live_bytes, dict(self._live)

    def _free(self, address: int, number: int) -> None:
        if self._number.get(address) == number:
            del self._number[address]
        self.live_bytes -= self._live.pop(number).n_bytes

    def _count(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, n_bytes = storage._cdata, storage.nbytes()
        if address in known or address in self._number or not n_bytes:
            return
        self._made += 1
        number = self._made
        self._number[address], self._live[number] = number, Piece(n_bytes, self._label)
        weakref.finalize(storage, self._free, address, number)
        self.live_bytes += n_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.live_bytes, dict(self._live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = _without_content(func, args)
        if result is None and not torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CPU"
        ):
            # In inference mode these arrive whole; what they are made of is what uses memory.
            with self:
                made_of = func.decompose(*args, **kwargs)
            if made_of is not NotImplemented:
                return made_of
        result = func(*args, **kwargs) if result is None else result
        # What an operation returns of its own inputs (views, in-place results) is not new.
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        returned = _tensors(result)
        for tensor in returned:
            self._count(tensor, given)
        if func.overloadpacket not in _LOOKUPS:
            self._read |= given - {t.untyped_storage()._cdata for t in returned}
        return result

    def read_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Of these, what operations read whole; a lookup of rows and a view read nothing."""
        return storage_bytes([p for p in parameters if p.untyped_storage()._cdata in self._read])


def _tensors(nest: Any) -> list[Tensor]:
    return [t for t in tree_leaves(nest) if isinstance(t, Tensor)]


#: operations that read single rows
_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}


def _without_content(func: Any, args: tuple) -> Any:
    """The result of an operation whose shape depends on content; None for all others.

    Masks select everything (no position is left out), and a yes-or-no question is answered yes:
    transformers asks whether rows are neither packed nor padded.
    """
    name = func.overloadpacket
    if name in (_aten.index, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put):
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        if not masks or not args[0].is_meta:
            return None
        if name is not _aten.index:
            return args[0]
        n = masks[0].numel()
        return args[0].new_empty((n, *args[0].shape[masks[0].dim() :]))
    if name in (_aten._local_scalar_dense, _aten.is_nonzero, _aten.item):
        return True if args[0].is_meta and args[0].dtype == torch.bool else None
    return None


@contextmanager
def longest_way() -> Iterator[None]:
    """Inside, every number that code reads by `tolist` of a tensor without content is 1: a token is
    chosen, a drafted one accepted, and its node does not lie behind its parent in the tree."""
    with _Ones():
        yield


class _Ones(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.tolist and args[0].is_meta:
            return torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu").tolist()
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would take the attention that writes out all scores; on a real one
    it takes a fused kernel, which keeps the result and one number per query."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else (
                kwargs["query"], kwargs["key"], kwargs["value"]
            )  # fmt: skip
            if query.is_meta:
                return _FusedKernel.apply(query, key, value)
        return func(*args, **kwargs)


class _FusedKernel(torch.autograd.Function):
    """Such a kernel's result, what it keeps for the way back, and what it makes there."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, log_sum)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(kept.new_empty(kept.shape) for kept in ctx.saved_tensors[:3])
