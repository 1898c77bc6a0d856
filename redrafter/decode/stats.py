"""Counting what a step did. Rates are made of these counts elsewhere, never here."""

from __future__ import annotations

import time
from contextlib import contextmanager

from redrafter.contracts import StepStats


def no_steps(n_rows: int, depth: int) -> StepStats:
    """The counts of rows before their first step. depth: levels that may be drafted"""
    return StepStats(
        [0] * n_rows, [0] * n_rows, [0] * depth, [0] * depth,
        lengths=[[] for _ in range(n_rows)], matched_at=[0] * depth,
    )  # fmt: skip


class StepTimer:
    """Host wall-clock by part. On an accelerator the parts are the time to *launch* the work,
    their sum is right only because each step reads the host once; `total` is always right."""

    def __init__(self, n_rows: int, depth: int):
        self.stats = no_steps(n_rows, depth)
        self.stats.seconds = {"prefill": 0.0, "draft": 0.0, "lookahead": 0.0, "verify": 0.0}
        self._inner_s = 0.0

    @contextmanager
    def __call__(self, part: str):
        """Time spent in a part inside of another one counts for the inner one alone."""
        outer, self._inner_s = self._inner_s, 0.0
        clock = time.perf_counter()
        yield
        spent = time.perf_counter() - clock
        self.stats.seconds[part] += spent - self._inner_s
        self._inner_s = outer + spent


def count_step(stats: StepStats, row: int, drafted: int, accepted: int, emitted: int) -> None:
    """One step of a live row: levels drafted and accepted, tokens emitted before a stop."""
    stats.steps[row] += 1
    stats.emitted[row] += emitted
    stats.lengths[row].append(emitted)
    for level in range(drafted):
        stats.drafted_at[level] += 1
        stats.accepted_at[level] += level < min(accepted, emitted)
        stats.matched_at[level] += level < accepted
