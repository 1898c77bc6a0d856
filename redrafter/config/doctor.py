"""`eval/doctor.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import PromptFormat, PromptsConfig, at_least


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PromptsConfig):
    """`eval/doctor.py`: does drafting pay for this model on this device?"""

    head: str | None = None
    """Folder or Hub id of a trained draft head; without one only copying (`suffix`) is tried."""
    prompts: str | None = None
    """JSON-lines file of prompts like those that will be asked; none takes a few fixed texts."""
    prompt_format: PromptFormat = "auto"
    """What a row of `prompts` holds; `auto` looks at the keys of the first one."""
    n_prompts: int = 8
    """Rows of `prompts` to use, from its end."""
    max_new_tokens: int = 64
    """Per prompt."""
    widths: str = "1,4,8"
    """W of the head's trees, nodes per level, comma-separated."""
    depth: int = 5
    """Every K up to this, levels."""
    rounds: int = 10
    """Measurements of each forward, draft and step."""
    allow_other_target: bool | Literal["merged"] = False
    """Accept a head that was trained for another target: `merged` one that computes the same, as a
    merged copy of base and adapter does (compared on fixed tokens), `true` any."""
    out: str | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens", "depth", "rounds")
