"""Always the same number of levels."""

from __future__ import annotations

from redrafter.contracts import Lookahead


class StaticLookahead(Lookahead):
    """Drafts `depth` levels in every step (at most the drafter's own `max_depth`)."""

    def __init__(self, depth: int):
        self.depth = depth

    level_by_level = False

    def plan(self) -> int:
        return self.depth
