"""Checkpoints: safetensors and JSON only, whole or absent, and exact on resume.

One format for every engine and number of processes (`sharded.py`): the main process writes it.

    checkpoints/step-N/config.json, model.safetensors   the head after N optimiser steps
                       adapter_config.json, adapter_model.safetensors   in their place: head.lora
                       optimizer.safetensors            AdamW's averages and step, by parameter name
                       rng.safetensors                  torch's generators
                       state.json                       progress, configuration, what was measured
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from redrafter.config import DataConfig, HeadConfig, LossConfig, TargetConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.store import disk_errors
from redrafter.files import new_folder, plain_values, write_json
from redrafter.heads import lora
from redrafter.heads.base import DraftHead
from redrafter.heads.reading import read_tensors
from redrafter.training.refusals import all_steps
from redrafter.training.sharded import AVERAGES, trained


def save(
    folder: Path,
    step: int,
    head: DraftHead,
    averages: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write folder/step-N in one piece. Raises InputError where the disk is full.

    averages: AdamW's, by parameter name (`sharded.Parts.averages`); state: anything JSON can hold
    """
    path = folder / f"step-{step}"
    with disk_errors(folder), new_folder(path) as part:
        save_weights(part, head)
        save_file(averages, part / "optimizer.safetensors")
        save_file(_generators(), part / "rng.safetensors")
        write_json(part / "state.json", {"step": step, **state})
    return path


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{index}"] = state
    return states


def read_state(path: Path) -> dict[str, Any]:
    """`state.json`. Raises InputError naming the file."""
    file = path / "state.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): resume from another one") from None


def load_averages(path: Path, head: DraftHead) -> dict[str, Tensor]:
    """AdamW's averages of a head of the same configuration. Raises InputError naming a bad file."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, parameter in trained(head).items():
        expected |= {f"{name}.{key}": tuple(parameter.shape) for key in AVERAGES[:2]}
        expected[f"{name}.step"] = ()
    return read_tensors(path / "optimizer.safetensors", expected)


def load_generators(path: Path) -> None:
    """Put torch's generators back, those of the devices that are there."""
    try:
        with safetensors.safe_open(path / "rng.safetensors", framework="pt") as opened:
            names = opened.keys()
            generators = {name: opened.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path / 'rng.safetensors'} cannot be read ({error})") from None
    torch.set_rng_state(generators["cpu"])
    for name, state in generators.items():
        if name != "cpu" and int(name.split(":")[1]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)


def save_weights(path: Path, head: DraftHead) -> None:
    """The head's weights, or those of its LoRA alone."""
    if lora.is_adapted(head):
        lora.save(head, path)
    else:
        head.save_pretrained(path)


def load_weights(path: Path, head: DraftHead) -> None:
    """Weights of a checkpoint into a head of the same configuration."""
    if lora.is_adapted(head):
        lora.load(path, head)
        return
    expected = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    head.load_state_dict(read_tensors(path / "model.safetensors", expected))


def export(path: Path, head: DraftHead, out: Path) -> None:
    """The head of a checkpoint as `load_head` reads it, into `out`. With LoRA it is merged, and the
    adapter is kept in out/adapter; `head` then has the checkpoint's weights afterwards."""
    if lora.is_adapted(head):
        load_weights(path, head)
        with new_folder(out / "adapter") as part:
            lora.save(head, part)
        with new_folder(out / ".merged") as part:
            lora.merged(head).save_pretrained(part)
        path = out / ".merged"
    for name in ("config.json", "model.safetensors"):
        part = out / f".{name}.part"
        shutil.copyfile(path / name, part)
        os.replace(part, out / name)
    shutil.rmtree(out / ".merged", ignore_errors=True)


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, by name: missing, cut short, or no such file at all.
    Their numbers are not read."""
    try:
        read_state(path)
    except InputError as error:
        return str(error)
    weights = "adapter_model" if (path / "adapter_config.json").exists() else "model"
    for name in (weights, "optimizer", "rng"):
        file = path / f"{name}.safetensors"
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            return f"{file} is damaged ({error})"
    return None


def set_aside(folder: Path) -> list[str]:
    """Rename damaged checkpoints that are newer than a whole one, so that `--resume auto` finds
    that one. Returns what to tell the user. Raises InputError where none is whole."""
    damaged: list[tuple[Path, str]] = []
    for step in reversed(all_steps(folder)):
        path = folder / f"step-{step}"
        wrong = fault(path)
        if wrong is None:
            break
        damaged.append((path, wrong))
    else:
        if damaged:
            raise InputError(
                f"{damaged[0][1]}, and there is no whole checkpoint to resume from: remove "
                f"{folder} to start anew"
            )
    told = []
    for old, wrong in damaged:
        aside = old.with_name(f"damaged-{old.name}")
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        told.append(f"{wrong}: set aside as {aside.name}, going on from {path.name}")
    return told


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints, the best one, and the best one that any of
    those kept knows of (a run resumed there needs it)."""
    steps = all_steps(folder)
    kept = set(steps[-keep:])
    for step in sorted(kept):
        known = read_state(folder / f"step-{step}").get("best")
        kept.add(known["step"] if known else step)
    if best is not None:
        kept.add(best)
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder / f"step-{step}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def settings_of(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration of a training, `flat`, and the defaults of what it does not name."""
    kind = stored["head"].get("kind", "recurrent")  # from when there was no other
    loss = LossConfig(cross_entropy=1.0)  # the default of versions that did not store all weights
    unsaid = TrainConfig(TargetConfig(""), DataConfig(), "", HeadConfig(kind=kind), loss)
    return {**flat(plain_values(unsaid)), **flat(stored)}


def changes(old: dict[str, Any], new: dict[str, Any], free: Collection[str]) -> list[str]:
    """Dotted keys whose values differ between two configurations of a training, as in files.

    old: perhaps of an earlier version: what it does not name is as `settings_of` says
    free: dotted keys, or sections ending in a dot, that may differ
    """
    old, new = settings_of(old), flat(new)
    return [
        key
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
        and key not in free
        and not any(key.startswith(name) for name in free if name.endswith("."))
    ]


def check_same(old: dict[str, Any], new: dict[str, Any], free: Collection[str], path: Path) -> None:
    """Raises InputError naming the first `changes` between two configurations."""
    if found := changes(old, new, free):
        old, new = settings_of(old), flat(new)
        said = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in found[:5]]
        back = [_given(f"--{key}", old[key]) if key in old else f"no --{key}" for key in found[:5]]
        raise InputError(
            f"{path} was made with other settings ({'; '.join(said)}): resuming would not "
            f"give the same run. Set them back ({' '.join(back)}), or start anew in another "
            "--output_dir"
        )


def _given(option: str, value: Any) -> str:
    """An option with a plain value, as it is typed."""
    return shlex.quote(f"{option}={value if isinstance(value, str) else json.dumps(value)}")
