"""`--learn`: a head that learns from the text it drafts; `eval/stream.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from redrafter.config.common import PromptFileConfig, ResourcesConfig, at_least
from redrafter.config.heads import LoraSettings
from redrafter.config.training import LossConfig


@dataclass(frozen=True)
class LearnConfig:
    """How a head learns while it drafts, and when its drift is an alarm."""

    share: float = 0.1
    """Most of the time that learning may take, as a share of decoding and learning together."""
    every_tokens: int = 16
    """New tokens between two optimiser steps, at least; the share may allow fewer steps."""
    batch_positions: int = 32
    """Start positions of an optimiser step, each with all its depths."""
    buffer_tokens: int = 4096
    """Newest tokens of decoded text that are kept to learn from, with their hidden states."""
    lr: float = 1e-3
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: int = 20
    """Optimiser steps of linear warm-up."""
    lora: LoraSettings | None = None
    """Learn a LoRA of the head; none learns all of it."""
    loss: LossConfig = LossConfig()
    """The loss, as in training; none given is cross-entropy alone, by which this was measured. Its
    `teacher` is the target's own states, which are there."""
    save_steps: int = 200
    """Optimiser steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    seed: int = 0
    """Fixes which positions each step takes."""
    false_alarms: float = 0.01
    """Probability of ever raising the drift alarm where there is no drift."""
    drift_margin: float = 0.05
    """What counts as no drift: acceptance within this share below the head's profile."""

    def __post_init__(self) -> None:
        at_least(1, self, "every_tokens", "batch_positions", "buffer_tokens", "save_steps",
                 "keep_checkpoints")  # fmt: skip
        at_least(0, self, "warmup_steps")
        for name, low in (("share", 0.0), ("false_alarms", 0.0), ("drift_margin", -1.0)):
            value = getattr(self, name)
            if not low < value <= 1:
                raise ValueError(f"{name}: {value} must lie above {low:g}, up to 1 (LearnConfig)")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: {self.lr} must be positive (LearnConfig)")
        if self.loss.teacher != "states":
            raise ValueError("loss.teacher: learning while decoding has the target's states alone")
        if self.loss.towards is not None:
            raise ValueError("loss.towards: learning while decoding has no last step; leave it out")

    def resolved(self) -> LearnConfig:
        """The same, with the weights of all losses written out."""
        return replace(self, loss=self.loss.resolved("cross_entropy"))


@dataclass(frozen=True, kw_only=True)
class StreamConfig(ResourcesConfig, PromptFileConfig):
    """`eval/stream.py`: a stream of prompts, whose head may learn, and whose drift is watched."""

    drafter: str = "head"
    """Name of what drafts; `--list` prints all of them, with their options."""
    learn: str | None = None
    """Folder of the head that learns: made where there is none, gone on from where there is one.
    None learns nothing, and watches."""
    learning: LearnConfig = LearnConfig()
    """How it learns."""
    n_prompts: int = 100
    """Rows of the stream, in order, from the end of the file (before those of `held_out`)."""
    held_out: int = 0
    """Rows at the end of the file that are decoded before the stream and after every `window` of
    it, and never learned from."""
    batch_size: int = 1
    """Prompts decoded at a time."""
    window: int = 100
    """Prompts of the stream that one line of the table sums up; a multiple of batch_size."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    out: str | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens", "batch_size", "window")
        at_least(0, self, "held_out", "temperature")
        # Here, not in LearnConfig: of a field's default the parser would take values for given.
        object.__setattr__(self, "learning", self.learning.resolved())
        if self.window % self.batch_size:
            raise ValueError(
                f"window: {self.window} is no multiple of batch_size {self.batch_size}"
            )
