"""How many nodes to verify, and how many levels to draft, by what both cost on this device.

The score of a node is the drafter's estimate of how probably it is accepted, so the sum over a tree
estimates the drafted tokens that a step will emit (EAGLE-2, arXiv 2406.16858; OPT-Tree, arXiv
2406.17276). Both papers fix the number of nodes; OPT-Tree ends the draft where another level adds
less than a constant. Here measured seconds take the place of both constants:

- N: of the sizes in `decode.tree.BUCKETS`, the one that makes tokens / seconds of this step
  largest, (1 + sum of the N - 1 best scores) / (draft + t(N)); or, with `rule` "rate", tokens -
  lambda t(N), which is what the average over all steps asks for.
- depth: level g + 1 is drafted iff P(accepted through g + 1) > lambda (level + t(N + 1) - t(N)).
  Level g's scores sum up to P(accepted through g), m_g; the next one is taken as m_g m_g / m_(g-1).

lambda is tokens per second as achieved so far, in modelled seconds (forwards and levels of the
table), so that a draft does not depend on the clock. Ours, as is the calibration: a head may be too
sure of itself, more so at depth, so scores of depth d are multiplied by (accepted through d) /
(sum of scores of depth d that were verified), counted as it goes.
What is verified never changes the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from redrafter.contracts import InputError, TokenTree, Truth
from redrafter.decode.tree import BUCKETS, best_nodes
from redrafter.drafters.profile import find_drafter, forward_seconds, read_costs
from redrafter.targets.model import Target

_PRIOR_STEPS = 16  # steps of plain decoding, and of perfect calibration, that are counted first


class NodeBudget:
    """Chooses N in every step for the whole batch (the mean over its live rows), and the depth.

    forward_s: {N: seconds of a target forward of N new tokens per row}; 1 must be there, between
        two N it is interpolated, and more than the largest N are never verified
    level_s: seconds of drafting level 1, 2, ...; the last one stands for all deeper ones
    start_s: seconds of what else a draft needs
    choose_depth: end the draft early; needs one read of the host per level, so only on a CPU
    rule: how N is chosen, see above
    calibrate: multiply scores by what was accepted of those of their depth

    A drafter calls `start`, `go_on` after each level, `prune`, and `observe`. One budget serves one
    drafter at a time. What it has learned is kept from one generation to the next.
    Raises InputError for costs that are not positive or lack N = 1.
    """

    def __init__(
        self,
        forward_s: dict[int, float],
        level_s: list[float],
        start_s: float = 0.0,
        *,
        choose_depth: bool = True,
        rule: Literal["ratio", "rate"] = "ratio",
        calibrate: bool = True,
    ):
        costs = [*forward_s.values(), *level_s]
        if 1 not in forward_s or not level_s or not min(costs) > 0 or not start_s >= 0:
            raise InputError(
                "budget: forward_s needs seconds > 0 for N = 1 (and for larger N), level_s for at "
                f"least one level, and start_s none below 0; got {forward_s}, {level_s}, {start_s}"
            )
        if rule not in ("ratio", "rate"):
            raise InputError(f"budget: rule {rule!r} is not one of ratio, rate")
        self.max_nodes = max(forward_s)
        known = sorted(forward_s)
        seconds = np.interp(range(1, self.max_nodes + 1), known, [forward_s[n] for n in known])
        self._t = [math.nan, *seconds.tolist()]  # t(N) at index N
        self.level_s, self.start_s = list(level_s), start_s
        self.choose_depth, self.rule, self.calibrate = choose_depth, rule, calibrate
        self._tokens, self._seconds = float(_PRIOR_STEPS), _PRIOR_STEPS * self._t[1]
        self._expected: list[float] = []  # per depth 1, 2, ...: scores that were verified
        self._accepted: list[float] = []

    @classmethod
    def from_costs(
        cls,
        costs: str | Path | dict[str, Any],
        batch: int = 1,
        context: int | None = None,
        *,
        target: Target | None = None,
        drafter: str | None = None,
        allow_other: bool = False,
        **options: Any,
    ) -> NodeBudget:
        """From what `eval/costs.py --head HEAD --out FILE` wrote.

        costs: the file, or its content
        batch: rows per forward; context: tokens in the cache; those that were measured. None takes
            the longest context
        target: to compare with the one that was measured, with its device and threads; None, or
            `allow_other`, takes the table as it is
        drafter: the measured drafter whose levels count; None takes the only one
        options: those of the constructor
        Raises InputError saying what was measured where that is something else.
        """
        name, table = read_costs(costs, None if allow_other else target)
        forward_s = forward_seconds(name, table, batch, context)
        draft, _ = find_drafter(name, table, drafter, batch, context)
        level_s = [level["q1_s"] for level in draft["levels"]]
        start_s = max(0.0, draft["draft"]["q1_s"] - sum(level_s))
        return cls(forward_s, level_s, start_s, **options)

    @property
    def tokens_per_s(self) -> float:
        """lambda: tokens per row and modelled second, so far."""
        return self._tokens / self._seconds

    def factor(self, depth: int) -> float:
        """What scores of this depth are multiplied by. Never more than at the depth before, so
        that a child's score stays below its parent's."""
        best = 1.0 if depth == 0 or not self.calibrate else math.inf
        for expected, accepted in zip(self._expected[:depth], self._accepted, strict=False):
            best = min(best, (accepted + _PRIOR_STEPS) / (expected + _PRIOR_STEPS))
        return 1.0 if best == math.inf else best

    _tree: TokenTree | None = None

    def draft_s(self, drafted: Sequence[float]) -> float:
        """Seconds of a draft by the prices. drafted: per level, the share of the steps that got
        there."""
        return self.start_s + sum(n * self._level_cost(level) for level, n in enumerate(drafted))

    # -- one step, in the order of calls ---------------------------------------------------

    def start(self, live: Tensor, max_nodes: int) -> None:
        """A draft begins. live: (B,) bool; max_nodes: the largest N that may be chosen."""
        self._most = min(max_nodes, self.max_nodes)
        self._live = live
        self._rows = live.nonzero()[:, 0].tolist() if live.device.type == "cpu" else None
        self._levels = 0
        self._masses, self._p = [1.0], [[] for _ in self._rows or ()]

    def go_on(self, log_q: Tensor) -> bool:
        """Whether to draft another level. log_q: (B, W) scores of the level just drafted."""
        self._levels += 1
        if not self.choose_depth or not self._rows:
            return True
        factor, scores = self.factor(self._levels), log_q.tolist()
        for row, p in zip(self._rows, self._p, strict=True):
            p += [math.exp(score) * factor for score in scores[row]]
        width = log_q.shape[1]
        self._masses.append(sum(sum(p[-width:]) for p in self._p) / len(self._p))
        before, now = self._masses[-2:]
        expected = now * now / before if before > 0 else 0.0
        n = self.choose(self._p)
        more = min(n + 1, self._most)
        cost = self._level_cost(self._levels) + self._t[more] - self._t[n]
        return expected > self.tokens_per_s * cost

    def prune(self, tree: TokenTree) -> TokenTree:
        """The N best nodes of the whole tree; one read of the host."""
        self._factors = [self.factor(depth) for depth in range(self._levels + 1)]
        factors = torch.tensor(self._factors, dtype=tree.log_q.dtype, device=tree.log_q.device)
        log_q = tree.log_q + factors.log()[tree.depth]
        p = torch.where(tree.valid, log_q.exp(), 0.0)[:, 1:]
        n = self.choose(p[self._live].tolist())
        self._spent = self._draft_cost() + self._t[n]
        self._tree = best_nodes(replace(tree, log_q=log_q), n)
        return self._tree

    def choose(self, p: list[list[float]]) -> int:
        """N for rows of drafted nodes' (calibrated) scores, the root not among them."""
        if not p:
            return 1
        n = 1 + len(p[0])
        sizes = sorted(s for s in {n, self._most, *BUCKETS} if s <= min(n, self._most))
        best = [list(accumulate(sorted(row, reverse=True), initial=1.0)) for row in p]
        draft = self._draft_cost()

        def gain(size: int) -> float:
            tokens = sum(row[size - 1] for row in best) / len(best)
            if self.rule == "ratio":
                return tokens / (draft + self._t[size])
            return tokens - self.tokens_per_s * self._t[size]

        return max(sizes, key=gain)

    def observe(self, truth: Truth) -> None:
        """What became of the tree. Reads the host, which the loop has just done itself."""
        tree = truth.tree
        if tree is None or tree is not self._tree:  # the prefill, or another drafter's tree
            return
        live = truth.count > 0
        p = torch.where(tree.valid & live[:, None], tree.log_q.exp(), 0.0)
        p = p / torch.tensor(self._factors, dtype=p.dtype, device=p.device)[tree.depth]
        verified = p.new_zeros(len(self._factors)).scatter_add(0, tree.depth.flatten(), p.flatten())
        counts = [count for count in truth.count.tolist() if count]
        if not counts:
            return
        missing = len(self._factors) - 1 - len(self._expected)
        self._expected += [0.0] * missing
        self._accepted += [0.0] * missing
        for depth, expected in enumerate(verified.tolist()[1:], start=1):
            self._expected[depth - 1] += expected
            self._accepted[depth - 1] += sum(count > depth for count in counts)
        self._tokens += sum(counts) / len(counts)
        self._seconds += self._spent

    def _draft_cost(self) -> float:
        """Seconds of what was drafted in this step."""
        return self.start_s + sum(map(self._level_cost, range(self._levels)))

    def _level_cost(self, level: int) -> float:
        """Seconds of the level with this index (0 is the first)."""
        return self.level_s[min(level, len(self.level_s) - 1)]
