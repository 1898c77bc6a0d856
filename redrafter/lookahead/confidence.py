"""Stop drafting at a token that the drafter itself holds improbable; the bar stays where it is.

Source: `assistant_confidence_threshold` of transformers' assisted generation. Theirs is for one
sequence and one kind of drafter; here every row stops by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from redrafter.contracts import Drafter, InputError, Lookahead, RowState

#: Features that say how sure a drafter is; the first one that it publishes is read.
_OF_THE_TOKEN = ("p_token", "p_level")
_OF_THE_PATH = ("chain_score", "best_log_q")


class ConfidenceLookahead(Lookahead):
    """Go on iff q(drafted token) >= threshold. The token below the bar stays in the draft and is
    verified: to drop what was drawn because of what it is would bias sampled drafts.

    q is the feature `p_token` or `p_level`. Ours: drafters that do not know the chance of a token
    but a score of the path down to it, `chain_score` (lookup, suffix) or `best_log_q` (bigram,
    recycling), go on iff exp(score) >= threshold. For a copied chain that is also the better
    question: its tokens are all equally sure, so a bar for each is all of the chain or nothing.

    feature_names: the drafter's
    threshold: 0 to 1
    Raises InputError where the drafter says none of these, or the threshold is out of range.
    """

    def __init__(self, feature_names: Sequence[str], threshold: float = 0.4):
        known = [n for n in (*_OF_THE_TOKEN, *_OF_THE_PATH) if n in feature_names]
        if not known:
            said = ", ".join(feature_names) or "nothing"
            raise InputError(
                f"confidence: the drafter publishes {said}, and not how sure it is: use one with "
                f"{', '.join((*_OF_THE_TOKEN, *_OF_THE_PATH))}, or a lookahead that does not ask"
            )
        if not 0 <= threshold <= 1:
            raise InputError(f"confidence: threshold {threshold} is not between 0 and 1")
        self.name, self.threshold = known[0], threshold
        self.reads = (self.name,)

    @classmethod
    def of(cls, drafter: Drafter, **options):
        """For this drafter. options: as above."""
        return cls(drafter.feature_names, **options)

    def begin(self, seqs: RowState) -> None:
        self._coming: Tensor | None = None

    def confidence(self, features: Tensor | None, level: int) -> Tensor | None:
        """(B,) q of the level just drafted; None where there is none: before the first level, and
        where a draft model has no room in its context. Called once per level."""
        if features is None:
            return None
        q = features[:, 0]
        if self.name in _OF_THE_PATH:
            score, q = q, q.exp()
        if self.name == "chain_score":  # said of the level to come; 0 where nothing comes
            q, self._coming = self._coming, q * (score < 0)
        return None if level == 0 else q

    def go_on(self, features: Tensor | None, level: int) -> Tensor | bool:
        q = self.confidence(features, level)
        return level == 0 if q is None else q >= self.threshold
