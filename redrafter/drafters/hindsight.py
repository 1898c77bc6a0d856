"""What a draft would have been worth, found later by comparing it with the text.

Under the seeded rule the text does not depend on what was drafted, so a guess that was never
verified is judged as well as one that was: by waiting until the text has grown past it. Ours; the
idea that every drafter can be scored on the verified tokens: HedgeSpec (arXiv 2510.20064).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redrafter.contracts import RowState, TokenTree


@dataclass
class Past:
    """A tree of an earlier step. length: (B,) int64, `RowState.length` when it was drafted; levels:
    how deep it may be, None: not known without a read of the host."""

    tree: TokenTree
    length: Tensor
    live: Tensor
    levels: int | None = None

    def waits(self, seqs: RowState) -> Tensor:
        """() bool: not `ripe`."""
        deepest = torch.where(self.tree.valid, self.tree.depth, 0).amax(1)
        return (seqs.live & self.live & (seqs.length < self.length + deepest)).any()

    def ripe(self, seqs: RowState) -> bool:
        """Whether every node is known to be right or wrong (rows that have ended: as far as they
        got). Reads the host."""
        return not bool(self.waits(seqs))

    def right(self, seqs: RowState) -> tuple[Tensor, Tensor]:
        """(B, N) bool: the node and all of its ancestors are what the text says; and (B, N) bool,
        whether that is known: wrong above the end of the text, or the text has got there."""
        tree, ids = self.tree, seqs.ids
        # The root is the token at `length` - 1.
        where = self.length[:, None] - 1 + tree.depth
        there = where < seqs.length[:, None]
        equal = tree.tokens == ids.gather(1, where.clamp(max=ids.shape[1] - 1))
        right = tree.depth == 0
        wrong = torch.zeros_like(right)
        levels = int(tree.depth.max()) if self.levels is None else self.levels
        for d in range(1, levels + 1):
            here = tree.depth == d
            right = right | (here & there & equal & right.gather(1, tree.parent))
            wrong = wrong | (here & (wrong.gather(1, tree.parent) | (there & ~equal)))
        known = (right | wrong) & tree.valid & self.live[:, None]
        return right & tree.valid, known
