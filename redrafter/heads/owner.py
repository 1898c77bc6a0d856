"""Which target a head belongs to: written into its configuration, checked when it is loaded.

target_fingerprint          of the target as it was loaded
target_base, target_adapter digests of its weights: of the base alone, and of the adapter on it ("")
target_probe                hidden states and logits of a few fixed tokens (`Target.probe`)

A fingerprint tells models apart by their weights, so a base merged with its adapter is another
model although it computes the same. That it is such a copy is for the user to say
(`allow_other_target: merged`), and is then checked on the probe. Source: ours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from redrafter.contracts import InputError

# Relative error of the probe up to which two models count as the same: several times what merging
# and rounding to bfloat16 cause. What differs by less is drafted for as well by the same head.
_SAME = 0.05

#: False: the very target; "merged": one that computes the same; True: any of the same shape
AllowOther = bool | Literal["merged"]


def describe(target: Any) -> dict[str, Any]:
    """Fields of a head's configuration about its target."""
    parts = target.digests()
    return {
        "target_fingerprint": target.fingerprint(),
        "target_name": Path(str(target.name)).name,  # a head that is shared tells of no folders
        "target_base": parts.base,
        "target_adapter": parts.adapter,
        "target_probe": target.probe(),
    }


def belong_to(head: Any, target: Any) -> None:
    """The head is (re)trained for this target from now on."""
    for name, value in describe(target).items():
        setattr(head.config, name, value)


def check_target(head: Any, target: Any, path: Path, allow: AllowOther = False) -> None:
    """Raises InputError where the head in `path` was made for another target than `allow` says."""
    config = head.config
    for name in ("hidden_size", "vocab_size"):
        have, want = getattr(config, name), getattr(target, name)
        if have != want:
            raise InputError(
                f"{path}: the head's {name} is {have}, that of the target {target.name} is {want}; "
                "use the target that it was trained for"
            )
    trained_for = config.target_fingerprint
    if not trained_for or trained_for == target.fingerprint() or allow is True:
        return
    if getattr(target, "tokenizer", None) is None and config.target_base:
        parts = target.digests()  # nothing else can tell
        if (parts.base, parts.adapter) == (config.target_base, config.target_adapter):
            return
    if allow == "merged":
        _check_same(config, target, path)
        return
    raise InputError(
        f"{path}: {_what_happened(config, target)} (fingerprint {trained_for[:12]}, this one is "
        f"{target.fingerprint()[:12]}). {_remedy(config, target)}"
    )


def _bare_base(config: Any, target: Any) -> bool:
    """The head's target without its adapter."""
    parts = target.digests()
    return bool(config.target_adapter) and not parts.adapter and parts.base == config.target_base


def _what_happened(config: Any, target: Any) -> str:
    name, here = config.target_name or "?", target.name
    if config.target_base:
        parts = target.digests()
        if _bare_base(config, target):
            return (
                f"the head was trained for a base with an adapter ({name}), and {here} is its bare "
                "base, without the adapter"
            )
        if parts.base == config.target_base and parts.adapter and not config.target_adapter:
            return f"the head was trained for {name}, and {here} is it with an adapter on top"
        if parts.base == config.target_base and parts.adapter:
            return f"the head was trained for {name}, and {here} is the same base, another adapter"
    return f"the head was trained for another target ({name}), not for {here}"


def _remedy(config: Any, target: Any) -> str:
    any_other = (
        "allow_other_target true takes any target: output stays correct, but few drafted tokens "
        "will be accepted"
    )
    if config.target_base and _bare_base(config, target):
        return f"Give the adapter's folder as target.path. {any_other}"
    return (
        "Load its own target; or, if this is a merged copy of it, set allow_other_target merged; "
        f"or retune the head for this one (head.init_from, head.lora). {any_other}"
    )


def _check_same(config: Any, target: Any, path: Path) -> None:
    """`allow_other_target: merged`: refuses what is known to be another model."""
    if not config.target_probe:
        raise InputError(
            f"{path}: allow_other_target merged compares the target with what was recorded when "
            "the head was trained, and nothing was: set it to true to take this target unseen"
        )
    if _bare_base(config, target):
        raise InputError(
            f"{path}: allow_other_target merged, but {_what_happened(config, target)}: no merged "
            f"copy. {_remedy(config, target)}"
        )
    error = difference(config.target_probe, target.probe())
    if not error <= _SAME:
        raise InputError(
            f"{path}: allow_other_target merged, but {target.name} does not compute what the "
            f"head's target {config.target_name or '?'} did: on fixed tokens its hidden states and "
            f"logits differ by {error:.0%} (up to {_SAME:.0%} is rounding). Give its own target, "
            "or a copy merged with peft's merge_and_unload"
        )


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Largest relative error (L2) between two probes; infinite where they do not fit."""
    if one.keys() != other.keys() or any(len(one[k]) != len(other[k]) for k in one):
        return math.inf
    errors = [
        math.dist(one[k], other[k]) / max(math.hypot(*one[k]), math.ulp(1.0)) for k in one
    ]  # fmt: skip
    return max(errors, default=math.inf)
