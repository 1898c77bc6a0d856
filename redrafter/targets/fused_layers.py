"""All layers of a fused forward in one call of the kernels.

What Python and torch spend on calling a layer's ten steps is a fifth of a step of 135 M weights and
most of one of 6 M. Here the addresses of a model's weights are written down once, and
csrc/layers.c goes through them: the same kernels in the same order, so the same numbers to the last
bit as `FusedForward` step by step, which stands in for everything that is not known here (another
cache, layers that are shown, biases behind a product). Source: ours.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from redrafter.kernels import Kernels, Panels, Sizes
from redrafter.targets.cache import RowCache
from redrafter.targets.fused_steps import KernelSteps, Wide, mask_strides, set_strides


class Map(ctypes.Structure):
    """x W^T + add, as layers.c has it."""

    _fields_ = [
        ("w", ctypes.c_void_p), ("add", ctypes.c_void_p),
        ("inputs", ctypes.c_long), ("out", ctypes.c_long), ("kind", ctypes.c_int),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """One layer's weights, and what of the cache and the masks is its own."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "norm", "q_norm", "k_norm", "mlp_norm", "keys", "values", "mask",
        )), ("mask_row", ctypes.c_long), ("mask_query", ctypes.c_long),
        *((name, Map) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "mlp_eps")),
    ]  # fmt: skip


class Decoder(ctypes.Structure):
    """What all layers have in common."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "positions", "slots", "cos", "sin", "padding",
        )), *((name, ctypes.c_long) for name in (
            "width", "known", "layers", "threads", "small",
        )), ("sizes", Sizes),
    ]  # fmt: skip


class LayersInOneCall:
    """Of layers of `FusedForward`; heads, kv_heads, dim: of their attention."""

    def __init__(
        self, kernels: Kernels, layers: Sequence[Any], wide: Wide, heads: int, kv_heads: int,
        dim: int,
    ):  # fmt: skip
        self.kernels, self.wide = kernels, wide
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.masks = [layer.mask for layer in layers]
        self._joined = [
            [layer.qkv, layer.out, layer.gate_up, layer.down] for layer in layers
        ]
        self._products = [joined.product for four in self._joined for joined in four]
        self._norms: list[list[nn.Module | None]] = [
            [layer.norm, layer.q_norm, layer.k_norm, layer.mlp_norm] for layer in layers
        ]
        #: whether a layer is what layers.c knows
        self.known = all(out.bias is None and down.bias is None for _, out, _, down in self._joined)
        #: the layers, and what they have the addresses of
        self._known: tuple[ctypes.Array, list[Panels], list[Tensor | None]] | None = None

    def __call__(self, x: Tensor, steps: KernelSteps, masks: Any, cache: RowCache) -> bool:
        """x (B * N, W) float32 becomes what the last layer gives, the cache holds the new keys and
        values. steps: begun. Returns whether it was done: where not, nothing has changed."""
        views = cache.views() if type(cache) is RowCache and self.known else None
        panels = [product.panels for product in self._products]
        if views is None or None in panels:  # nothing is laid out before the first forward
            return False
        # A call has an array of its own, as another thread may decode with the same target.
        made, *kept = self._layers(panels)
        layers = type(made).from_buffer_copy(made)
        sizes = steps.sizes
        sizes.heads, sizes.key_heads, sizes.dim, sizes.keys = (
            self.heads, self.kv_heads, self.dim, cache.width,
        )  # fmt: skip
        keys, values = views[0]
        set_strides(sizes, keys, values)
        sizes.bytes = keys.itemsize
        several = isinstance(masks, dict)
        for layer, (keys, values), name in zip(layers, views, self.masks, strict=True):
            mask = masks[name] if several else masks
            layer.keys, layer.values, layer.mask = (
                keys.data_ptr(), values.data_ptr(), mask.data_ptr(),
            )  # fmt: skip
            layer.mask_row, layer.mask_query = mask_strides(mask)
        slots, padding = cache.places(sizes.queries), cache.padding
        common = Decoder(
            steps.positions.data_ptr(), slots.data_ptr(), steps.cos.data_ptr(),
            steps.sin.data_ptr(), None if padding is None else padding.data_ptr(), x.shape[1],
            len(steps.cos), len(layers), self.kernels.threads_for(1 << 62),
            self.kernels.small, sizes,
        )  # fmt: skip
        self.kernels.pass_layers(common, layers, x)
        del kept  # until here: it is what the layers have the addresses of
        cache.count(len(x) * self.kv_heads * self.dim * len(layers) * 2)
        return True

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights lie elsewhere.
        return {**vars(self), "_known": None}

    def _layers(self, panels: list[Panels]) -> tuple[ctypes.Array, list, list]:
        """And what they have the addresses of. Anew where a weight is another one."""
        vectors = [self._vector(norm) for four in self._norms for norm in four]
        vectors += [self.wide(joined.bias) for four in self._joined for joined in four]
        known = self._known
        same = (
            known is not None
            and all(map(operator.is_, panels, known[1]))
            and all(map(_is_at, vectors, known[2]))
        )
        if not same:
            known = self._known = self._write(panels, vectors), panels, vectors
        return known

    def _vector(self, norm: nn.Module | None) -> Tensor | None:
        return None if norm is None else self.wide(norm.weight)

    def _write(self, panels: list[Panels], vectors: list[Tensor | None]) -> ctypes.Array:
        n = len(self._norms)
        made = (Layer * n)()
        places = [None if vector is None else vector.data_ptr() for vector in vectors]
        for i, (layer, norms) in enumerate(zip(made, self._norms, strict=True)):
            layer.norm, layer.q_norm, layer.k_norm, layer.mlp_norm = places[4 * i : 4 * i + 4]
            epsilons = [0.0 if norm is None else norm.variance_epsilon for norm in norms]
            layer.eps, layer.head_eps, _, layer.mlp_eps = epsilons
            adds = places[4 * (n + i) : 4 * (n + i) + 4]
            four = panels[4 * i : 4 * i + 4]
            layer.qkv, layer.out, layer.gate_up, layer.down = (
                Map(p.place, add, p.width, p.out, p.kind) for p, add in zip(four, adds, strict=True)
            )
        return made


def _is_at(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are the same memory."""
    if one is None or other is None:
        return one is other
    return one is other or one.data_ptr() == other.data_ptr()
