"""`eval/table.py`, `eval/acceptance.py`, `eval/regret.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from redrafter.config.common import (
    DraftingConfig,
    PromptFileConfig,
    PromptsConfig,
    at_least,
    check_temperatures,
)


@dataclass(frozen=True, kw_only=True)
class TableConfig(DraftingConfig, PromptsConfig):
    """`eval/table.py`: one table and its pictures over prompt sets, temperatures and methods."""

    sets: dict[str, str]
    """Name of a set of prompts -> JSON-lines file; rows are taken from its end."""
    out: str
    """Folder. A part that is there already, of the same configuration, is not measured again."""
    methods: list[str] = field(default_factory=lambda: ["stock", "plain", "head"])
    """Ways of decoding, as eval/speed.py names them."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy."""
    samples_per_prompt: tuple[int, ...] = (1,)
    """Rows of every prompt, as eval/speed.py decodes them; each number is a part of its own."""
    n_prompts: int = 100
    """Rows of each set."""
    max_new_tokens: int = 128
    """Per prompt, the same for every method."""
    repeats: int = 1
    """Times that every prompt is run by every method; the median counts."""
    cost_rounds: int = 60
    """Measurements of each forward and drafted level, for the bound."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens", "repeats", "cost_rounds")
        check_temperatures(self.temperatures)
        if not self.samples_per_prompt or min(self.samples_per_prompt) < 1:
            given = list(self.samples_per_prompt)
            raise ValueError(f"samples_per_prompt: {given} must be one or more, none below 1")
        if not self.sets or not self.methods:
            raise ValueError("sets and methods: give at least one of each")


@dataclass(frozen=True, kw_only=True)
class AcceptanceConfig(DraftingConfig, PromptFileConfig):
    """`eval/acceptance.py`: what is accepted, rule by rule."""

    methods: str
    """Ways of drafting, comma-separated; `--list` prints all of them, with their options."""
    temperature: float = 1.0
    """0 is greedy."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True, kw_only=True)
class RegretConfig(DraftingConfig, PromptsConfig):
    """`eval/regret.py`: selectors beside their arms on a stream that changes its domain."""

    stream: list[str]
    """JSON-lines files, one after the other; rows are taken from their ends."""
    arms: list[str]
    """Ways of drafting, as eval/speed.py names them."""
    policies: list[str] = field(default_factory=lambda: ["ucb", "hedge"])
    """Selectors over all arms: a policy, or with options, `ucb:exploration=0.2`."""
    n_prompts: int = 50
    """Rows of each file."""
    temperature: float = 0.0
    """0 is greedy."""
    out: str | None = None
    """JSON file to write; pictures go beside it."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens")
        if not self.stream or len(self.arms) < 2 or not self.policies:
            raise ValueError("stream and policies: give at least one; arms: at least two")
