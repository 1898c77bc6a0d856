"""No draft at all: the arm of a selector that says "do not speculate here"."""

from __future__ import annotations

from redrafter.contracts import Drafter, TokenTree, root_tree


class NoDraft(Drafter):
    """Every tree is its root: one token per step, as in plain decoding."""

    def start(self) -> None:
        pass

    def extend(self, level: int) -> None:
        raise AssertionError("there are no levels")

    def tree(self) -> TokenTree:
        return root_tree(self.seqs.root)
