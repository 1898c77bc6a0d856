"""What a draft may cost: bytes of weights read per drafted level and per forward of the target.

Decoding a few rows is bound by reading weights, not by arithmetic. If time is bytes read, the bound
of the design (tau x t(1) / (level costs + t(N))) becomes, for K levels,

    speedup <= tau x T / (c + K x h + T)  h, T: bytes that a level and a forward read; c: what the
                                          context reads, once a step (`head.prefix`,
                                          `head.aux_layers`; else 0)

which breaks even at tau = 1 + (c + K x h) / T tokens per step and, as tau <= K + 1, ends at
(K + 1) / (1 + (c + K x h) / T). Where arithmetic counts too (large batches, a CPU's small
products), verifying costs more than one token and the bound is lower: eval/costs.py measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from redrafter.heads.base import DraftHead
from redrafter.planning.tracing import traced
from redrafter.targets.model import Target


@dataclass(frozen=True)
class Bound:
    """level_bytes, target_bytes: weights read by a drafted level and by a forward of the target;
    depth: K; context_bytes: read once per step, by the layer over the prefix"""

    level_bytes: int
    target_bytes: int
    depth: int
    context_bytes: int = 0

    @property
    def break_even(self) -> float:
        """Tokens per step below which drafting loses."""
        drafted = self.context_bytes + self.depth * self.level_bytes
        return 1 + drafted / self.target_bytes

    def speedup(self, tokens_per_step: float) -> float:
        return tokens_per_step / self.break_even

    @property
    def most(self) -> float:
        """Were every drafted token accepted."""
        return self.speedup(self.depth + 1)


def target_bytes_read(target: Target) -> int:
    """Weights that a forward of one token reads, all layers and lm_head; of the embedding single
    rows, which are not counted."""
    one = torch.zeros(1, 1, dtype=torch.long, device=target.device)
    cache = target.new_cache(1, 2)
    cache.prepare(1)
    with torch.no_grad(), traced() as trace:  # not inference mode: kernels cannot be traced
        target.forward(one, one, target.masks(one[:, None] >= 0, one, one), cache)
        return trace.read_bytes(target.model.parameters())


def level_bytes_read(head: DraftHead, target: Target, depth: int) -> int:
    """Weights that one of K drafted levels reads, the mean of those after the first (which may read
    less, having no state): the head's, and the matrix over the vocabulary that it may borrow."""
    hidden = torch.zeros(1, 1, target.hidden_size, dtype=target.dtype, device=target.device)
    one = torch.zeros(1, 1, dtype=torch.long, device=target.device)
    last = min(max(depth, 2), head.max_depth or depth + 2)
    states, found = None, []
    with torch.no_grad():
        for level in range(1, last + 1):
            with traced() as trace:
                states, _ = head.read(target, one, hidden, states, level)
                weights = [*head.parameters(), head.vocab_matrix(level)]
                found.append(trace.read_bytes(weights))
    found = found[1:] or found
    return sum(found) // len(found)


def context_bytes_read(head: DraftHead) -> int:
    """Weights that are read once per step whatever is drafted: those that make the context."""
    parts = [getattr(head, name, None) for name in ("layer_mix", "prefix_layer")]
    made = [p for part in parts if part is not None for p in part.parameters()]
    return sum(p.numel() * p.element_size() for p in made)


def bound(head: DraftHead, target: Target, depth: int) -> Bound:
    level, whole = level_bytes_read(head, target, depth), target_bytes_read(target)
    return Bound(level, whole, depth, context_bytes_read(head))
