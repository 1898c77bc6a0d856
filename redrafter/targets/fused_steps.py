"""What a fused forward does between its products: by torch's operations, or by our kernels.

Both compute the same up to rounding; the kernels' numbers of a row depend on no other row, nor on
where in the cache keys lie that it may not see (redrafter/csrc/attention.c).
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from redrafter.kernels import Kernels, Sizes

Masks = Tensor | dict[str, Tensor]


class Steps(Protocol):
    """B rows of N tokens, H the hidden size, d of a head; q heads come before k heads.

    masks: after `begin`, what `attend` is given, or that by name
    """

    masks: Masks

    def begin(self, tokens: Tensor, positions: Tensor, masks: Masks, cache: Cache) -> Self:
        """Those of one forward over tokens at positions, (B, N) int64 each, which are those of
        their keys; masks: (B or 1, 1, N or 1, S), added to scores, or such by name"""

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension; any shape"""

    def rotate(self, qk: Tensor) -> Tensor:
        """(B, N, heads, d) -> rotated, likewise"""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q: (B, N, q heads, d), keys, values: (B, k heads, S, d), mask: of `masks`. Returns
        (B * N, q heads * d)"""

    def gated(self, activation: Any, x: Tensor) -> Tensor:
        """activation(g) u of x (R, 2 I) = [g, u]; (R, I)"""


class Tables:
    """cos and sin of all positions, the class's own numbers, the first half of sin negated."""

    def __init__(self, backbone: nn.Module, head_dim: int):
        self.backbone, self.head_dim = backbone, head_dim
        self._made: dict[torch.dtype | None, tuple[Tensor, Tensor]] = {}

    def up_to(
        self, positions: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """(at least `positions`, d) each, in their own dtype if no other is given"""
        made = self._made.get(dtype)
        if made is None or len(made[0]) < positions:
            known = 1 << (positions - 1).bit_length()
            every = torch.arange(known, device=device)[None]
            like = self.backbone.embed_tokens.weight[:1, :1]
            cos, sin = (x[0].clone() for x in self.backbone.rotary_emb(like, every))
            sin[:, : self.head_dim // 2].neg_()
            made = self._made[dtype] = cos.to(dtype or cos.dtype), sin.to(dtype or sin.dtype)
        return made


class Wide:
    """float32 copies of vectors of a half dtype, for who adds or multiplies in float32."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def __call__(self, x: Tensor | None) -> Tensor | None:
        if x is None or x.dtype.itemsize >= 4:
            return x
        found = self._made.get(x.data_ptr())
        if found is None:
            found = self._made[x.data_ptr()] = x.detach().float()
        return found

    def forget(self) -> None:
        """Where they may have changed."""
        self._made.clear()


class TorchSteps:
    """By torch's operations: any dtype, any device. groups: q heads of each k head"""

    def __init__(self, tables: Tables, scale: float, groups: int):
        self.tables, self.scale, self.groups = tables, scale, groups

    def begin(self, tokens: Tensor, positions: Tensor, masks: Masks, cache: Cache) -> TorchSteps:
        now = TorchSteps(self.tables, self.scale, self.groups)
        if isinstance(masks, dict):
            now.masks = {name: self.grouped(mask) for name, mask in masks.items()}
        else:
            now.masks = self.grouped(masks)
        tables = self.tables.up_to(cache.get_max_cache_shape(), positions.device)
        now.cos, now.sin = (F.embedding(positions, table)[:, :, None] for table in tables)
        return now

    def grouped(self, mask: Tensor) -> Tensor:
        """(B, 1, N, S) -> (B, 1, groups * N, S): each group's queries are rows of their own."""
        if mask.shape[2] == 1:
            return mask.expand(-1, -1, self.groups, -1)
        return mask if self.groups == 1 else mask.repeat(1, 1, self.groups, 1)

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """In float32 whatever the dtype, as the classes do."""
        weight = norm.weight
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)
        return weight * F.rms_norm(x.float(), weight.shape, eps=norm.variance_epsilon).to(x.dtype)

    def rotate(self, qk: Tensor) -> Tensor:
        # (x1, x2) cos + (-x2, x1) sin; the sign is in the table
        return (qk * self.cos).addcmul_(qk.roll(qk.shape[-1] // 2, -1), self.sin)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        # Queries that share a key's head are rows of one attention.
        batch, n, heads, dim = q.shape
        kv_heads, groups = keys.shape[1], self.groups
        q = q.view(batch, n, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
        seen = F.scaled_dot_product_attention(
            q.reshape(batch, kv_heads, groups * n, dim), keys, values, mask, scale=self.scale
        )
        seen = seen.view(batch, kv_heads, groups, n, dim).permute(0, 3, 1, 2, 4)
        return seen.reshape(batch * n, heads * dim)

    def gated(self, activation: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate).mul_(up)


def set_strides(sizes: Sizes, keys: Tensor, values: Tensor) -> None:
    """Of keys and values (B, key heads, S, dim), as kernels read them."""
    sizes.k_row, sizes.k_head, sizes.k_key, _ = keys.stride()
    sizes.v_row, sizes.v_head, sizes.v_key, _ = values.stride()


def mask_strides(mask: Tensor) -> tuple[int, int]:
    """Entries from row to row and from query to query, 0 where one is for all."""
    rows, _, queries, _ = mask.shape
    return mask.stride(0) if rows > 1 else 0, mask.stride(2) if queries > 1 else 0


class KernelSteps:
    """By our kernels: in float32 on a CPU, in inference mode, of the one activation that they have;
    keys and values may be bfloat16. wide: of the model's vectors"""

    ACTIVATIONS = ("silu", "swish")

    def __init__(self, kernels: Kernels, tables: Tables, scale: float, wide: Wide):
        self.kernels, self.tables, self.scale, self.wide = kernels, tables, scale, wide

    def begin(self, tokens: Tensor, positions: Tensor, masks: Masks, cache: Cache) -> KernelSteps:
        """Raises ValueError where kernels would read what is not there."""
        rows, queries = tokens.shape
        width = cache.get_mask_sizes(queries)[0]
        if positions.shape != tokens.shape or positions.dtype != torch.int64:
            raise ValueError(f"positions {tuple(positions.shape)} of {rows} x {queries} tokens")
        several = isinstance(masks, dict)
        for mask in masks.values() if several else (masks,):
            b, _, n, keys = mask.shape
            if b not in (1, rows) or n not in (1, queries) or keys != width:
                raise ValueError(
                    f"a mask of {tuple(mask.shape)} for {rows} x {queries} tokens, {width} keys"
                )
            known = mask.dtype in (torch.float32, torch.bfloat16)
            if not known or (keys > 1 and mask.stride(3) != 1):
                raise ValueError("a mask not in float32 or bfloat16, or whose keys lie apart")
        now = KernelSteps(self.kernels, self.tables, self.scale, self.wide)
        now.masks = {k: m.float() for k, m in masks.items()} if several else masks.float()
        now.sizes = Sizes(scale=self.scale, rows=rows, queries=queries)
        now.positions = positions.contiguous()
        now.cos, now.sin = self.tables.up_to(
            cache.get_max_cache_shape(), positions.device, torch.float32
        )
        return now

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        flat, weight = x.reshape(-1, x.shape[-1]), self.wide(norm.weight)
        return self.kernels.rms_norm(flat, weight, norm.variance_epsilon).view(x.shape)

    def rotate(self, qk: Tensor) -> Tensor:
        *_, heads, dim = qk.shape
        flat = qk.flatten(0, 1).flatten(1)
        rotated = self.kernels.rotate(flat, self.positions, self.cos, self.sin, heads, dim)
        return rotated.view(qk.shape)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        s = self.sizes
        _, _, s.heads, s.dim = q.shape
        s.q_stride = q.stride(1)
        _, s.key_heads, s.keys, _ = keys.shape
        set_strides(s, keys, values)
        s.mask_row, s.mask_query = mask_strides(mask)
        return self.kernels.attention(q, keys, values, mask, s)

    def gated(self, activation: Any, x: Tensor) -> Tensor:
        return self.kernels.silu_gated(x)
