"""Folders of an inflated target (`redrafter.targets.inflation`) and of a head that goes with it.

Ours.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.export.complete import complete
from redrafter.export.inflated_head import inflate_head
from redrafter.export.layouts import origin
from redrafter.files import new_folder, provenance, write_json, write_tensors
from redrafter.heads.base import DraftHead
from redrafter.heads.owner import belong_to
from redrafter.targets.inflation import (
    Shape,
    check,
    inflated_config,
    inflated_weights,
    meta_weights,
)
from redrafter.targets.model import Target

_SHARD_BYTES = 4_000_000_000


def empty_folder(option: str, path: str | Path) -> Path:
    """Raises InputError where something lies there already."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{option}: {path} exists; give a folder that does not, or an empty one")
    return path


def weights_bytes(config: Any, new: Shape, name: str, dtype: torch.dtype) -> tuple[int, int]:
    """(weights, bytes) of the model of this configuration in a larger shape. Raises InputError
    where it cannot be made."""
    check(config, new)
    found = sum(t.numel() for t in meta_weights(inflated_config(config, new, name)).values())
    return found, found * dtype.itemsize


def write_target(
    small: Target, new: Shape, out: str | Path, dtype: torch.dtype, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write the folder of a larger model that computes what `small` does, whole or not at all.

    dtype: of its weights; shard_bytes: of a file of weights, at most, but for a single tensor.
    One file's weights are held in memory at a time. Raises InputError where it cannot be made, or
    where the disk has not the room.
    """
    out, name = Path(out), small.name.rstrip("/").split("/")[-1]
    _, size = weights_bytes(small.config, new, name, dtype)
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    if size > (free := shutil.disk_usage(parent).free):
        raise InputError(
            f"out: {size / 1e9:.2f} GB of weights do not fit in {parent}, where {free / 1e9:.2f} "
            "GB are free; give another folder, or a smaller shape"
        )
    config = inflated_config(small.config, new, name)
    config.dtype = dtype
    with new_folder(out) as part:
        _write_weights(part, small, config, new, dtype, shard_bytes)
        config.save_pretrained(part)
        small.model.generation_config.save_pretrained(part)
        if small.tokenizer is not None:
            small.tokenizer.save_pretrained(part)
        write_json(part / "provenance.json", provenance(inflated_from=config.inflated_from,
                                                        of=small.fingerprint()))  # fmt: skip


def _write_weights(
    folder: Path, small: Target, config: Any, new: Shape, dtype: torch.dtype, most: int
) -> None:
    """`model.safetensors`, or shards and their index."""
    expected = {name: tuple(t.shape) for name, t in meta_weights(config).items()}
    made = inflated_weights(small.model.state_dict(), small.config, new, dtype)
    held: dict[str, Tensor] = {}
    shards: list[tuple[Path, dict[str, int]]] = []  # (file, bytes of each tensor in it)

    def flush() -> None:
        file = folder / f"shard-{len(shards)}.safetensors"
        write_tensors(file, held, {"format": "pt"})
        shards.append((file, {name: t.nbytes for name, t in held.items()}))
        held.clear()

    for name, values in made:
        if expected.pop(name, None) != tuple(values.shape):
            raise InputError(f"{small.name}: {name} has no place in the larger model")
        if held and sum(t.nbytes for t in held.values()) + values.nbytes > most:
            flush()
        held[name] = values
    flush()
    if expected:
        raise InputError(f"{small.name} lacks {sorted(expected)[0]}, which its larger model needs")
    _name_shards(folder, shards)


def _name_shards(folder: Path, shards: list[tuple[Path, dict[str, int]]]) -> None:
    """As transformers calls them."""
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (file, sizes) in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(folder / name)
        places |= dict.fromkeys(sizes, name)
    total = sum(n for _, sizes in shards for n in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def write_head(head: DraftHead, large: Target, out: str | Path) -> list[str]:
    """Write the folder of a head of the small target as one of `large`, which was inflated from it.

    head: as `load_head` gives it for the small target
    Returns what to tell the user.
    """
    made = inflate_head(head, large.hidden_size).to(large.device).bind(large)
    belong_to(made, large)
    with new_folder(out) as part:
        made.save_pretrained(part)
        write_json(part / "provenance.json", provenance(inflated_from=origin(head.name_or_path)))
        return complete(part, large)
