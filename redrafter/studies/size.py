"""The width at which a head of some kind has a given number of parameters. Ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from redrafter.config import HeadConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.planning.meta import MetaTarget, meta_head

#: kind -> the option that makes its heads larger
SIZE_OPTIONS = {
    "recurrent": "exit_dim",
    "medusa": "num_draft_layers",
    "hydra": "num_draft_layers",
    "mlp_speculator": "inner_dim",
}
#: heads count as equal in size up to this share
TOLERANCE = 0.05
_LARGEST = 1 << 20


def n_parameters(wanted: HeadConfig, depth: int, target: MetaTarget) -> int:
    """Trained numbers of a new head of this configuration; what it borrows of the target is not
    among them. Nothing of its size is allocated."""
    return sum(p.numel() for p in meta_head(wanted, target, depth).parameters())


def nearest_width(count: Callable[[int], int], wanted: int) -> int:
    """The width, 1 or more, whose count is nearest to `wanted`. count: grows with the width"""
    low, high = 0, 1
    while high < _LARGEST and count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min((w for w in (low, high) if w > 0), key=lambda w: abs(count(w) - wanted))


def sized(config: TrainConfig, parameters: int, target: MetaTarget, row: str) -> TrainConfig:
    """The same with a head of about so many parameters.

    row: for the message
    Raises InputError where the nearest is off by more than 5 %.
    """
    head, option = config.head, SIZE_OPTIONS[config.head.kind]

    def count(width: int) -> int:
        changed = replace(head, **{option: width})
        return n_parameters(changed, config.optim.depth, target)

    width = nearest_width(count, parameters)
    if abs(found := count(width) - parameters) > TOLERANCE * parameters:
        raise InputError(
            f"rows: {row}: no head.{option} gives a {head.kind} head {parameters:,} parameters "
            f"within {TOLERANCE:.0%}; the nearest, {width}, is off by {found:+,}: give it another "
            "`parameters`, e.g. by naming the row of the coarsest kind"
        )
    return replace(config, head=replace(head, **{option: width}))
