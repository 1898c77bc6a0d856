"""Stop drafting at a token that the drafter itself holds improbable; the bar follows acceptance.

Source: Draft & Verify's adaptive draft-exiting (arXiv 2309.08168), with its constants. Theirs is a
bar for one sequence; here every row of a batch has its own, and each generation starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, Lookahead, RowState, Truth

GREEDY_START, SAMPLED_START = 0.8, 0.5


class DraftExit(Lookahead):
    """Go on iff q(drafted token) >= th. The token below the bar stays in the draft: to drop what
    was drawn because of what it is would bias sampled drafts.

    After a verification in which a row drafted n > 0 levels, of which m were accepted:
        A   = beta1 A + (1 - beta1) m / n              (A starts at 0)
        th' = th + eps where A < alpha, else th where n = K, else th - eps
        th  = beta2 th + (1 - beta2) th'
    so a row that has accepted too little drafts shorter, one that has accepted enough longer,
    until it drafts all K levels.

    feature_names: the drafter's; one of them is `name`, the column of q(drafted token)
    max_depth: K, the drafter's
    threshold: th at the start; None is 0.8 for greedy decoding and 0.5 for sampling
    alpha, beta1, beta2, eps: the paper's
    Raises InputError where the drafter does not say q, or a number is not in its range.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        max_depth: int,
        *,
        name: str = "p_token",
        threshold: float | None = None,
        alpha: float = 0.9,
        beta1: float = 0.5,
        beta2: float = 0.9,
        eps: float = 0.01,
    ):
        if name not in feature_names:
            said = ", ".join(feature_names) or "nothing"
            raise InputError(
                f"draft exit: the drafter publishes {said}, not {name}: use one that does (skip)"
            )
        given = {"alpha": alpha, "beta1": beta1, "beta2": beta2, "eps": eps}
        for option, value in (*given.items(), ("threshold", threshold)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"draft exit: {option} {value} is not between 0 and 1")
        self.reads, self.max_depth, self.start = (name,), max_depth, threshold
        self.alpha, self.beta1, self.beta2, self.eps = alpha, beta1, beta2, eps

    @classmethod
    def of(cls, drafter: Drafter, **options) -> DraftExit:
        """For this drafter: `speculative(..., drafter=drafter, lookahead=DraftExit.of(drafter))`.
        options: as above."""
        return cls(drafter.feature_names, drafter.max_depth, **options)

    def begin(self, seqs: RowState) -> None:
        start = self.start
        if start is None:
            start = GREEDY_START if seqs.seeds is None else SAMPLED_START
        self.accepted = torch.zeros(len(seqs.length), device=seqs.length.device)  # A (B,)
        self.threshold = torch.full_like(self.accepted, start)  # th (B,)

    def go_on(self, features: Tensor, level: int) -> Tensor:
        return features[:, 0] >= self.threshold

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        told = drafted > 0
        rate = accepted / drafted.clamp(min=1)
        mean = self.beta1 * self.accepted + (1 - self.beta1) * rate
        lower = torch.where(drafted >= self.max_depth, 0.0, -self.eps)
        wanted = self.threshold + torch.where(mean < self.alpha, self.eps, lower)
        threshold = self.beta2 * self.threshold + (1 - self.beta2) * wanted
        self.accepted = torch.where(told, mean, self.accepted)
        self.threshold = torch.where(told, threshold, self.threshold)
