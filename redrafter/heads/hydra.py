"""Hydra: heads that read what was drafted before them (arXiv 2402.05109, the grounded MLP).

    x_k = [c ; e_1 ; ... ; e_k]                    ((k+1) H), e_i embed the tokens that were read
    y   = R_k x_k + r_k + SiLU(A_k x_k + a_k)      (H), the first block of head k
    y   = y + SiLU(A_ki y + a_ki)                  further residual blocks i
    logits_k = O_k y                               O_k: (V, H), its own, or the target's lm_head

Head k speaks of depth k, aligned as in `heads/base.py`, knowing by e_1 .. e_k the path at hand.
Parameters, with B blocks: K (K+3) H^2 + 2 K H in the first blocks, K (B-1) (H^2 + H) in further
ones, and K V H in matrices of its own.

Ours: embeddings may be scaled (`embedding_scale`, as a recurrent head's), and a new head repeats
what the target said last, R_k = [I 0 ... 0] and all else of the blocks 0, where the paper's code
(zankner/Hydra) draws R_k; own matrices begin as copies of the target's in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from redrafter.heads.base import DraftHead, DraftHeadConfig, ResidualBlock, embedding_rms
from redrafter.products import Linear, silu_of


class HydraHeadConfig(DraftHeadConfig):
    """What Hydra's heads are made of, beside what all heads say (`DraftHeadConfig`).

    num_heads: K                   num_draft_layers: B, blocks of each head
    embedding_scale: "rms" divides embeddings by the root mean square of the target's embedding
        matrix (one frozen number, saved); "none" takes them as they are
    output: "own" matrices, or the "target"'s frozen lm_head for all of them (not saved)
    output_bias: own matrices have a bias, as their last column (H + 1), which multiplies a 1; of
        heads that others trained
    """

    model_type = "redrafter_hydra"
    choices = {"output": ("own", "target"), "embedding_scale": ("none", "rms")}  # noqa: RUF012
    least = {"num_heads": 1, "num_draft_layers": 1}  # noqa: RUF012

    num_heads: int = 5
    num_draft_layers: int = 1
    embedding_scale: str = "none"
    output: str = "own"
    output_bias: bool = False


class FirstBlock(nn.Module):
    """R x + r + SiLU(A x + a), from a wider x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear = Linear(width, hidden)
        self.res_connection = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return silu_of(self.linear, x, self.res_connection(x))


class HydraHead(DraftHead):
    """See the module's docstring. Parameters carry the names of the paper's code."""

    config_class = HydraHeadConfig
    kind = "hydra"
    paper = ("Hydra", "2402.05109")
    depth_field = "num_heads"
    smaller = "head.output target, or head.draft_vocab_size"

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        hidden, heads = config.hidden_size, range(config.num_heads)
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(
                FirstBlock((k + 2) * hidden, hidden),
                *(ResidualBlock(hidden) for _ in range(config.num_draft_layers - 1)),
            )
            for k in heads
        )
        if config.output == "own":
            width = hidden + config.output_bias
            self.hydra_lm_head = nn.ModuleList(
                nn.Linear(width, self.draft_vocab_size, bias=False) for _ in heads
            )
        if config.embedding_scale == "rms":
            self.register_buffer("inverse_rms", torch.ones(()))
        self.prune()
        self.post_init()

    @torch.no_grad()
    def begin(self, target: Any) -> None:
        for parameter in self.hydra_mlp.parameters():
            parameter.zero_()
        for first, *_ in self.hydra_mlp:
            first.res_connection.weight.fill_diagonal_(1.0)
        if self.config.embedding_scale == "rms":
            self.inverse_rms.fill_(1.0 / embedding_rms(target))
        if not self.draws_on_target:
            for layer in self.hydra_lm_head:
                layer.weight[:, : self.config.hidden_size].copy_(self.rows_of(target))

    def output_layer(self, level: int = 1) -> nn.Linear:
        return self.hydra_lm_head[min(level, self.config.num_heads) - 1]

    def summary(self) -> str:
        config = self.config
        return (
            f"{config.num_heads} heads of {config.num_draft_layers} blocks each, which read what "
            "was drafted before them"
        )

    def advance(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> Tensor:
        """[e_1 ; ... ; e_level], (..., level H)."""
        e = target.embed(tokens).to(self.hydra_mlp[0][0].linear.weight.dtype)
        if self.config.embedding_scale == "rms":
            e = e * self.inverse_rms
        return e if states is None else torch.cat((states, e), dim=-1)

    def features(self, context: Tensor, states: Tensor, level: int = 1) -> Tensor:
        context = context.to(states.dtype).expand(*states.shape[:-1], -1)
        y = self.hydra_mlp[level - 1](torch.cat((context, states), dim=-1))
        if self.config.output_bias:
            y = torch.cat((y, y.new_ones(1).expand(*y.shape[:-1], 1)), dim=-1)
        return y


HEAD = HydraHead
