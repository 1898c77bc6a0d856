"""What every evaluation command loads first."""

from __future__ import annotations

from typing import Any

from redrafter.contracts import InputError


def load_both(config: Any) -> tuple[Any, Any]:
    """(Target, RecurrentHead or None) of an evaluation's configuration; sets torch's threads."""
    import torch

    from redrafter.heads.recurrent import load_head
    from redrafter.target.model import load_target

    if config.threads is not None:
        if config.threads < 1:
            raise InputError(f"threads: {config.threads} must be at least 1")
        torch.set_num_threads(config.threads)
    target = load_target(config.target)
    if getattr(config, "head", None) is None:
        return target, None
    return target, load_head(config.head, target, config.allow_other_target)
