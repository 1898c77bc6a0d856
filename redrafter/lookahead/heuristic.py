"""Two levels more after a full success, one less after a rejection.

Source: the schedule `heuristic_transient` of transformers' assisted generation, with its constants;
`heuristic` is `keep`. Theirs is one number for one sequence; here every row has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, Lookahead, RowState, Truth

_NO_LIMIT = 2**31


class HeuristicLookahead(Lookahead):
    """Drafts n levels. After a step of a row: n += `more` where all levels that it drafted were
    accepted, else n = max(1, n - `less`); a row that drafted nothing keeps its n.

    start: n at the beginning of a generation
    more, less: levels
    most: n grows no further, None is without limit as in transformers; a drafter's K, beyond which
        n would have no effect but to come down late, is ours (see `of`)
    keep: go on in the next generation with the n of this one, row by row in the order of the batch;
        a batch of another size starts anew
    Raises InputError naming an option that is not in its range.
    """

    level_by_level = False

    def __init__(
        self,
        start: int = 5,
        *,
        more: int = 2,
        less: int = 1,
        most: int | None = None,
        keep: bool = False,
    ):
        for option, value in (("start", start), ("most", most)):
            if value is not None and value < 1:
                raise InputError(f"heuristic: {option} {value} must be positive")
        for option, value in (("more", more), ("less", less)):
            if value < 0:
                raise InputError(f"heuristic: {option} {value} must not be negative")
        self.start, self.more, self.less, self.keep = start, more, less, keep
        self.most = _NO_LIMIT if most is None else most
        self.levels: Tensor | None = None  # n (B,) int64

    @classmethod
    def of(cls, drafter: Drafter, **options) -> HeuristicLookahead:
        """For this drafter: n grows no further than its K. options: as above."""
        return cls(**{"most": max(1, drafter.max_depth), **options})

    def begin(self, seqs: RowState) -> None:
        if not self.keep or self.levels is None or len(self.levels) != len(seqs.length):
            self.levels = torch.full_like(seqs.length, self.start).clamp(max=self.most)

    def plan(self) -> Tensor:
        return self.levels

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        up = (self.levels + self.more).clamp(max=self.most)
        down = (self.levels - self.less).clamp(min=1)
        told = torch.where(accepted >= drafted, up, down)
        self.levels = torch.where(drafted > 0, told, self.levels)
