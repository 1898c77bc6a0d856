"""How large a head is, what a level of it reads, and the width at which it has a given size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from redrafter.config import HeadConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.heads.base import DraftHead
from redrafter.heads.load import head_class

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


def n_parameters(wanted: HeadConfig, depth: int, hidden_size: int, vocab_size: int) -> int:
    """Trained numbers of a new head of this configuration; what it borrows of the target is not
    among them. Nothing of its size is allocated."""
    cls, fields = head_class(wanted.kind), dict(wanted.options)
    if cls.depth_field is not None:
        fields[cls.depth_field] = depth
    config = cls.config_class(vocab_size=vocab_size, hidden_size=hidden_size, **fields)
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config).parameters())


def nearest_width(count: Callable[[int], int], wanted: int) -> int:
    """The width, 1 or more, whose count is nearest to `wanted`. count: grows with the width"""
    low, high = 0, 1
    while high < _LARGEST and count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min((w for w in (low, high) if w > 0), key=lambda w: abs(count(w) - wanted))


def sized(config: TrainConfig, parameters: int, target: Any, row: str) -> TrainConfig:
    """The same with a head of about so many parameters.

    target: anything with hidden_size and vocab_size; row: for the message
    Raises InputError where the nearest is off by more than 5 %.
    """
    head, option = config.head, SIZE_OPTIONS[config.head.kind]

    def count(width: int) -> int:
        changed = replace(head, **{option: width})
        return n_parameters(changed, config.optim.depth, target.hidden_size, target.vocab_size)

    width = nearest_width(count, parameters)
    if abs(found := count(width) - parameters) > TOLERANCE * parameters:
        raise InputError(
            f"rows: {row}: no head.{option} gives a {head.kind} head {parameters:,} parameters "
            f"within {TOLERANCE:.0%}; the nearest, {width}, is off by {found:+,}: give it another "
            "`parameters`, e.g. by naming the row of the coarsest kind"
        )
    return replace(config, head=replace(head, **{option: width}))


def bytes_per_level(head: DraftHead, target: Any, levels: int, nodes: int) -> list[int]:
    """Weights that each level of a draft reads: those that its states and logits depend on, the
    target's matrix too where the head draws on it. nodes: per level, which read so many rows of
    tables of embeddings.

    Found by differentiating one draft, so that no kind has to say it. Caches are not counted.
    """
    tables = {id(m.weight) for m in head.modules() if isinstance(m, nn.Embedding)}
    named = [p for p in head.parameters() if p.is_floating_point()]
    context = torch.zeros(1, 1, target.hidden_size, device=target.device)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=target.device)
    states, found = None, []
    with torch.enable_grad():
        for parameter in named:
            parameter.requires_grad_(True)
        for level in range(1, levels + 1):
            states, logits = head.read(target, tokens, context, states, level)
            grads = torch.autograd.grad(logits.sum() + states.sum(), named, allow_unused=True)
            states = states.detach()
            read = 0
            for parameter, grad in zip(named, grads, strict=True):
                if grad is None:
                    continue
                numbers = parameter.numel()
                if id(parameter) in tables:
                    numbers = nodes * parameter.shape[-1]
                read += numbers * parameter.itemsize
            if head.draws_on_target:
                matrix = head.vocab_matrix(level)
                read += matrix.numel() * matrix.itemsize
            found.append(read)
    return found
