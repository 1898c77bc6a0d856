"""Always the same number of levels."""

from __future__ import annotations

from torch import Tensor

from redrafter.contracts import Lookahead


class StaticLookahead(Lookahead):
    """Drafts `depth` levels in every step (at most the drafter's own `max_depth`)."""

    def __init__(self, depth: int):
        self.depth = depth

    def __call__(self, features: Tensor | None, level: int) -> bool:
        return level < self.depth
