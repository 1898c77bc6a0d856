"""Where every token of a text came from: drafted, put right by the target, or added by it. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from redrafter.contracts import Drafter, RowState, TokenTree, Truth
from redrafter.drafters.compose import Composite, Wrapped

Kind = Literal["first", "drafted", "corrected", "bonus", "undrafted"]

#: what a token was to the step that emitted it
KINDS: dict[Kind, str] = {
    "drafted": "drafted, and accepted",
    "corrected": "the target's own, in place of what was drafted there",
    "bonus": "the target's own, behind a draft that was accepted whole",
    "undrafted": "the target's own, in a step that drafted nothing",
    "first": "the target's own, by the pass over the prompt",
}


@dataclass(frozen=True)
class Origin:
    """token: its id; step: which of the target's forwards emitted it, 0 is the prompt's; depth: of
    the draft, 0 where it was not drafted; by: names of the drafters that proposed it; p: its
    probability by the target, at the temperature, before top-k and the like; q: by the drafter,
    None where it tells none; rejected: what was drafted in its place, the likeliest first
    """

    token: int
    kind: Kind
    step: int
    depth: int = 0
    by: tuple[str, ...] = ()
    p: float | None = None
    q: float | None = None
    rejected: tuple[tuple[int, float | None], ...] = ()


class _Kept(Wrapped):
    """Remembers the tree that it drafted in this step."""

    last: TokenTree | None = None

    def start(self) -> None:
        self.last = None
        super().start()

    def tree(self) -> TokenTree:
        self.last = super().tree()
        return self.last


class Tracer(Wrapped):
    """Drafts one row as another drafter does, and notes where the row's tokens came from.

    name: the other drafter's. Of a drafter made of several, those are named that proposed a token.
    origins: of every token that was emitted, those behind a stop included
    """

    def __init__(self, inner: Drafter, name: str):
        super().__init__(inner, frozenset({"logits"}))
        self.name = name
        self.members: dict[str, _Kept] = {}
        if isinstance(inner, Composite):
            self.members = {key: _Kept(member) for key, member in inner.members.items()}
            inner.members = dict(self.members)

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.origins: list[Origin] = []
        self.step = 0

    def start(self) -> None:
        for member in self.members.values():  # one that is not asked in this step has no tree
            member.last = None
        super().start()

    def observe(self, truth: Truth) -> None:
        super().observe(truth)
        tokens = truth.tokens[0].tolist()
        if truth.tree is None:
            self._note("first", tokens[0], self._p(truth, 0, tokens[0]))
            return
        self.step += 1
        tree, path = truth.tree, [0]
        for depth, token in enumerate(tokens, start=1):
            p = self._p(truth, depth - 1, token)
            below = _children(tree, path[-1])
            hit = next((node for node in below if int(tree.tokens[0, node]) == token), None)
            if hit is None:
                kind: Kind = "corrected" if below else "bonus" if depth > 1 else "undrafted"
                wrong = [(int(tree.tokens[0, node]), _q(tree, node)) for node in below]
                wrong.sort(key=lambda guess: -(guess[1] or 0.0))
                self._note(kind, token, p, rejected=tuple(wrong))
                return
            path.append(hit)
            by = self._by(tokens[:depth])
            self._note("drafted", token, p, depth=depth, by=by, q=_q(tree, hit))

    def _note(self, kind: Kind, token: int, p: float | None, **more) -> None:
        self.origins.append(Origin(token, kind, self.step, p=p, **more))

    def _p(self, truth: Truth, place: int, token: int) -> float | None:
        if truth.logits is None:
            return None
        scores = truth.logits[0, place].double() / self.seqs.temperature
        return float(torch.softmax(scores, -1)[token])

    def _by(self, path: list[int]) -> tuple[str, ...]:
        """Of the members those whose own tree holds the path."""
        found = [key for key, member in self.members.items() if _holds(member.last, path)]
        return tuple(found) or (self.name,)


def _children(tree: TokenTree, node: int) -> list[int]:
    below: Tensor = (tree.parent[0] == node) & tree.valid[0]
    below[0] = False
    return below.nonzero()[:, 0].tolist()


def _q(tree: TokenTree, node: int) -> float | None:
    """The drafter's probability of a node, given those above it."""
    if tree.log_q is None:
        return None
    q = float((tree.log_q[0, node] - tree.log_q[0, tree.parent[0, node]]).exp())
    return q if 0.0 <= q <= 1.0 + 1e-6 else None


def _holds(tree: TokenTree | None, path: list[int]) -> bool:
    """Whether a path from the root is in a tree; equal siblings are all followed."""
    nodes = [] if tree is None else [0]
    for token in path:
        nodes = [
            child for node in nodes for child in _children(tree, node)
            if int(tree.tokens[0, child]) == token
        ]  # fmt: skip
    return bool(nodes)
