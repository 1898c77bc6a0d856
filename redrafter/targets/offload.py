"""A target larger than the device of one process: `target.device_map auto`.

accelerate puts as many layers on the device as fit, others into host memory, the rest stays in the
checkpoint's files, and brings each layer to the device in every forward pass. The embedding and
lm_head are always on the device: drafting and training use both in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.processes import launched
from redrafter.targets.checkpoint import load_complete

Place = int | str  # an accelerator's number (or "mps"), "cpu", "disk"


def check_alone(adapter: bool) -> None:
    """Raises InputError where the target's layers cannot lie outside of the device."""
    if launched() > 1:
        raise InputError(
            f"target.device_map auto is for one process, {launched()} were launched: take "
            "target.shard zero3, with which they share the layers"
        )
    if adapter:
        raise InputError(
            "target.device_map auto cannot take an adapter's folder, for merging takes whole "
            "weights: merge it once (peft's merge_and_unload, then save_pretrained), give that "
            "folder"
        )


def layers_to_places(meta: Any, config: TargetConfig, device: torch.device) -> dict[str, Place]:
    """Name of a part of the model -> where its weights are to lie.

    meta: the model on the meta device; device: that it computes on
    Raises InputError where the device has no room for the embedding and lm_head.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_max_memory

    main = place_of(device)
    free = get_max_memory()
    room = {"cpu": free["cpu"] if config.host_bytes is None else config.host_bytes}
    if main != "cpu":  # accelerate fills them in this order
        room = {main: free[main] if config.device_bytes is None else config.device_bytes, **room}
    if _bytes(meta) <= room[main]:
        return {"": main}
    vocabulary = _vocabulary(meta)
    needed = _bytes(*vocabulary.values())
    key = "host_bytes" if main == "cpu" else "device_bytes"
    too_little = InputError(
        f"target.{key}: the embedding, lm_head ({needed} bytes together) and the layer that is at "
        f"work are always on {device}, and {room[main]} bytes of it may be used: raise it, or take "
        "a smaller target"
    )
    if room[main] <= needed:
        raise too_little
    # The embedding comes first in any case; an lm_head of its own would come last.
    room[main] -= needed - _bytes(meta.get_input_embeddings())
    found = infer_auto_device_map(
        meta, room, no_split_module_classes=list(meta._no_split_modules or ())
    )
    if "" in found:  # everything in one place, which is not the device
        raise too_little
    return {**found, **dict.fromkeys(vocabulary, main)}


def _bytes(*modules: nn.Module) -> int:
    """Of their weights; those used twice count once."""
    return sum(p.nbytes for p in {p for m in modules for p in m.parameters()})


def place_of(device: torch.device) -> Place:
    """accelerate's name of it."""
    if device.type in ("cpu", "mps"):
        return device.type
    return torch.accelerator.current_device_index() if device.index is None else device.index


def _vocabulary(model: Any) -> dict[str, nn.Module]:
    """Name -> the embedding and lm_head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if any(m is w for w in wanted)}


def bytes_by_place(model: nn.Module, places: dict[str, Place]) -> dict[Place, int]:
    """Of the weights; those used twice count once."""
    found: dict[Place, int] = {}
    for name, parameter in model.named_parameters():
        part = max((p for p in places if not p or f"{name}.".startswith(f"{p}.")), key=len)
        found[places[part]] = found.get(places[part], 0) + parameter.nbytes
    return found


def load_in_places(
    path: str, config: TargetConfig, shape: Any, dtype: torch.dtype, device: torch.device,
    attention: dict[str, str], revision: str | None,
) -> Any:  # fmt: skip
    """`from_pretrained` with accelerate's hooks that bring layers to the device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(shape, dtype=dtype, **attention)
    meta.tie_weights()
    return load_complete(
        path, dtype=dtype, revision=revision, offload_folder=config.offload_folder,
        device_map=layers_to_places(meta, config, device), **attention,
    )  # fmt: skip


def reader(model: nn.Module) -> Callable[[Tensor], AbstractContextManager[Tensor]]:
    """Called on a parameter that the model has now: a context with its values, wherever they
    lie."""
    try:
        from accelerate.utils import align_module_device
    except ImportError:  # only where this file is used without the library
        raise InputError("a model with a device_map needs accelerate: pip install it") from None

    owners = {
        id(p): (module, name)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
    }

    @contextmanager
    def brought(parameter: Tensor) -> Iterator[Tensor]:
        module, name = owners[id(parameter)]
        with align_module_device(module):  # what comes is another object of the same name
            yield getattr(module, name)

    return brought
