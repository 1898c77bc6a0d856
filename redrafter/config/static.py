"""`eval/static.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import PromptFileConfig, at_least


@dataclass(frozen=True, kw_only=True)
class StaticConfig(PromptFileConfig):
    """`eval/static.py`: which fixed width and depth of drafts pays best here."""

    head: str | None = None
    """Folder or Hub id of a trained draft head."""
    draft: str | None = None
    """In its place, folder or Hub id of a smaller model with the target's vocabulary."""
    widths: str = "1,2,4,8"
    """W, nodes per level, comma-separated."""
    depth: int = 8
    """Every K up to this."""
    n_prompts: int = 30
    """Rows that acceptance is recorded on."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    record_batch_size: int = 8
    """Rows recorded at a time; costs, and what is predicted, are of one row at a time."""
    costs: str | None = None
    """A file of eval/costs.py, or `profile` for what it kept with the head or draft model on this
    device; none measures now."""
    cost_rounds: int = 40
    """Measurements of each forward, draft and step, where they are measured now."""
    measure: bool = False
    """Also decode with every configuration, and say how far the predicted best is from the best:
    on the last `n_prompts` rows, acceptance being recorded on those before them."""
    repeats: int = 1
    """Times that every prompt is decoded by every configuration; the median counts."""
    plot: str | None = None
    """Draw the map to PLOT.png and PLOT.svg; needs matplotlib."""
    allow_other_target: bool | Literal["merged"] = False
    """Accept a head that was trained for another target: `merged` one that computes the same, as a
    merged copy of base and adapter does (compared on fixed tokens), `true` any."""
    out: str | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        at_least(1, self, "depth", "n_prompts", "record_batch_size", "cost_rounds", "repeats")
        at_least(0, self, "temperature")
