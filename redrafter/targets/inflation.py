"""A model of a larger shape that computes what a small one computes, so that a forward costs what
the large shape costs and drafts are accepted as the small one accepts them. Ours.

Zeros are padded on, and what depends on a width is scaled:

  hidden width h -> H    the new columns of the residual stream are never written to. A mean of
                         squares shrinks by h/H: so norm weights times sqrt(h/H), and rms_norm_eps
                         times h/H
  heads                  new ones are not read by o_proj; a key-value head is repeated where the
                         new shape has fewer query heads to each
  head width d -> D      dimension j of either half of a rotation stays j of that half, and
                         rope_theta becomes theta^(D/d), which keeps its frequency theta^(-2j/d);
                         the scale 1/sqrt(D) of the scores is made up for by sqrt(D/d) in q
  q_norm, k_norm         have rms_norm_eps too, which changed: q_proj and k_proj times
                         sqrt(h/H D/d), the norm's weights times sqrt(d/D)
  MLP width, layers      zeros; a layer of zeros adds zero to the stream

Logits are equal up to rounding. The vocabulary stays: a row of zeros would be a token. Zeros cost
what other numbers cost, but less power: an accelerator may clock higher than with real weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError

#: model types whose layers are made of the tensors in `_AXES`, and whose norms are x * weight
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: rotations whose frequencies depend on theta^(-2j/d) alone
_ROPES = ("default", "linear", "llama3")

#: tensor of a layer (or behind and before all layers): the axes of its rows and columns
_AXES = {
    "embed_tokens.weight": (None, "hidden"),
    "lm_head.weight": (None, "hidden"),
    "norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("key", "hidden"),
    "self_attn.v_proj.weight": ("key", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("key",),
    "self_attn.v_proj.bias": ("key",),
    "self_attn.o_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
    "mlp.gate_proj.weight": ("mlp", "hidden"),
    "mlp.up_proj.weight": ("mlp", "hidden"),
    "mlp.down_proj.weight": ("hidden", "mlp"),
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.bias": ("mlp",),
    "mlp.down_proj.bias": ("hidden",),
}
_LAYER = "model.layers."


@dataclass(frozen=True)
class Shape:
    """The sizes that can grow, by their names in config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a transformers configuration. Raises InputError where it lacks a size."""
        heads = getattr(config, "num_attention_heads", None)
        known = {f.name: getattr(config, f.name, None) for f in fields(cls)}
        known["num_key_value_heads"] = known["num_key_value_heads"] or heads
        if known["head_dim"] is None and heads and known["hidden_size"]:
            known["head_dim"] = known["hidden_size"] // heads
        for name, value in known.items():
            if not isinstance(value, int):
                raise InputError(f"config.json has no {name}; give one of {', '.join(FAMILIES)}")
        return cls(**known)

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


def check(config: Any, new: Shape) -> None:
    """Raises InputError naming what hinders a model of this configuration from becoming `new`."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise InputError(
            f"model_type {kind!r} cannot be inflated; known here are {', '.join(FAMILIES)}"
        )
    old = Shape.of(config)
    for name, least in asdict(old).items():
        if getattr(new, name) < least:
            raise InputError(
                f"{name}: {getattr(new, name)} is less than the model's own {least}; give at least "
                "that"
            )
    if new == old:
        raise InputError("the shape is the model's own: give a larger hidden_size or another size")
    if new.num_attention_heads % new.num_key_value_heads:
        raise InputError(
            f"num_key_value_heads: {new.num_key_value_heads} must divide num_attention_heads, "
            f"{new.num_attention_heads}"
        )
    needed = old.num_key_value_heads * _copies(old, new)
    if needed > new.num_key_value_heads:
        raise InputError(
            f"num_key_value_heads: with {new.group} query heads to each, {needed} are needed to "
            f"hold the model's {old.num_attention_heads} query heads, which are {old.group} to "
            f"each; give at least {needed}, or more num_attention_heads"
        )
    _check_rope(config, old, new)


def _check_rope(config: Any, old: Shape, new: Shape) -> None:
    if new.head_dim == old.head_dim:
        return
    rope = config.rope_parameters
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if new.head_dim % 2 or kind not in _ROPES or part != 1.0:
        why = "must be even" if new.head_dim % 2 else f"would change rotations of type {kind!r}"
        raise InputError(f"head_dim: {new.head_dim} {why}; keep {old.head_dim}")


def inflated_config(config: Any, new: Shape, name: str) -> Any:
    """The configuration of the larger model; `inflated_from` in it says of what.

    name: the small model's, for people
    """
    old, made = Shape.of(config), copy.deepcopy(config)
    for field, value in asdict(new).items():
        setattr(made, field, value)
    made.rms_norm_eps = config.rms_norm_eps * old.hidden_size / new.hidden_size
    theta = config.rope_parameters["rope_theta"]
    made.rope_parameters = {
        **config.rope_parameters, "rope_theta": theta ** (new.head_dim / old.head_dim)
    }  # fmt: skip
    kinds = getattr(config, "layer_types", None)
    if kinds:
        more = new.num_hidden_layers - old.num_hidden_layers
        made.layer_types = [*kinds, *[kinds[-1]] * more]
    made.inflated_from = {"name": name, **asdict(old)}
    return made


def meta_weights(config: Any) -> dict[str, Tensor]:
    """Name -> tensor without storage, of every weight that a checkpoint of it holds."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return dict(model.named_parameters())  # a tied lm_head is the embedding


def inflated_weights(
    weights: Mapping[str, Tensor], config: Any, new: Shape, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of the larger model, one at a time.

    weights, config: the small model's; new: passed `check`
    Raises InputError naming a tensor that no family here has.
    """
    old = Shape.of(config)
    axes, factors = _axes(old, new), _factors(old, new, any("q_norm" in n for n in weights))
    for name in weights:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        made = _inflated(weights[name], _part(name), axes, factors, dtype)
        yield name, made
        if name.startswith(f"{_LAYER}0."):
            for layer in range(old.num_hidden_layers, new.num_hidden_layers):
                yield name.replace(f"{_LAYER}0.", f"{_LAYER}{layer}."), torch.zeros_like(made)


def inflate(model: Any, new: Shape, name: str, dtype: torch.dtype, device: Any = "cpu") -> Any:
    """The larger model in memory, for whoever measures it and keeps nothing. Raises InputError as
    `check` does."""
    from transformers import AutoModelForCausalLM

    check(model.config, new)
    config = inflated_config(model.config, new, name)
    with torch.device(device):
        large = AutoModelForCausalLM.from_config(config, dtype=dtype)
    places = dict(large.named_parameters())
    with torch.no_grad():
        for part, values in inflated_weights(model.state_dict(), model.config, new, dtype):
            places.pop(part).copy_(values)
    assert not places, f"nothing was written to {sorted(places)}"
    large.generation_config = copy.deepcopy(model.generation_config)
    return large.eval()


def said(config: Any) -> str | None:
    """What is to be said beside every figure of an inflated model; None of any other."""
    origin = getattr(config, "inflated_from", None)
    if not origin:
        return None
    return (
        f"inflated from {origin['name']}: its texts and what is accepted are those of a model "
        f"{origin['hidden_size']} wide with {origin['num_hidden_layers']} layers, its costs those "
        "of its own shape"
    )


# ---------------------------------------------------------------------------------- parts


def _part(name: str) -> str:
    """A tensor's name without where it stands."""
    if name.startswith(_LAYER):
        return name.removeprefix(_LAYER).split(".", 1)[1]
    return name.removeprefix("model.")


def _copies(old: Shape, new: Shape) -> int:
    """Key-value heads that one of the small model becomes."""
    return math.ceil(old.group / new.group)


def _axes(old: Shape, new: Shape) -> dict[str, Tensor]:
    """Axis -> for each index of the larger model, the small one's that stands there, -1 for none.
    A key-value head may stand in several places, everything else in one."""
    half, wide = old.head_dim // 2, new.head_dim // 2
    head = torch.full((new.head_dim,), -1)
    for side in range(2):
        head[side * wide : side * wide + half] = torch.arange(half) + side * half
    query = torch.full((new.num_attention_heads, new.head_dim), -1)
    key = torch.full((new.num_key_value_heads, new.head_dim), -1)
    for i in range(old.num_attention_heads):
        at, rest = divmod(i % old.group, new.group)
        at += i // old.group * _copies(old, new)  # the key-value head that it reads
        query[at * new.group + rest] = torch.where(head < 0, -1, head + i * old.head_dim)
        key[at] = torch.where(head < 0, -1, head + i // old.group * old.head_dim)
    return {
        "hidden": grown(old.hidden_size, new.hidden_size),
        "mlp": grown(old.intermediate_size, new.intermediate_size),
        "head": head,
        "query": query.flatten(),
        "key": key.flatten(),
    }


def _factors(old: Shape, new: Shape, head_norms: bool) -> dict[str, float]:
    """Part -> what it is multiplied with, where that is not 1."""
    width, heads = old.hidden_size / new.hidden_size, new.head_dim / old.head_dim
    norms = ("norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight")
    found = dict.fromkeys(norms, width**0.5)
    if head_norms:
        found["self_attn.k_norm.weight"] = heads**-0.5
        projections = {"q": (width * heads) ** 0.5, "k": (width * heads) ** 0.5}
    else:
        projections = {"q": heads**0.5}
    for which, factor in projections.items():
        for kind in ("weight", "bias"):
            found[f"self_attn.{which}_proj.{kind}"] = factor
    return found


def _inflated(
    values: Tensor,
    part: str,
    axes: Mapping[str, Tensor],
    factors: Mapping[str, float],
    dtype: torch.dtype,
) -> Tensor:
    if part not in _AXES:
        raise InputError(f"{part} has no place in the shapes known here; the model is not inflated")
    values = values.detach().cpu()
    if part in factors:
        values = values.double() * factors[part]
    return placed(values.to(dtype), *(axes.get(axis) for axis in _AXES[part]))


def grown(old: int, new: int) -> Tensor:
    """(new,) int64: what is there stays in front, and -1 stands for zeros behind."""
    index = torch.arange(new)
    return torch.where(index < old, index, -1)


def placed(values: Tensor, *sources: Tensor | None) -> Tensor:
    """The larger tensor. sources: per axis, the index of `values` that stands at each of its own,
    -1 for zeros; None leaves the axis as it is."""
    for axis, source in enumerate(sources):
        if source is not None:
            nothing = (source < 0).nonzero()[:, 0]
            values = values.index_select(axis, source.clamp(min=0)).index_fill_(axis, nothing, 0)
    return values.contiguous()
