"""The drafter contract, shown by the shortest drafter that sometimes helps.

It guesses that the text goes on as it did after the previous occurrence of the last token: one
chain of K tokens, no network, no state of its own. Copy this file to write a drafter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redrafter.contracts import Drafter, TokenTree
from redrafter.drafters.features import columns


class DummyDrafter(Drafter):
    """Proposes the K tokens that followed the last token's most recent earlier occurrence."""

    needs = frozenset()  # neither hidden states nor logits of the target
    one_path = True  # a chain, so a target that verifies nothing else takes all of it
    feature_names = ("found",)  # one column for a lookahead to read

    def __init__(self, depth: int = 4):
        self.max_depth = depth  # K: `extend` is called at most this often per step
        self.max_nodes = 1 + depth  # N: the root and one node per level

    # `begin` is inherited: it keeps `self.seqs`, which the loop updates in place.

    def start(self) -> None:
        """Once per step, before the first level: find where the last token stood before."""
        ids, length = self.seqs.ids, self.seqs.length
        place = torch.arange(ids.shape[1], device=ids.device)
        earlier = (ids == self.seqs.root[:, None]) & (place < length[:, None] - 1)
        self.found = earlier.any(1)  # (B,) bool
        self.match = torch.where(earlier, place, 0).amax(1)  # (B,) its most recent position
        self.levels: list[Tensor] = []

    def extend(self, level: int) -> None:
        """Add level `level` = 1, 2, ..."""
        place = (self.match + level)[:, None]
        # What lies past the end is not known: any token may stand there, it is marked invalid.
        inside = place[:, 0] < self.seqs.length
        token = self.seqs.ids.gather(1, place.clamp(max=self.seqs.ids.shape[1] - 1))[:, 0]
        self.levels.append(torch.stack([token, (self.found & inside).long()]))

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        """(B, F) for a lookahead to read; here the same at every level."""
        return columns(self.found.float()[:, None], self.feature_names, names)

    def tree(self) -> TokenTree:
        """Everything drafted in this step; node 0 is the root, parents precede children."""
        root = self.seqs.root
        tokens = torch.stack([root, *(level[0] for level in self.levels)], 1)
        valid = torch.stack([torch.ones_like(root), *(level[1] for level in self.levels)], 1)
        depth = torch.arange(tokens.shape[1], device=root.device).expand_as(tokens)
        return TokenTree(tokens, (depth - 1).clamp(min=0), depth, valid.bool())
