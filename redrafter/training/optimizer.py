"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch

from redrafter.config import OptimConfig
from redrafter.heads.base import DraftHead


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of optimiser step `step` (0, 1, ...): linear warm-up, then a cosine. A pure function, so
    there is no scheduler to save."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = config.lr * config.final_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(head: DraftHead, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; decay on matrices only."""
    trained = [p for p in head.parameters() if p.requires_grad]  # LoRA freezes the others
    matrices = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True
    )
