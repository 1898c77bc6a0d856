"""Medusa: K independent heads on the target's hidden state (arXiv 2401.10774, equation 1).

    x_k = c
    x_k = x_k + SiLU(A_ki x_k + a_ki)      for every residual block i of head k (the paper has one)
    logits_k = O_k x_k                     O_k: (V, H), its own, or the target's lm_head

Head k speaks of depth k, aligned as in `heads/base.py`, and has read none of the drafted tokens:
all paths of a level have the same logits, so a tree of its best nodes is the best part of the
product of the levels. Parameters, with R blocks: K R (H^2 + H), and K V H in matrices of its own.

As in the paper's code (FasterDecoding/Medusa), a new head repeats what the target said last: blocks
begin as the identity (here their biases, too), and own matrices as copies of the target's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from redrafter.contracts import InputError
from redrafter.heads.base import DraftHead, DraftHeadConfig, ResidualBlock


class MedusaHeadConfig(DraftHeadConfig):
    """What Medusa's heads are made of, beside what all heads say (`DraftHeadConfig`).

    num_heads: K                   num_draft_layers: R, residual blocks of each
    output: "own" matrices (V, H), or the "target"'s frozen lm_head for all of them (not saved)
    """

    model_type = "redrafter_medusa"
    choices = {"output": ("own", "target")}  # noqa: RUF012
    least = {"num_heads": 1, "num_draft_layers": 0}  # noqa: RUF012

    num_heads: int = 5
    num_draft_layers: int = 1
    output: str = "own"

    def check(self, where: str = "head config") -> None:
        super().check(where)
        if self.output == "target" and self.num_draft_layers == 0:
            raise InputError(
                f"{where}: num_draft_layers = 0 with output = 'target' has no weights at all; give "
                "at least one block, or output own"
            )


class MedusaHead(DraftHead):
    """See the module's docstring."""

    config_class = MedusaHeadConfig
    kind = "medusa"
    paper = ("Medusa", "2401.10774")
    depth_field = "num_heads"
    smaller = "head.output target, or head.draft_vocab_size"

    def __init__(self, config: MedusaHeadConfig) -> None:
        super().__init__(config)
        hidden, heads = config.hidden_size, range(config.num_heads)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(hidden) for _ in range(config.num_draft_layers)))
            for _ in heads
        )
        if config.output == "own":
            self.lm_heads = nn.ModuleList(
                nn.Linear(hidden, self.draft_vocab_size, bias=False) for _ in heads
            )
        self.prune()
        self.post_init()

    @torch.no_grad()
    def begin(self, target: Any) -> None:
        for parameter in self.blocks.parameters():
            parameter.zero_()
        if not self.draws_on_target:
            for layer in self.lm_heads:
                layer.weight.copy_(self.rows_of(target))

    def output_layer(self, level: int = 1) -> nn.Linear:
        return self.lm_heads[min(level, self.config.num_heads) - 1]

    def summary(self) -> str:
        config = self.config
        return f"{config.num_heads} heads of {config.num_draft_layers} residual blocks each"

    def advance(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> Tensor:
        """Nothing is kept of what was read: (..., 0)."""
        return context.new_empty((*tokens.shape, 0))

    def features(self, context: Tensor, states: Tensor, level: int = 1) -> Tensor:
        """(..., H), of each row once: its paths do not differ."""
        weight = next(self.parameters())
        return self.blocks[level - 1](context.to(weight.dtype))

    def logits(self, context: Tensor, states: Tensor, level: int = 1) -> Tensor:
        return super().logits(context, states, level).expand(*states.shape[:-1], -1)


HEAD = MedusaHead
