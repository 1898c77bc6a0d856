"""The norm between a model's last layer and lm_head, found by looking, and undone where it can be.

Other toolkits keep the stream that the last layer leaves; what feeds lm_head, and what a head of
ours reads, is that stream behind the norm. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from redrafter.contracts import InputError
from redrafter.targets.adapters import probe_tokens
from redrafter.targets.model import Target

_PROBED = 8  # tokens
# How far norm(undone) may be from what was undone, relatively: a few roundings to the dtype
_ROUNDINGS, _INNER = 8.0, torch.float32
_LARGE, _SMALL = 1024.0, 2.0**-10  # constants beside which epsilon is nothing, and beside which not


@torch.inference_mode()
def final_norm(target: Target) -> nn.Module:
    """The module whose input is what the last layer gives, and whose output feeds lm_head.

    Raises InputError for a model that has none: its last layer's stream says too little there.
    """
    ids = probe_tokens(target.vocab_size, min(_PROBED, target.max_positions or _PROBED))
    seen: list[tuple[nn.Module, Any, Any]] = []
    backbone = target.backbone
    watched = [m for m in backbone.modules() if m is not backbone]
    hooks = [
        m.register_forward_hook(lambda m, given, out: seen.append((m, given[:1], out)))
        for m in watched
    ]
    try:
        states = target.pick(target.states(ids.to(target.device)), ())
    finally:
        for hook in hooks:
            hook.remove()
    layers = [_first(out) for m, _, out in seen if _is_layer(backbone, m)]
    for module, given, out in reversed(seen):
        if layers and _same(_first(out), states) and given and _same(_first(given), layers[-1]):
            return module
    raise InputError(
        f"{target.name}: no norm stands between its last layer and lm_head alone, so that the "
        "stream that other toolkits store is not what a head reads here"
    )


def undo(norm: nn.Module, states: Tensor) -> Tensor:
    """(..., H) a stream that the norm turns into `states`.

    y = w x / sqrt(mean(x^2) + eps) has the direction of y / w, and of its length as much is known
    as eps lets through. w and eps are read off the norm's own answers to constants. Raises
    InputError for a norm that is none of this kind (it takes a mean away, or adds a bias).
    """
    ones = torch.ones_like(states[..., :1, :])
    weight = norm(ones * _LARGE).double()
    damped = (norm(ones * _SMALL).double() / weight).nanmedian().clamp(1e-12, 1.0)
    epsilon = _SMALL**2 * (1 / damped**2 - 1)
    direction = states.double() / weight
    missing = (1 - direction.square().mean(-1, keepdim=True)).clamp(min=1e-6 * epsilon + 1e-300)
    stream = (direction * (epsilon / missing).sqrt().clamp(min=1e-3)).to(states.dtype)
    error = (norm(stream) - states).double().norm() / states.double().norm().clamp(min=1e-300)
    # Most norms compute in float32, whatever they are given.
    if not bool(error <= _ROUNDINGS * max(torch.finfo(d).eps for d in (states.dtype, _INNER))):
        raise InputError(
            f"the target's final norm ({type(norm).__name__}) cannot be undone: a stream made from "
            f"the states differs by {float(error):.2g} behind it"
        )
    return stream


def _first(value: Any) -> Tensor | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, Tensor) else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _is_layer(backbone: nn.Module, module: nn.Module) -> bool:
    """Whether it stands in a list of layers."""
    lists = (m for m in backbone.modules() if isinstance(m, nn.ModuleList))
    return any(module is layer for layers in lists for layer in layers)
