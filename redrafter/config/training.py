"""`train/redrafter.py`: the losses, the optimiser, what is measured meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from redrafter.config.common import (
    SourceConfig,
    TargetConfig,
    TreeConfig,
    at_least,
    check_temperatures,
)
from redrafter.config.data import DataConfig
from redrafter.config.heads import HeadConfig

#: what a draft head may learn by
LOSSES = (
    "cross_entropy", "kl", "reverse_kl", "total_variation", "minus_log_acceptance", "lk_hybrid",
)  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; see `redrafter/training/losses.py` for what each one serves.

    Where one is given a weight, those given are all there is. Where none is, a training takes
    KL(p || q) alone, or cross-entropy alone for labels that only it reads (`data.labels` greedy,
    local); learning while drafting takes cross-entropy alone.
    """

    cross_entropy: float | None = None
    """Weight of -log q(label). Losses that are given a weight are all there is; where none is, this
    one is 1 for data.labels greedy and local, and while drafting, else kl is."""
    kl: float | None = None
    """Weight of KL(p || q), p the target's distribution, q the head's: 1 where no loss is given a
    weight and data.labels are tokens."""
    reverse_kl: float | None = None
    """Weight of KL(q || p)."""
    total_variation: float | None = None
    """Weight of the total variation between p and q."""
    minus_log_acceptance: float | None = None
    """Weight of -log sum min(p, q)."""
    lk_hybrid: float | None = None
    """Weight of KL(p || q) where little would be accepted, of the total variation where much."""
    towards: dict[str, float] | None = None
    """Weights at the last step, by the names above (0 for one not named); those of the steps before
    lie on a line from those above, given or not, to these. none keeps those above."""
    teacher: Literal["states", "top_k"] = "states"
    """Where p comes from: exactly, from the stored hidden states and the target's lm_head; or from
    the stored most probable tokens (data.states.teacher_top_k), without that matrix product."""
    depth_decay: float = 1.0
    """Depth k weighs depth_decay^(k-1)."""
    depth_weights: Literal["fixed", "chance"] = "fixed"
    """`chance` weighs it also by the chance that the depths before it are right: the product of the
    head's own probabilities q of their labels, per draft; (1 - a) q + a with a = chance_floor."""
    chance_floor: float = 0.0
    """a of depth_weights `chance`: 0 takes the chance itself, 1 weighs all depths alike."""
    chunk_rows: int = 256
    """Rows of logits (one per position and depth) held at once."""

    def __post_init__(self) -> None:
        at_least(1, self, "chunk_rows")
        given = [w for name in LOSSES if (w := getattr(self, name)) is not None]
        if given and not any(given):
            raise ValueError(
                f"give one of {', '.join(LOSSES)} a weight, or leave all of them out (LossConfig)"
            )
        if unknown := sorted(set(self.towards or ()) - set(LOSSES)):
            raise ValueError(
                f"towards: {', '.join(unknown)} is no loss (LossConfig); name some of "
                f"{', '.join(LOSSES)}"
            )
        if self.towards is not None and not any(self.towards.values()):
            raise ValueError("towards: give one of the losses a weight, or none (LossConfig)")
        if not 0 <= self.chance_floor <= 1:
            raise ValueError(f"chance_floor: {self.chance_floor} must lie in 0..1 (LossConfig)")

    def resolved(self, unsaid: str) -> LossConfig:
        """The same, with the weights of all losses written out. unsaid: the one of LOSSES that is
        taken alone where none is given a weight"""
        weights = {name: getattr(self, name) for name in LOSSES}
        if all(weight is None for weight in weights.values()):
            weights[unsaid] = 1.0
        return replace(self, **{name: weight or 0.0 for name, weight in weights.items()})


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to zero."""

    steps: int = 8000
    """Optimiser steps."""
    batch_positions: int = 128
    """Start positions per micro-batch, each with all its depths; of all processes together, which
    share them out. So their number changes nothing but the time and the memory."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    row_starts: int = 8
    """Start positions of one row that a step takes together, for heads with head.prefix attention,
    whose layer runs once over the row for all of them. Fewer bring more rows into a step, which
    learns faster, and cost more passes. Other heads take positions one by one."""
    depth: int = 5
    """Depths trained."""
    lr: float = 2e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end, as a part of the peak."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices (never of biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; none does not clip."""
    max_bad_steps: int = 10
    """A step whose gradient is not finite is skipped and counted; so many in a row end the run."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_positions", "accumulation", "row_starts", "depth",
                 "max_bad_steps")  # fmt: skip


@dataclass(frozen=True)
class TrainEvalConfig:
    """What is measured while training, on held-out prompts."""

    every_steps: int = 1000
    """Steps between evaluations; one is always made at the end."""
    source: SourceConfig | None = None
    """Held-out prompts: eval.source.path and so on, as for data.source; none takes the held-out
    end of `data.source`."""
    prompts: int = 40
    """Prompts, from the end of them; 0 measures nothing, and exports the last head."""
    max_new_tokens: int = 128
    """Tokens per held-out answer."""
    batch_size: int = 40
    """Rows decoded together."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Tokens per step are measured at each; the first one picks the best head."""
    tree: TreeConfig = TreeConfig()
    """The tree that is drafted."""

    def __post_init__(self) -> None:
        check_temperatures(self.temperatures)
        at_least(0, self, "prompts")
        at_least(1, self, "every_steps", "max_new_tokens", "batch_size")


@dataclass(frozen=True)
class TrainConfig:
    """Fit a draft head to a frozen language model."""

    target: TargetConfig
    """The frozen language model."""
    data: DataConfig
    """Prompts and answers."""
    output_dir: str
    """Folder for the trained head, its checkpoints, logs and answers."""
    head: HeadConfig = HeadConfig()
    """The draft head."""
    loss: LossConfig = LossConfig()
    """The loss; none given is KL(p || q) alone, or cross-entropy alone where data.labels are greedy
    or local."""
    optim: OptimConfig = OptimConfig()
    """The optimiser and its schedule."""
    eval: TrainEvalConfig = TrainEvalConfig()
    """Evaluation while training."""
    seed: int = 0
    """Fixes initial weights, answers and the order of the data."""
    save_steps: int = 1000
    """Steps between checkpoints; an evaluation that improves makes one too."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the best one comes on top."""
    resume: str = "none"
    """`auto` goes on from the newest checkpoint in the output folder (starts anew if there is
    none), a path from that checkpoint, `none` starts anew (not in a folder that holds some)."""
    tracker: str | None = "tensorboard"
    """Where metrics are logged (a tracker that accelerate knows); none logs nowhere."""
    log_steps: int = 20
    """Steps between logged losses."""

    def __post_init__(self) -> None:
        at_least(1, self, "save_steps", "log_steps")
        # Here, not in the sections: of a field's default the parser would take values for given.
        object.__setattr__(self, "head", self.head.resolved())
        # Other labels than the text's own tokens are read by cross-entropy alone.
        unsaid = "kl" if self.data.labels == "tokens" else "cross_entropy"
        object.__setattr__(self, "loss", self.loss.resolved(unsaid))
