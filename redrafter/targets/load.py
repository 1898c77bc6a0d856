"""A target from a folder or the Hub: whole, merged with an adapter, in parts or in places; and what
is known of it without its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.products import use_kernels
from redrafter.targets.adapters import CONFIG, Adapter, apply_adapter, find_adapter
from redrafter.targets.checkpoint import load_complete
from redrafter.targets.devices import pick_device
from redrafter.targets.fused import FusedForward, choose_forward
from redrafter.targets.graphs import GraphForward
from redrafter.targets.invariant import make_invariant
from redrafter.targets.layers import eos_of
from redrafter.targets.model import Target
from redrafter.targets.offload import check_alone, load_in_places
from redrafter.targets.passed import check_once, files_of
from redrafter.targets.paths import OWN_CODE, check_path, said
from redrafter.targets.precision import auto_dtype, widen_logits
from redrafter.targets.sharding import ShardedBackbone, check_launch, load_split
from redrafter.targets.text import load_tokenizer


def load_target(config: TargetConfig | str, may_shard: bool = False) -> Target:
    """Load a target and its tokenizer; an adapter's folder gives its base with the adapter merged
    (see `redrafter.targets.adapters`). Raises InputError naming the path when it is not one.

    may_shard: the caller's processes all make the target's forwards together
    """
    config = TargetConfig(path=config) if isinstance(config, str) else config
    if config.shard != "none" and not may_shard:
        raise InputError(
            f"target.shard {config.shard} is for train/redrafter.py alone: here every process "
            "works at its own pace with the whole target. Leave it out"
        )
    adapter = find_adapter(config)
    whole = config if adapter is None else adapter.base_config(config)
    path = check_path(whole)
    device = pick_device(config.device)
    use_kernels(device)
    mapped = config.device_map != "none"
    files = [None if mapped else files_of(path, whole.revision)]
    files += [] if adapter is None else [files_of(str(adapter.folder))]
    model, backbone = _read_model(config, whole, adapter, path, device)
    if backbone is not None:
        target = Target(model, name=config.path, backbone=backbone, **_tokenizer(config))
        target.fingerprint(), target.digests()  # now, while all processes are here
        return target
    model = model if mapped else model.to(device)
    parts = None
    if adapter is not None:
        model, parts = apply_adapter(model, adapter)
    check = partial(
        choose_forward, wanted=config.forward, check=partial(check_once, files=files),
        make=GraphForward if config.forward == "graphs" else FusedForward,
    )  # fmt: skip
    target = Target(model, name=config.path, parts=parts, check=check, **_tokenizer(config))
    if config.logits == "float32":
        widen_logits(target)
    if config.exact == "invariant":
        make_invariant(target)
    return target


def _read_model(
    config: TargetConfig,
    whole: TargetConfig,
    adapter: Adapter | None,
    path: str,
    device: torch.device,
) -> tuple[Any, ShardedBackbone | None]:
    """The model in `path`, on the CPU unless it is to be in parts or in places, and what processes
    share of it. whole: as `config`, but with an adapter its base's"""
    dtype: Any = config.dtype
    if dtype == "auto":
        dtype = auto_dtype(device, lambda: load_model_config(config)) or "auto"
    kwargs: dict[str, Any] = dict(OWN_CODE)
    if config.attention != "auto":
        kwargs["attn_implementation"] = config.attention
    shard, mapped, revision = config.shard != "none", config.device_map != "none", whole.revision
    if shard or mapped:
        shape = load_model_config(config)
        known = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, shape.dtype)
        known = known or torch.float32
        check_launch(adapter is not None, known) if shard else check_alone(adapter is not None)
    try:
        if shard:
            return load_split(path, shape, known, device, revision=revision, **kwargs)
        if mapped:
            return load_in_places(path, config, shape, known, device, kwargs, revision), None
        return load_complete(path, dtype=dtype, revision=revision, **kwargs), None
    except InputError:
        raise
    except Exception as error:
        # What a bad checkpoint raises depends on what is bad in it (OSError, safetensors'
        # own class, KeyError, ...): the folder's name is what all of them lack.
        raise InputError(
            f"target.path: cannot load {path!r}{_named_by(adapter)} as a causal LM: {said(error)}"
        ) from error


def _named_by(adapter: Adapter | None) -> str:
    if adapter is None:
        return ""
    file = adapter.folder / CONFIG
    return f", the base of {file} (correct base_model_name_or_path there, or give target.base),"


def _tokenizer(config: TargetConfig) -> dict[str, Any]:
    """A target's tokenizer or, as token ids work without, the error of whoever needs text."""
    try:
        return {"tokenizer": load_tokenizer(config)}
    except InputError as error:
        return {"tokenizer_error": error}


def load_model_config(config: TargetConfig) -> Any:
    """A target's transformers configuration, without its weights; with an adapter, the base's."""
    from transformers import AutoConfig

    adapter = find_adapter(config)
    whole = config if adapter is None else adapter.base_config(config)
    try:
        found = AutoConfig.from_pretrained(check_path(whole), revision=whole.revision, **OWN_CODE)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"target.path: {whole.path!r}{_named_by(adapter)} cannot be read ({said(error)})"
        ) from None
    if adapter is not None and adapter.vocab_rows is not None:
        found.get_text_config().vocab_size = adapter.vocab_rows
    return found


def load_eos(config: TargetConfig, model_config: Any) -> set[int]:
    """The tokens that end a target's texts, without its weights. model_config: its configuration"""
    from transformers import GenerationConfig

    adapter = find_adapter(config)
    whole = config if adapter is None else adapter.base_config(config)
    try:
        settings = GenerationConfig.from_pretrained(check_path(whole), revision=whole.revision)
    except OSError:  # a model need not have any
        settings = None
    return eos_of(settings, model_config.get_text_config())
