"""The numbers that are quoted, from counts and times. Pure functions; definitions as in the design.

Intervals are percentile bootstraps over prompts: the prompts of a table are a sample, and every
figure is computed anew on prompts drawn from them with replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

BOOTSTRAP_DRAWS = 2000
#: Two-sided, in percent.
INTERVAL = (2.5, 97.5)
LOOP_NGRAM = 4

Interval = tuple[float, float, float]  # value, low, high


def bootstrap(
    statistic: Callable[..., np.ndarray], *columns: Sequence[float], seed: int = 0
) -> Interval:
    """A statistic of prompts and its 95 % interval.

    statistic: takes one array (..., P) per column and reduces the last axis
    columns: one value per prompt each
    """
    data = [np.asarray(column, dtype=float) for column in columns]
    value = float(statistic(*data))
    draws = np.random.default_rng(seed).integers(len(data[0]), size=(BOOTSTRAP_DRAWS, len(data[0])))
    low, high = np.percentile(statistic(*(column[draws] for column in data)), INTERVAL)
    return value, float(low), float(high)


def median(ratios: np.ndarray) -> np.ndarray:
    return np.median(ratios, axis=-1)


def pooled(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Ratio of sums; prompts without any denominator (answered by the prefill alone) drop out."""
    return numerator.sum(-1) / np.maximum(denominator.sum(-1), 1)


def mean_of_ratios(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Mean over the prompts that have a denominator."""
    some = denominator > 0
    ratio = np.where(some, numerator / np.maximum(denominator, 1), 0.0)
    return ratio.sum(-1) / np.maximum(some.sum(-1), 1)


def loop_share(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float | None:
    """Share of generated tokens that end a 4-gram which the row has shown before.

    rows: (prompt, answer) token ids. A row is prompt and answer together; only positions of the
    answer are counted, those with fewer than four tokens up to them not at all. None if there are
    no such positions.
    """
    repeated = counted = 0
    for prompt, answer in rows:
        text, shown = [*prompt, *answer], set()
        for end in range(LOOP_NGRAM, len(text) + 1):
            gram = tuple(text[end - LOOP_NGRAM : end])
            if end > len(prompt):
                counted += 1
                repeated += gram in shown
            shown.add(gram)
    return repeated / counted if counted else None


def acceptance(drafted_at: Sequence[int], accepted_at: Sequence[int]) -> dict[str, list]:
    """Per depth k = 1..K, pooled over steps.

    unconditional: steps whose first k levels were all accepted / steps that drafted at least k
    conditional: the same, divided by that of k - 1: the chance of level k given that the levels
    above it were accepted (exactly so where all steps draft to the same depth)
    None at a depth that no step drafted.
    """
    unconditional: list[float | None] = [
        accepted / drafted if drafted else None
        for drafted, accepted in zip(drafted_at, accepted_at, strict=True)
    ]
    conditional: list[float | None] = []
    for rate, above in zip(unconditional, [1.0, *unconditional], strict=False):
        conditional.append(rate / above if rate is not None and above else None)
    return {"unconditional": unconditional, "conditional": conditional}


def speed_bound(tau: float, t_1_s: float, draft_s: float, t_n_s: float) -> float:
    """What a drafter could gain over plain decoding if a step were its draft and one forward.

    tau: tokens per step; t_1_s, t_n_s: forward of 1 and of N new tokens; draft_s: of all levels
    """
    return tau * t_1_s / (draft_s + t_n_s)
