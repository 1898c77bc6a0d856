"""`eval/compare_heads.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from redrafter.config.common import (
    DraftingConfig,
    PromptFileConfig,
    TreeConfig,
    at_least,
    check_temperatures,
)

#: of a row, beside what it changes of a training
ROW_KEYS = ("parameters", "seeds", "learning_rates")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(DraftingConfig, PromptFileConfig):
    """`eval/compare_heads.py`: heads, or ways of training one, that differ in what their rows say
    and in nothing else."""

    rows: dict[str, dict[str, Any]]
    """Name of a row -> what it changes of `base`, as train/redrafter.py names it (`head.kind:
    medusa`). Beside these `parameters`: a number, or a row whose head's number of parameters this
    row's is brought to (within 5 %) by the width or the blocks of its kind; `seeds`: how many of
    `seeds` it is trained with; `learning_rates`: those that it tries, instead of the others'."""
    stores: list[str]
    """Hidden states that every row learns from, of data/states.py; "path=weight" mixes them."""
    out: str
    """Folder. What was trained or measured there already, of the same configuration, is not done
    again; a training that was cut short goes on from its last checkpoint."""
    base: str | None = None
    """YAML of train/redrafter.py that all rows begin from: a file, or the name of one that comes
    with the library (`redrafter configs`); none is its defaults."""
    against: tuple[str, ...] = ()
    """Rows that all others are compared with, prompt by prompt; none is the first row."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Each row is trained with each by its first seed; its other seeds take the one that makes most
    tokens per step, greedily, on the validation prompts."""
    tree: TreeConfig = TreeConfig()
    """What every head drafts."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights and the order of the data."""
    validation_prompts: int = 40
    """Rows at the very end of `prompts`, for nothing but the choice of learning rates; those that
    are measured lie before them."""
    methods: list[str] = field(
        default_factory=lambda: ["stock", "plain", "bigram:4x4", "replay:4x4"]
    )
    """Measured beside the heads: plain decoding, a floor and a ceiling."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy."""
    n_prompts: int = 100
    """Rows that are measured."""
    repeats: int = 1
    """Times that every prompt is run by every method; the median counts."""
    cost_rounds: int = 60
    """Measurements of each forward and drafted level, for the bound."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens", "repeats", "cost_rounds")
        at_least(1, self, "validation_prompts")
        check_temperatures(self.temperatures)
        if not self.rows or not self.stores or not self.seeds or not self.learning_rates:
            raise ValueError("rows, stores, seeds and learning_rates: give at least one of each")
        for name in ("seeds", "learning_rates"):
            given = [f"{value:g}" for value in getattr(self, name)]  # as folders are named
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: {', '.join(given)} are not all different")
        if unknown := [name for name in self.against if name not in self.rows]:
            raise ValueError(f"against: {', '.join(unknown)} is no row ({', '.join(self.rows)})")
        for name in self.rows:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"rows: {name!r} must be letters, digits, - and _, as folders are")
