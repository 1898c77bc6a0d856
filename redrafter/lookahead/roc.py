"""Stop drafting at an improbable token; the bar is the best one for all tokens judged so far.

Source: the update of `assistant_confidence_threshold` in transformers' assisted generation (on with
scikit-learn installed), with its constants. Theirs is for one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from redrafter.contracts import InputError, Truth
from redrafter.lookahead.confidence import ConfidenceLookahead

_PATIENCE = 1000  # so many times more samples than new ones are too many for a new estimate


def best_threshold(q: np.ndarray, right: np.ndarray, miss_weight: float) -> float:
    """The threshold of least cost = fpr + miss_weight (1 - tpr), for "right iff q >= threshold".

    q: (n,) ascending; right: (n,) bool, some are and some are not. The thresholds tried are the
    values of q, as by scikit-learn's `roc_curve`; of equally good ones the highest.
    """
    first = np.flatnonzero(np.diff(q, prepend=-np.inf))  # where a new value begins
    missed = np.concatenate([[0], np.cumsum(right)])[first]  # right ones below it
    n_right = int(right.sum())
    n_wrong = len(right) - n_right
    passed = n_wrong - (first - missed)  # wrong ones not below it
    cost = passed * n_right + miss_weight * missed * n_wrong  # times n_right n_wrong: exact
    return float(q[first][::-1][cost[::-1].argmin()])


class RocLookahead(ConfidenceLookahead):
    """`ConfidenceLookahead` with a threshold that is estimated anew after every verification.

    Every accepted level is a sample (q, 1), the first rejected one (q, 0), and what was drafted
    behind it is none. Once there are `least_samples` and both kinds of them, the threshold is the
    one of least fpr + miss_weight (1 - tpr). Samples are those of all rows, and are kept as long
    as this object lives. Ours: level K is no sample (nothing is decided behind it, so its q is not
    asked for); and an estimate waits until more than a thousandth of its samples are new, since one
    takes 0.05, 0.14 and 3 ms with 1,000, 10,000 and 100,000 samples (x86-64, one thread). Below
    1,000 samples that is after every verification.

    feature_names: the drafter's, as for `ConfidenceLookahead`
    threshold: before there is an estimate
    least_samples: transformers' "more than 5"
    miss_weight: what stopping too early costs, stopping too late being 1
    Raises InputError as `ConfidenceLookahead`, and for a number out of its range.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        threshold: float = 0.4,
        *,
        least_samples: int = 6,
        miss_weight: float = 3.0,
    ):
        super().__init__(feature_names, threshold)
        if least_samples < 2:
            raise InputError(f"roc: least_samples {least_samples} must be at least 2")
        if not miss_weight > 0:
            raise InputError(f"roc: miss_weight {miss_weight} must be positive")
        self.least_samples, self.miss_weight = least_samples, miss_weight
        self.q, self.right = np.zeros(0), np.zeros(0, dtype=bool)  # the samples, by q
        self._new: list[tuple[float, bool]] = []  # those not yet among them
        self._asked: list[Tensor] = []  # in this step, q (B,) of level 1, 2, ...

    def confidence(self, features: Tensor | None, level: int) -> Tensor | None:
        q = super().confidence(features, level)
        if q is not None:
            self._asked.append(q)
        return q

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        """One read of the host."""
        asked, self._asked = self._asked, []
        if not asked:
            return
        judged = torch.minimum(accepted + 1, drafted)
        rows = torch.stack([*asked, accepted.to(asked[0]), judged.to(asked[0])], 1).tolist()
        self._new += [
            (q, level <= n_accepted)
            for *qs, n_accepted, n_judged in rows
            for level, q in enumerate(qs, start=1)
            if level <= n_judged
        ]
        if len(self._new) * _PATIENCE > len(self.q):
            self._learn()

    def _learn(self) -> None:
        q, right = (np.array(x) for x in zip(*sorted(self._new), strict=True))
        place = np.searchsorted(self.q, q)
        self.q, self.right = np.insert(self.q, place, q), np.insert(self.right, place, right)
        self._new = []
        if len(self.q) >= self.least_samples and 0 < self.right.sum() < len(self.right):
            self.threshold = best_threshold(self.q, self.right, self.miss_weight)
