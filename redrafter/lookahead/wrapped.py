"""A lookahead made of another one: what is passed on stands here, once."""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.contracts import AllLevels, Lookahead, RowState, Truth


class WrappedLookahead(Lookahead):
    """Decides as another lookahead does; for whoever wants to look on.

    inner: the other one; None lets all levels stand
    """

    def __init__(self, inner: Lookahead | None = None):
        self.inner = inner or AllLevels()
        self.level_by_level = self.inner.level_by_level
        self.needs, self.reads = self.inner.needs, self.inner.reads

    def speculates(self, device: torch.device) -> bool:
        return self.inner.speculates(device)

    def begin(self, seqs: RowState) -> None:
        self.inner.begin(seqs)

    def plan(self) -> Tensor | int | None:
        return self.inner.plan()

    def go_on(self, features: Tensor | None, level: int) -> Tensor | bool:
        return self.inner.go_on(features, level)

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        self.inner.observe(drafted, accepted, truth)
