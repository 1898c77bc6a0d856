"""A target's forward in fewer operations, for decoders of Llama's kind.

One new token of a small model costs as much for launching operations as for arithmetic. Here a
layer's q, k and v come from one product, gate and up from another, positions are rotated for
queries and keys together by tables made once, queries that share a key's head are rows of one
attention (nothing is repeated), and residuals are added by the products that make them. The weights
are not copied: the model's own become views of the joined ones, so it computes what it did before.
Only what several rows read faster packed (`redrafter/products.py`) is a second copy, of layers of
up to 2 GiB. By kernels a bfloat16 target's layers compute in float32 between the weights and the
keys and values, which stay bfloat16: what the class rounds after every operation is not rounded.

Equal to the class's own forward up to rounding, which `probe.py` tries at load. A forward in which
somebody looks into the model or replaces a part of it (hooks, skipped attentions) is left to the
class. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from redrafter.contracts import InputError
from redrafter.products import PackedProduct, copy_bytes, multiplier_for, prefers_columns
from redrafter.targets.cache import RowCache
from redrafter.targets.fused_layers import LayersInOneCall
from redrafter.targets.fused_steps import KernelSteps, Tables, TorchSteps, Wide

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
    wide: float32 copies, of a bias that kernels add
    """

    def __init__(self, maps: list[nn.Linear], packs: bool, wide: Wide):
        self.bias, self.wide = _join([m.bias for m in maps], columns=False), wide
        weights = [m.weight for m in maps]
        matrix = _join(weights, columns=not (packs and multiplier_for(weights[0])))  # (out, in)
        if not matrix.is_contiguous():
            for part in maps:
                part.register_state_dict_post_hook(_in_rows)
        self.product = PackedProduct(matrix, packs, weights, always=True)
        self.columns = matrix.t()

    def __call__(self, x: Tensor) -> Tensor:
        """(R, in) -> (R, out)"""
        panels = self.product.panels
        if panels is not None and torch.is_inference_mode_enabled():
            return panels(x, self.wide(self.bias))
        if len(x) >= self.product.least_rows:
            return self.product(x, self.wide(self.bias) if x.dtype is torch.float32 else self.bias)
        if self.bias is None:
            return torch.mm(x, self.columns)
        return torch.addmm(self.bias, x, self.columns)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the product; (R, out)."""
        panels = self.product.panels
        if panels is not None and self.bias is None and torch.is_inference_mode_enabled():
            return panels(x, residual)
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

    Same arguments as the class's own, by place, and layers to show (`aux_layers.py`); returns
    (B, N, (1 + n) H), of which the first H are those after the final norm.
    """

    def __init__(self, backbone: nn.Module, config: Any):
        attention = backbone.layers[0].self_attn
        self.backbone = backbone
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.dtype = backbone.embed_tokens.weight.dtype
        kinds = getattr(config, "layer_types", None) or [""] * len(backbone.layers)
        with torch.inference_mode(False):  # the model's weights stay ordinary tensors
            maps = _linear_maps(backbone)
            packs, self.wide = _packs(maps, config), Wide()
            pairs = zip(backbone.layers, kinds, strict=True)
            self.layers = [_layer(layer, kind, packs, self.wide) for layer, kind in pairs]
        self._parts = [vars(part) for part in backbone.modules()]
        self._children = [(part["_modules"], dict(part["_modules"])) for part in self._parts]
        self._children = [pair for pair in self._children if pair[1]]
        read = maps if self.dtype.itemsize >= 4 else [*maps, *_norms(backbone)]
        self._joined = [(m._parameters, m.weight.data_ptr()) for m in read]
        #: how often weights were changed in place, where torch counts it
        self._changes, self._uncounted = 0, any(m.weight.is_inference() for m in read)
        tables = Tables(backbone, self.head_dim)
        self.steps = TorchSteps(tables, attention.scaling, self.heads // self.kv_heads)
        #: where there are kernels for it, in inference mode
        self.own_steps: KernelSteps | None = None
        own = multiplier_for(backbone.embed_tokens.weight)
        if own is not None and packs and config.hidden_act in KernelSteps.ACTIVATIONS:
            self.own_steps = KernelSteps(own, tables, attention.scaling, self.wide)
            self.in_one_call = LayersInOneCall(
                own, self.layers, self.wide, self.heads, self.kv_heads, self.head_dim
            )

    def new_cache(self, n_layers: int, n_rows: int, capacity: int) -> RowCache:
        """See `Target.new_cache`."""
        return RowCache(n_layers, n_rows, capacity, self.backbone.embed_tokens.weight.device)

    @property
    def widens(self) -> bool:
        """Whether kernels compute in float32 what its class computes in bfloat16, in several times
        their time."""
        return self.own_steps is not None and self.dtype.itemsize < 4

    @property
    def untouched(self) -> bool:
        """Whether every part of the model still runs its class's own code, seen by nobody, with the
        weights that were joined (a copy of the model, or one in another dtype, has others). Asked
        before every forward: where their values have changed, copies of them are made anew."""
        changes = 0
        for parameters, place in self._joined:
            weight = parameters["weight"]
            if weight.data_ptr() != place:
                return False
            changes += 0 if self._uncounted else weight._version
        for now, joined in self._children:
            if now != joined:  # an adapter, or whatever stands in a part's place
                return False
        for part in self._parts:
            if part["_forward_hooks"] or part["_forward_pre_hooks"] or "forward" in part:
                return False
        if changes != self._changes:
            self._changes = changes
            self.renew(surely=True)
        return True

    def renew(self, surely: bool = False) -> None:
        """Before a text begins, or where weights have changed: see `PackedProduct.renew`."""
        self.wide.forget()
        for layer in self.layers:
            for joined in (layer.qkv, layer.out, layer.gate_up, layer.down):
                joined.product.renew(surely)

    def __call__(
        self, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor], cache: Cache,
        shown: Sequence[int] = (),
    ) -> Tensor:  # fmt: skip
        batch, n = tokens.shape
        backbone, heads, kv_heads, dim = self.backbone, self.heads, self.kv_heads, self.head_dim
        x = backbone.embed_tokens(tokens).view(batch * n, -1)
        own = self.own_steps is not None and torch.is_inference_mode_enabled()
        if own:
            x = x.float()
        steps = (self.own_steps if own else self.steps).begin(tokens, positions, masks, cache)
        masks = steps.masks
        kept = []
        done = own and not shown and self.in_one_call(x, steps, masks, cache)
        for i, layer in enumerate(() if done else self.layers):
            if i in shown:
                kept.append(x)
            mask = masks[layer.mask] if isinstance(masks, dict) else masks
            qkv = layer.qkv(steps.norm(layer.norm, x)).view(batch, n, heads + 2 * kv_heads, dim)
            qk = qkv[:, :, : heads + kv_heads]
            if layer.q_norm is not None:
                q, k = qk.split((heads, kv_heads), 2)
                qk = torch.cat([steps.norm(layer.q_norm, q), steps.norm(layer.k_norm, k)], 2)
            qk = steps.rotate(qk)
            keys, values = cache.update(
                qk[:, :, heads:].to(self.dtype).transpose(1, 2),
                qkv[:, :, heads + kv_heads :].to(self.dtype).transpose(1, 2),
                i,
            )
            seen = steps.attend(qk[:, :, :heads], keys, values, mask)
            x = layer.out.added_to(x, seen)
            act = steps.gated(layer.activation, layer.gate_up(steps.norm(layer.mlp_norm, x)))
            x = layer.down.added_to(x, act)
        last = steps.norm(backbone.norm, x)
        last = torch.cat([last, *kept], -1) if kept else last
        return last.to(self.dtype).view(batch, n, -1)


def choose_forward(
    target: Any,
    wanted: str,
    check: Callable[[Any], None],
    make: Callable[[nn.Module, Any], FusedForward] = FusedForward,
) -> None:
    """`check` a target and give it the forward that is wanted (`TargetConfig.forward`).

    Its class's own is checked whatever is wanted, as it stands in where the fused one steps aside.
    make: of a backbone and its configuration, that forward
    Raises InputError where one was asked for by name and there is none, or it computes something
    else; `auto` then leaves the class's own.
    """
    why = cannot_fuse(target.model, target.backbone, target.config)
    by_name = wanted not in ("auto", "model")
    if by_name and why is not None:
        raise InputError(
            f"target.forward {wanted}: {target.name} has none, as {why}; leave it out"
        )
    check(target)
    if wanted == "model" or why is not None:
        return
    target.fused = make(target.backbone, target.config)
    try:
        check(target)
    except InputError:
        if by_name:
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


def _norms(backbone: nn.Module) -> list[nn.Module]:
    return [m for m in backbone.modules() if hasattr(m, "variance_epsilon")]


def _packs(maps: list[nn.Linear], config: Any) -> bool:
    """Whether a second copy of what several rows are multiplied by is worth its memory; of
    bfloat16, only where kernels make every step."""
    if maps[0].weight.dtype.itemsize < 4 and config.hidden_act not in KernelSteps.ACTIVATIONS:
        return False
    return sum(m.weight.nbytes for m in maps) <= _PACKED


def _together(layer: nn.Module) -> tuple[list[nn.Linear], ...]:
    """A decoder layer's maps, those of one input together: q, k and v; out; gate and up; down."""
    a, m = layer.self_attn, layer.mlp
    return (
        [getattr(a, name) for name in _PROJECTIONS], [a.o_proj],
        [getattr(m, name) for name in _GATED], [m.down_proj],
    )  # fmt: skip


def packed_bytes(backbone: nn.Module, config: Any) -> int:
    """Of the second copies that a `FusedForward` keeps of its layers' weights on a CPU.
    backbone: of a model that has one (`cannot_fuse`), with content or without; config: its own"""
    if not _packs(_linear_maps(backbone), config):
        return 0
    groups = [[m.weight for m in maps] for layer in backbone.layers for maps in _together(layer)]
    return sum(copy_bytes(sum(w.numel() for w in g), g[0].dtype, always=True) for g in groups)


def _layer(layer: nn.Module, kind: str, packs: bool, wide: Wide) -> _Layer:
    a, m = layer.self_attn, layer.mlp
    qkv, out, gate_up, down = (Joined(maps, packs, wide) for maps in _together(layer))
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
