"""A target's forward in fewer operations, for decoders of Llama's kind.

One new token of a small model costs as much for launching operations as for arithmetic. Here a
layer's q, k and v come from one product, gate and up from another, positions are rotated for
queries and keys together by tables made once, queries that share a key's head are rows of one
attention (nothing is repeated), and residuals are added by the products that make them. The weights
are not copied: the model's own become views of the joined ones, so it computes what it did before.
Only what several rows read faster packed (`redrafter/products.py`) is a second copy, of layers of
up to 2 GiB.

Equal to the class's own forward up to rounding, which `probe.py` tries at load. A forward in which
somebody looks into the model or replaces a part of it (hooks, skipped attentions) is left to the
class. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from redrafter.contracts import InputError
from redrafter.products import PackedProduct, copy_bytes, prefers_columns

#: model_type of the classes whose layers are h + attention(norm(h)), then h + mlp(norm(h)), with
#: rotated halves, RMSNorms in float32 and a gated MLP
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
#: of `rope_type`: those whose rotation of a position is the same whatever the text's length
_FIXED = ("default", "linear", "llama3", "yarn")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")
#: bytes of layers above which none is packed, as what is packed is a second copy
_PACKED = 2 << 30


class Joined:
    """Linear maps of one input as one product, whose rows their weights become views of.

    Of a single map it is that map's own weight. Where products want it so, columns lie together in
    memory instead of rows, of the model's weights too.

    packs: whether there may be a second copy, packed for several rows
    """

    def __init__(self, maps: list[nn.Linear], packs: bool):
        self.bias = _join([m.bias for m in maps], columns=False)
        weights = [m.weight for m in maps]
        matrix = _join(weights, columns=True)  # (out, in)
        if not matrix.is_contiguous():
            for part in maps:
                part.register_state_dict_post_hook(_in_rows)
        self.product = PackedProduct(matrix, packs, weights)
        self.columns = matrix.t()

    def __call__(self, x: Tensor) -> Tensor:
        """(R, in) -> (R, out)"""
        if len(x) >= self.product.least_rows:
            return self.product(x, self.bias)
        if self.bias is None:
            return torch.mm(x, self.columns)
        return torch.addmm(self.bias, x, self.columns)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the product; (R, out)."""
        # Below float32 the sum would be rounded once where the class rounds twice.
        once = self.bias is None and x.dtype.itemsize >= 4
        if once and len(x) < self.product.least_rows:
            return torch.addmm(residual, x, self.columns)
        return residual + self(x)


def _join(parts: list[Tensor | None], columns: bool) -> Tensor | None:
    """Tensors one below the other, which they become views of. columns: see `Joined`"""
    if parts[0] is None:
        return None
    joined = parts[0].detach() if len(parts) == 1 else torch.cat([p.detach() for p in parts])
    if columns and prefers_columns(joined):
        joined = joined.t().contiguous().t()
    for part, view in zip(parts, joined.split([len(p) for p in parts]), strict=True):
        part.data = view
    return joined


def _in_rows(part: nn.Linear, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook: who writes files need not know of weights whose columns lie together."""
    state[f"{prefix}weight"] = state[f"{prefix}weight"].contiguous()


@dataclass(frozen=True)
class _Layer:
    """What a decoder layer computes with. mask: the name of its masks where there are several"""

    norm: nn.Module
    qkv: Joined
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out: Joined
    mlp_norm: nn.Module
    gate_up: Joined
    activation: Any
    down: Joined
    mask: str


class FusedForward:
    """The decoder of a model for which `cannot_fuse` knows no reason.

    Same arguments as the class's own, by place; returns (B, N, H) after the final norm.
    """

    def __init__(self, backbone: nn.Module, config: Any):
        attention = backbone.layers[0].self_attn
        self.backbone = backbone
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        kinds = getattr(config, "layer_types", None) or [""] * len(backbone.layers)
        with torch.inference_mode(False):  # the model's weights stay ordinary tensors
            maps = _linear_maps(backbone)
            packs = _packs(maps)
            pairs = zip(backbone.layers, kinds, strict=True)
            self.layers = [_layer(layer, kind, packs) for layer, kind in pairs]
        self._parts = [vars(part) for part in backbone.modules()]
        self._children = [(part["_modules"], dict(part["_modules"])) for part in self._parts]
        self._children = [pair for pair in self._children if pair[1]]
        self._joined = [(m._parameters, m.weight.data_ptr()) for m in maps]
        self._tables: tuple[Tensor, Tensor] | None = None

    @property
    def untouched(self) -> bool:
        """Whether every part of the model still runs its class's own code, seen by nobody, with the
        weights that were joined (a copy of the model, or one in another dtype, has others)."""
        for parameters, place in self._joined:
            if parameters["weight"].data_ptr() != place:
                return False
        for now, joined in self._children:
            if now != joined:  # an adapter, or whatever stands in a part's place
                return False
        for part in self._parts:
            if part["_forward_hooks"] or part["_forward_pre_hooks"] or "forward" in part:
                return False
        return True

    def renew(self) -> None:
        """Before a text begins: see `PackedProduct.renew`."""
        for layer in self.layers:
            for joined in (layer.qkv, layer.out, layer.gate_up, layer.down):
                joined.product.renew()

    def __call__(
        self, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor], cache: Cache
    ) -> Tensor:
        batch, n = tokens.shape
        backbone, heads, kv_heads, dim = self.backbone, self.heads, self.kv_heads, self.head_dim
        groups = heads // kv_heads
        x = backbone.embed_tokens(tokens).view(batch * n, -1)
        cos, sin = self._rotations(positions, cache)
        several = isinstance(masks, dict)
        given = masks if several else {"": masks}
        rows = {name: _for_groups(mask, groups) for name, mask in given.items()}
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(_normed(layer.norm, x)).view(batch, n, heads + 2 * kv_heads, dim)
            qk = qkv[:, :, : heads + kv_heads]
            if layer.q_norm is not None:
                q, k = qk.split((heads, kv_heads), 2)
                qk = torch.cat([_normed(layer.q_norm, q), _normed(layer.k_norm, k)], 2)
            # (x1, x2) cos + (-x2, x1) sin; the sign is in the table
            qk = (qk * cos).addcmul_(qk.roll(dim // 2, -1), sin)
            keys, values = cache.update(
                qk[:, :, heads:].transpose(1, 2),
                qkv[:, :, heads + kv_heads :].transpose(1, 2),
                i,
            )
            q = qk[:, :, :heads].view(batch, n, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
            seen = F.scaled_dot_product_attention(
                q.reshape(batch, kv_heads, groups * n, dim), keys, values,
                rows[layer.mask if several else ""], scale=self.scale,
            )  # fmt: skip
            seen = seen.view(batch, kv_heads, groups, n, dim).permute(0, 3, 1, 2, 4)
            x = layer.out.added_to(x, seen.reshape(batch * n, heads * dim))
            gate, up = layer.gate_up(_normed(layer.mlp_norm, x)).chunk(2, -1)
            x = layer.down.added_to(x, layer.activation(gate).mul_(up))
        return _normed(backbone.norm, x).view(batch, n, -1)

    def _rotations(self, positions: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """cos and sin (B, N, 1, d) at positions (B, N), which are those of keys in the cache; the
        class's own numbers, the first half of sin negated."""
        if self._tables is None or len(self._tables[0]) < cache.get_max_cache_shape():
            known = 1 << (cache.get_max_cache_shape() - 1).bit_length()
            every = torch.arange(known, device=positions.device)[None]
            like = self.backbone.embed_tokens.weight[:1, :1]
            cos, sin = (x[0].clone() for x in self.backbone.rotary_emb(like, every))
            sin[:, : self.head_dim // 2].neg_()
            self._tables = (cos, sin)
        return tuple(F.embedding(positions, table)[:, :, None] for table in self._tables)


def choose_forward(target: Any, wanted: str, check: Callable[[Any], None]) -> None:
    """`check` a target and give it the forward that is wanted (`TargetConfig.forward`).

    Its class's own is checked whatever is wanted, as it stands in where the fused one steps aside.
    Raises InputError where `fused` was asked for by name and there is none, or it computes
    something else; `auto` then leaves the class's own.
    """
    why = cannot_fuse(target.model, target.backbone, target.config)
    if wanted == "fused" and why is not None:
        raise InputError(f"target.forward fused: {target.name} has none, as {why}; leave it out")
    check(target)
    if wanted == "model" or why is not None:
        return
    target.fused = FusedForward(target.backbone, target.config)
    try:
        check(target)
    except InputError:
        if wanted == "fused":
            raise
        target.fused = None


def cannot_fuse(model: nn.Module, backbone: nn.Module, config: Any) -> str | None:
    """Why a model is no decoder of Llama's kind, built as transformers builds it; None: it is.

    backbone: what gives the hidden states; config: the (text) configuration
    """
    kind = config.model_type
    if kind not in KNOWN:
        return f"model_type {kind!r} is not one of {', '.join(KNOWN)}"
    home = f"transformers.models.{kind}.modeling_{kind}"
    ours = [m for m in backbone.modules() if not type(m).__module__.startswith("torch.nn.")]
    foreign = next((m for m in ours if type(m).__module__ not in _homes(home)), None)
    if foreign is not None:
        return f"its {type(foreign).__name__} is not transformers' own"
    if type(backbone).__module__ != home:
        return f"its {type(backbone).__name__} is not {kind}'s decoder"
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return f"its attention is {config._attn_implementation!r}, not 'sdpa'"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _FIXED or rope.get("partial_rotary_factor", 1) != 1:
        return f"its rotation of positions, {rope!r}, is of a kind of its own"
    if hasattr(model, "hf_device_map"):
        return "its layers lie in several places"
    maps = [m for m in backbone.modules() if isinstance(m, nn.Linear)]
    if any(type(m) is not nn.Linear for m in maps) or len(maps) != 7 * len(backbone.layers):
        return "its linear maps are not plain ones (an adapter, or quantised)"
    if len({p.dtype for p in backbone.parameters()}) > 1:
        return "its weights are of several dtypes"
    return None


def _homes(home: str) -> tuple[str, ...]:
    return (home, "transformers.activations")


def _linear_maps(backbone: nn.Module) -> list[nn.Linear]:
    return [m for m in backbone.modules() if isinstance(m, nn.Linear)]


def _packs(maps: list[nn.Linear]) -> bool:
    """Whether a second copy of what several rows are multiplied by is worth its memory."""
    return sum(m.weight.nbytes for m in maps) <= _PACKED


def _together(layer: nn.Module) -> tuple[list[nn.Linear], ...]:
    """A decoder layer's maps, those of one input together: q, k and v; out; gate and up; down."""
    a, m = layer.self_attn, layer.mlp
    return (
        [getattr(a, name) for name in _PROJECTIONS], [a.o_proj],
        [getattr(m, name) for name in _GATED], [m.down_proj],
    )  # fmt: skip


def packed_bytes(backbone: nn.Module) -> int:
    """Of the second copies that a `FusedForward` keeps of its layers' weights in float32 on a CPU.
    backbone: of a model that has one (`cannot_fuse`), with content or without"""
    if not _packs(_linear_maps(backbone)):
        return 0
    groups = [maps for layer in backbone.layers for maps in _together(layer)]
    return sum(copy_bytes(sum(m.weight.numel() for m in maps)) for maps in groups)


def _layer(layer: nn.Module, kind: str, packs: bool) -> _Layer:
    a, m = layer.self_attn, layer.mlp
    qkv, out, gate_up, down = (Joined(maps, packs) for maps in _together(layer))
    return _Layer(
        norm=layer.input_layernorm,
        qkv=qkv,
        q_norm=getattr(a, "q_norm", None),
        k_norm=getattr(a, "k_norm", None),
        out=out,
        mlp_norm=layer.post_attention_layernorm,
        gate_up=gate_up,
        activation=m.act_fn,
        down=down,
        mask=kind,
    )


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, in float32 whatever the dtype, as the classes do."""
    weight = norm.weight
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)
    return weight * F.rms_norm(x.float(), weight.shape, eps=norm.variance_epsilon).to(x.dtype)


def _for_groups(mask: Tensor, groups: int) -> Tensor:
    """(B, 1, N, S) -> (B, 1, groups * N, S): each group's queries are rows of their own."""
    if mask.shape[2] == 1:
        return mask.expand(-1, -1, groups, -1)
    return mask.repeat(1, 1, groups, 1)
