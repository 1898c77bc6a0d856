"""The numbers that are quoted, from counts and times. Pure functions; definitions as in the design.

Intervals are percentile bootstraps over prompts: the prompts of a table are a sample, and every
figure is computed anew on prompts drawn from them with replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from redrafter.contracts import StepStats

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


def engine_figures(stats: StepStats, tokens: int, draft_tokens: int) -> dict[str, Any]:
    """The same run as engines count it, under the names that vLLM gives (docs/serving.md).

    stats: pooled over rows; tokens: emitted, the prefill's own included; draft_tokens: verified
    num_drafts: steps with a draft; accepted tokens behind a stop count, steps without a draft do
        not. mean_acceptance_length: 1 + accepted / drafts; draft_acceptance_rate: accepted / draft
        tokens; per_position_acceptance_rate: of all drafts, those accepted to that position;
        acceptance_histogram: drafts by how many of their tokens were accepted, 0 .. K
    spec_accept_length: SGLang's, tokens / steps
    None where nothing was drafted.
    """
    drafts = stats.drafted_at[0] if stats.drafted_at else 0
    accepted, steps = sum(stats.matched_at), sum(stats.steps)
    at_least = [drafts, *stats.matched_at, 0]
    return {
        "num_drafts": drafts,
        "num_draft_tokens": draft_tokens,
        "num_accepted_tokens": accepted,
        "mean_acceptance_length": 1 + accepted / drafts if drafts else None,
        "draft_acceptance_rate": accepted / draft_tokens if draft_tokens else None,
        "per_position_acceptance_rate": [n / drafts if drafts else None for n in stats.matched_at],
        "acceptance_histogram": [a - b for a, b in pairwise(at_least)],
        "spec_accept_length": tokens / steps if steps else None,
        "steps_without_draft": steps - drafts,
    }


def speed_bound(tau: float, t_1_s: float, draft_s: float, t_n_s: float) -> float:
    """What a drafter could gain over plain decoding if a step were its draft and one forward.

    tau: tokens per step; t_1_s, t_n_s: forward of 1 and of N new tokens; draft_s: of all levels
    """
    return tau * t_1_s / (draft_s + t_n_s)
