"""As many levels as will be accepted: the most that any lookahead could gain. For reports only.

Under the seeded rule (or decoding greedily) the text does not depend on what is drafted. So where
full-depth drafting accepts m levels at some position, drafting just m there accepts them too and
goes on at the same next position: decoding once by `FullDepth` tells all that
`OracleLookahead` needs. Source: the oracle of DISCO (arXiv 2405.04304); by position, ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from redrafter.contracts import InputError, Lookahead, RowState, Truth

_ALL = 2**31


class FullDepth(Lookahead):
    """Drafts all levels and notes what was accepted.

    depths: of the last generation, per row {tokens known before a step: levels accepted in it}
    """

    level_by_level = False

    def begin(self, seqs: RowState) -> None:
        self.seqs = seqs
        self.depths: list[dict[int, int]] = [{} for _ in seqs.length]
        self._before: list[tuple[int, bool]] = []

    def plan(self) -> None:
        pairs = zip(self.seqs.length.tolist(), self.seqs.live.tolist(), strict=True)
        self._before = list(pairs)

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        if truth.tree is None:  # the prefill
            return
        for row, (length, live), n in zip(
            self.depths, self._before, accepted.tolist(), strict=True
        ):
            if live:
                row[length] = n


class OracleLookahead(Lookahead):
    """Plans for every row what `FullDepth` saw accepted where the row is now.

    depths: `FullDepth.depths` of the same prompts, seeds and settings; None knows nothing yet
    strict: raise InputError at a position that is not known. A drafter that guesses differently
        once it has drafted, or been told, something else (one that learns from its own trees, or
        draws anew in every run) gets there, and so does, below float64, a text that rounding has
        changed. False drafts to full depth there and counts such steps of rows in `unknown_steps`
    """

    level_by_level = False

    def __init__(self, depths: Sequence[Mapping[int, int]] | None = None, strict: bool = True):
        self.depths, self.strict, self.unknown_steps = depths, strict, 0

    def begin(self, seqs: RowState) -> None:
        if self.depths is None:
            raise InputError(
                "oracle: it knows nothing of these prompts: decode them by FullDepth first, and "
                "give it what was accepted (eval/speed.py and eval/lossless.py do)"
            )
        if len(self.depths) != len(seqs.length):
            raise InputError(
                f"oracle: it knows a batch of {len(self.depths)} rows, this one has "
                f"{len(seqs.length)}: decode by FullDepth in the same batches"
            )
        self.seqs = seqs

    def plan(self) -> Tensor:
        """One read of the host per step."""
        seqs, planned = self.seqs, []
        rows = zip(self.depths, seqs.length.tolist(), seqs.live.tolist(), strict=True)
        for row, (known, length, live) in enumerate(rows):
            unknown = live and length not in known
            if unknown and self.strict:
                raise InputError(
                    f"oracle: row {row} has {length} tokens, where full-depth drafting was never: "
                    "the drafter's guesses depend on what it drafted before, which no oracle "
                    "foresees, or rounding changed the text: then allow it with strict=false"
                )
            self.unknown_steps += unknown
            planned.append(_ALL if unknown else known[length] if live else 0)
        return torch.tensor(planned, device=seqs.length.device)
