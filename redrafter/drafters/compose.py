"""Drafters made of other drafters: what is passed on stands here, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth


class Wrapped(Drafter):
    """Drafts as another drafter does; for whoever wants to look on.

    inner: the other drafter; needs: what `observe` must carry besides what that one needs
    """

    def __init__(self, inner: Drafter, needs: frozenset[str] = frozenset()):
        self.inner = inner
        self.needs = inner.needs | needs
        self.max_depth, self.max_nodes = inner.max_depth, inner.max_nodes
        self.borrows_cache, self.drafts_alike = inner.borrows_cache, inner.drafts_alike
        self.feature_names, self.early_features = inner.feature_names, inner.early_features
        self.sees_noise, self.one_path = inner.sees_noise, inner.one_path

    def watch(self, prefill: bool) -> AbstractContextManager:
        return self.inner.watch(prefill)

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.inner.begin(seqs)

    def start(self) -> None:
        self.inner.start()

    def extend(self, level: int) -> None:
        self.inner.extend(level)

    def features(self, names: Sequence[str] | None = None) -> Tensor | None:
        return self.inner.features(names)

    def tree(self) -> TokenTree:
        return self.inner.tree()

    def observe(self, truth: Truth) -> None:
        self.inner.observe(truth)

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def report(self) -> dict[str, Any]:
        return self.inner.report()


class Composite(Drafter):
    """Several drafters, all of which see every generation and every truth.

    kind: for messages; members: name -> drafter, at least two
    together: whether all of them draft in every step
    Raises InputError where two would then write to the target's cache at the same time.
    """

    def __init__(self, kind: str, members: Mapping[str, Drafter], together: bool):
        if len(members) < 2:
            raise InputError(f"{kind}: give at least two drafters")
        borrowers = [name for name, member in members.items() if member.borrows_cache]
        if together and len(borrowers) > 1:
            raise InputError(
                f"{kind}: {' and '.join(borrowers)} draft in the target's cache, and both at the "
                "same time would overwrite each other: keep one"
            )
        self.members = dict(members)
        each = self.members.values()
        self.needs = frozenset().union(*(m.needs for m in each))
        self.borrows_cache = bool(borrowers)
        self.drafts_alike = all(m.drafts_alike for m in each)
        self.max_depth = max(m.max_depth for m in each)
        self.max_nodes = max(m.max_nodes for m in each)

    def identity(self) -> dict[str, Any]:
        members = {name: member.identity() for name, member in self.members.items()}
        return super().identity() | {"nodes": self.max_nodes, "members": members}

    def watch(self, prefill: bool) -> AbstractContextManager:
        stack = ExitStack()
        for member in self.members.values():
            stack.enter_context(member.watch(prefill))
        return stack

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        for member in self.members.values():
            member.begin(seqs)

    def observe(self, truth: Truth) -> None:
        for member in self.members.values():
            member.observe(truth)
