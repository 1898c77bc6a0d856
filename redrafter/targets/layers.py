"""What a configuration says of a model: its layers, which of them can be verified on, its context
and what ends its texts."""

from __future__ import annotations

from typing import Any

from redrafter.contracts import InputError

# Distances or windows that these compute from where a key lies in the cache (ALiBi, GPT-Neo's
# local attention, Doge's pruning), or a state that is no list of keys: masks cannot correct it.
_UNFIT = ("bloom", "mpt", "gpt_neo", "doge", "rwkv")
# What layers a configuration may name: attention whose keys can be masked; where there are mixers
# that keep their state in the cache (`recurrent.py`), these, and layers without either.
_ATTENTION = {"full_attention", "sliding_attention"}
_RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "moe", "mlp"}
_BESIDE = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}


def check_layers(target: Any) -> None:
    """Raises InputError where a layer's past can neither be masked nor kept as a state, or by an
    attention that takes no masks of single keys."""
    config, kind = target.config, target.config.model_type
    unknown = _kinds(config) - _ATTENTION
    alibi = getattr(config, "alibi", False)  # Falcon's first ones
    if target.verifies == "chains":
        unknown -= _RECURRENT
    if unknown or alibi or kind in _UNFIT:
        why = ", ".join(sorted(unknown)) or "ALiBi, windows of its own, or recurrence"
        raise InputError(
            f"{target.name}: {type(target.model).__name__}, model_type {kind!r}, has layers whose "
            f"keys cannot be masked one by one ({why}) and whose states, if any, are not in the "
            "cache where others' are; neither a token tree nor a chain can be verified on it"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa", "eager"):  # flash kernels take no mask of single keys
        raise InputError(
            f"{target.name}: attn_implementation {attention!r} cannot verify a token tree; load "
            "the model with attn_implementation='sdpa' (or 'eager')"
        )


def windows_of(config: Any) -> dict[str, int | None]:
    """Mask name -> window in tokens (None: all). One entry: the model takes a single mask."""
    kinds, window = _kinds(config), getattr(config, "sliding_window", None)
    if kinds & _RECURRENT:  # a state has no mask
        kinds = {_BESIDE.get(kind, kind) for kind in kinds} & _ATTENTION or {"full_attention"}
    if not kinds:
        return {"full_attention": None} if window is None else {"sliding_attention": window}
    return {k: window if k == "sliding_attention" else None for k in sorted(kinds)}


def _kinds(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def context_of(config: Any) -> int | None:
    """Tokens of context of a (text) configuration, None where there is no limit.

    LongRoPE (Phi-3) switches every row of a batch, keys in the cache apart, to other rotations
    when one row passes the original context; a row's text would then depend on its batch.
    """
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if part.get("rope_type") == "longrope":
            context = part["original_max_position_embeddings"]
    return context


def eos_of(settings: Any, config: Any) -> set[int]:
    """The tokens that end a model's texts. settings: a generation configuration, which comes first;
    config: the model's"""
    given = (getattr(c, "eos_token_id", None) for c in (settings, config))
    eos = next((found for found in given if found is not None), None)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
