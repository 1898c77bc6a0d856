"""`eval/lookahead.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from redrafter.config.common import DraftingConfig, PromptsConfig, at_least, check_temperatures


@dataclass(frozen=True, kw_only=True)
class LookaheadEvalConfig(DraftingConfig, PromptsConfig):
    """`eval/lookahead.py`: ways to say when to stop drafting, beside every static length."""

    sets: dict[str, str]
    """Name of a set of prompts -> JSON-lines file; rows are taken from its end."""
    drafters: dict[str, str]
    """Name in tables and files -> drafter, as eval/speed.py names it. Its depth says which static
    lengths are tried: all of them, and not to draft at all."""
    lookaheads: dict[str, str]
    """Name in tables -> what stands behind `lookahead=`. {drafter}, {set} and {temperature} are
    replaced, the first two by their names here: disco(path=runs/{drafter}-{set}-t{temperature})"""
    out: str
    """Folder. A part that is there already, of the same configuration, is not measured again."""
    without: dict[str, list[str]] = field(default_factory=dict)
    """Name of a drafter -> lookaheads that are not tried with it."""
    timed: list[str] | None = None
    """Names of the lookaheads that the clock is put to, beside plain decoding and the best static
    length; the others, and the other static lengths, are counted. None: all."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy."""
    n_prompts: int = 100
    """Rows of each set."""
    max_new_tokens: int = 64
    """Per prompt, the same for every lookahead."""
    repeats: int = 1
    """Times that every prompt is decoded with every lookahead and timed; the median counts."""
    costs: str | None = None
    """A file of eval/costs.py that every part is priced by; {temperature} in it is replaced. None
    measures each part's own, in between the decoding."""
    cost_rounds: int = 60
    """Measurements of each forward and drafted level, where they are measured."""
    shown_prompt: int = 0
    """The prompt, of those evaluated, whose steps are drawn."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens", "repeats", "cost_rounds")
        check_temperatures(self.temperatures)
        for key in ("sets", "drafters", "lookaheads"):
            names = getattr(self, key)
            if not names:
                raise ValueError(f"{key}: give at least one")
            for name in names:
                if not re.fullmatch(r"[\w-]+", name):
                    raise ValueError(f"{key}: {name!r} must be letters, digits, - and _")
        for drafter, left_out in self.without.items():
            if drafter not in self.drafters or not set(left_out) <= set(self.lookaheads):
                raise ValueError(
                    f"without: {drafter}: {left_out}: name one of drafters and some of lookaheads"
                )
        if unknown := set(self.timed or ()) - set(self.lookaheads):
            raise ValueError(f"timed: {', '.join(sorted(unknown))}: name some of lookaheads")
        if not 0 <= self.shown_prompt < self.n_prompts:
            raise ValueError(f"shown_prompt: {self.shown_prompt} is none of {self.n_prompts}")
