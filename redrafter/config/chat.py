"""`redrafter chat`."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter.config.common import ResourcesConfig, TargetConfig, at_least
from redrafter.config.learning import LearnConfig


@dataclass(frozen=True)
class ChatConfig(ResourcesConfig):
    """`redrafter chat`: talk to a target, and see what drafting saves."""

    target: TargetConfig
    drafter: str | None = None
    """Name of what drafts; `--list` prints all of them, with their options. None is the head, where
    there is one; `plain`, or neither, decodes without drafting."""
    learn: str | None = None
    """Let the head learn from the answers, and keep what it becomes in this folder, from which
    the next conversation goes on. The answers stay the target's. None learns nothing."""
    learning: LearnConfig = LearnConfig()
    """How it learns."""
    system: str | None = None
    """A system message to begin with."""
    max_new_tokens: int = 256
    """Of an answer, at most."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Answer i samples with seed + i."""
    threads: int | None = None
    """CPU threads of torch; None leaves its own choice."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens")
        at_least(0, self, "temperature")
