"""What travels with an exported head besides its weights: written here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from redrafter.export.custom_generate import write_custom_generate
from redrafter.export.golden import remove_golden, write_golden
from redrafter.targets.model import Target


def complete(
    folder: str | Path, target: Target, prompts: Sequence[Sequence[int]] | None = None
) -> list[str]:
    """Finish the folder of a head that has its config.json and model.safetensors.

    target: the head's own; prompts: token ids of held-out prompts, for the golden batch (None: a
        few fixed texts)
    Called by one process. What was made for an earlier head of the folder is replaced. Returns what
    to tell the user. Raises InputError where the folder's head is damaged or another target's.
    """
    folder = Path(folder)
    told: list[str] = []
    write_custom_generate(folder)
    # Last: the golden batch keeps the digests of what else was written.
    told += _golden(folder, target, prompts)
    return told


def _golden(folder: Path, target: Target, prompts: Sequence[Sequence[int]] | None) -> list[str]:
    """An export is complete enough without one: what hinders it is told, not raised."""
    remove_golden(folder)
    reason = None
    if target.sharded:  # its forwards need all processes
        reason = "the target's layers are shared out among processes"
    else:
        try:
            write_golden(folder, target, prompts)
        except torch.OutOfMemoryError:
            reason = "the device's memory is full"
    if reason is None:
        return []
    return [
        f"{folder}: no golden batch was made, as {reason}. Make it afterwards: "
        f"python eval/verify.py {folder} --target.path {target.name} --write true"
    ]
