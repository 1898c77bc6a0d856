"""Hidden states of other layers than the last, beside it: what a head with `aux_layers` reads.

A target that shows layers (a, b, ...) gives, wherever it gives hidden states, the last one, which
lm_head reads, and behind it those after a, b, ... decoder layers: (..., (1 + n) H). Layers are
counted as in transformers' `hidden_states` (0 would be the embeddings) and in vLLM's auxiliary
hidden states, which EAGLE-3 (arXiv 2503.01840) drafts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError

_PROBED = 2  # tokens that tell whether a class gives what its layers give


def show_layers(target: Any, layers: Sequence[int]) -> None:
    """From now on the target shows these layers, too, in ascending order.

    Raises InputError where it has no such layer, or its class does not give its layers' states.
    """
    wanted = tuple(sorted({*target.aux_layers, *layers}))
    if wanted == target.aux_layers:
        return
    start, last = f"head.aux_layers {list(layers)}: {target.name}", target.n_layers - 1
    if not all(1 <= layer <= last for layer in wanted):
        raise InputError(
            f"{start} has {target.n_layers} layers, of which 1 to {last} can be shown beside the "
            "last one's states: choose among these"
        )
    if target.sharded or target.has_states:
        why = "is shared out among processes" if target.sharded else "has recurrent layers"
        raise InputError(f"{start} {why}, and shows no layers but the last: leave it out")
    before, target.aux_layers = target.aux_layers, wanted
    if target.device.type == "meta":
        return
    ids = torch.zeros(1, _PROBED, dtype=torch.long, device=target.device)
    try:
        found = target.states(ids).shape[-1]
    except (TypeError, IndexError, RuntimeError) as error:
        target.aux_layers = before
        raise InputError(
            f"{start}: {type(target.model).__name__} does not give its layers' hidden states "
            f"({type(error).__name__}: {error}): leave it out"
        ) from error
    if found != target.state_size:
        target.aux_layers = before
        raise InputError(f"{start} has layers of another width than its last: leave it out")


def with_layers(backbone: Any, layers: Sequence[int], **inputs: Any) -> Tensor:
    """(B, N, (1 + n) H), by the class's own forward."""
    out = backbone(**inputs, output_hidden_states=True)
    last = out.last_hidden_state
    return torch.cat([last, *(out.hidden_states[a].to(last.device) for a in layers)], -1)


def picked(hidden: Tensor, shown: Sequence[int], layers: Sequence[int]) -> Tensor:
    """(..., (1 + n) H): of hidden states with those of the layers `shown`, the last one and those
    of some. hidden: (..., (1 + len(shown)) H)"""
    if tuple(layers) == tuple(shown):
        return hidden
    parts = hidden.unflatten(-1, (1 + len(shown), -1))
    if not layers:
        return parts[..., 0, :]
    return parts[..., [0, *(1 + shown.index(layer) for layer in layers)], :].flatten(-2)
