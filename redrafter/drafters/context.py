"""c of every row, the context that a head drafts from, kept up with the text as it is decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.contracts import RowState, Truth
from redrafter.heads.base import DraftHead
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target


class HeadContext:
    """c for one head, whoever drafts with it: `begin`, then `observe` with every truth.

    rounded: whether the head drafts by matrices in bfloat16, see `DraftHead.round_while_drafting`
    needs: what `observe` must carry; see `Drafter.needs`
    A head that reads the prefix runs its layer over what a step emitted, with keys and values of
    its own for what came before. `Truth` has just these pairs: hidden state i led to token i, the
    one behind it. Rows are as long as they are; a row that has ended reads nothing that matters.
    """

    def __init__(self, head: DraftHead, target: Target, rounded: bool = True):
        self.head, self.target, self.rounded = head, target, rounded
        #: a head may compute in more digits than its target
        self.dtype = torch.promote_types(target.dtype, head.dtype)
        self.needs = frozenset({"hidden"})
        if head.reads_prefix:
            self.needs |= {"prompt_hidden"}

    def begin(self, seqs: RowState) -> None:
        """A new generation starts."""
        self.head.round_while_drafting(self.rounded)
        self.seqs = seqs
        self._cache: RowCache | None = None

    def observe(self, truth: Truth) -> Tensor:
        """(B, 1, H): c of the root that `truth` established."""
        if not self.head.reads_prefix:
            return self.head.contexts(self.target, self._own(truth.last_hidden()[:, None]))
        if truth.prompt_hidden is None:
            return self._read(truth.hidden, truth.tokens, truth.count)
        batch, n = truth.prompt_hidden.shape[:2]
        room = self.seqs.ids.shape[1]
        self._cache = RowCache(1, batch, room, truth.prompt_hidden.device)
        tokens = self.seqs.ids[:, 1 : n + 1]  # the last one of each row is its root
        return self._read(truth.prompt_hidden, tokens, self.seqs.prompt_length)

    def _read(self, hidden: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
        """c after the first `count` (B,) of some pairs. hidden: (B, n, .), as the target
        gives it; tokens: (B, n)"""
        place = torch.arange(hidden.shape[1], device=hidden.device)
        self._cache.prepare(hidden.shape[1], place >= count[:, None])
        found = self.head.contexts(self.target, self._own(hidden), tokens, self._cache)
        self._cache.commit([n - 1 for n in self.seqs.known_lengths()])
        last = (count - 1).clamp(min=0)[:, None, None]
        return found.gather(1, last.expand(-1, -1, found.shape[-1]))

    def _own(self, hidden: Tensor) -> Tensor:
        """Of what the target shows, perhaps for other heads too, what this one reads."""
        return self.target.pick(hidden, self.head.aux_layers).to(self.dtype)
