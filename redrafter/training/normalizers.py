"""What turns some of the target's logits into log-probabilities without the others.

A head with a pruned vocabulary compares itself with log p of the Vd columns that it has. They are
logits less log Z, the logarithm of the sum over all V columns, and that is one number per position
of the text: made once per row, it spares every depth of every step the projection onto V columns
(at V = 49k and Vd = 4k most of a training step). Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.bars import Bar
from redrafter.data.states import decoded
from redrafter.processes import is_main
from redrafter.targets.model import Target

#: numbers of logits that are made at once, 16 MB in float32
_LOGITS = 1 << 22


def projects_columns(target: Target) -> bool:
    """Whether `Target.project` can give some columns only: of a plain matrix that is all here."""
    return type(target.lm_head) is nn.Linear and not target.sharded


def needs_normalizers(target: Target, pruned: bool, teacher: str | None) -> bool:
    """Whether a head's batches carry log Z. pruned: it has some of the target's tokens; teacher:
    what its losses compare with, see `needed_teacher`"""
    return pruned and teacher == "states" and projects_columns(target)


def chunk_of(target: Target) -> int:
    """Positions projected onto V columns at a time, always as many: products of one shape need the
    same memory again and again, of many shapes an allocator's heap grows to several GB."""
    return max(8, min(64, _LOGITS // target.vocab_size))


@torch.no_grad()
def log_normalizer(target: Target, hidden: Tensor) -> Tensor:
    """(n, H) hidden states -> (n,) log Z, in float32 or wider."""
    logits = target.project(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)


class Normalizers:
    """log Z of the positions that labels are predicted from, by row. A row's numbers are a function
    of that row alone, whatever was asked for before, so a resumed run finds the same."""

    def __init__(self, target: Target):
        self.target, self.chunk = target, chunk_of(target)
        self.dtype = torch.promote_types(target.dtype, torch.float32)
        self._known: dict[tuple[int, int], Tensor] = {}

    def of(self, columns: dict[str, Tensor], offsets: Tensor, keys: Tensor) -> Tensor:
        """(S,) float32 (float64 of such a target), zero where nothing that is supervised follows.

        columns: flat, of R rows; offsets: (R + 1,); keys: (R, 2) int64, what tells rows apart
        """
        found = torch.zeros(int(offsets[-1]), dtype=self.dtype)
        bounds, rows = offsets.tolist(), [tuple(key) for key in keys.tolist()]
        new = sum(key not in self._known for key in rows)
        with Bar(total=new, desc="normalizers of rows", unit="row",
                 disable=not (new and is_main())) as bar:  # fmt: skip
            for row, key in enumerate(rows):
                begin, end = bounds[row], bounds[row + 1]
                at = begin + columns["supervised"][begin + 1 : end].nonzero()[:, 0]
                if key not in self._known:
                    self._known[key] = self._made(columns, at)
                    bar.update(1)
                found[at] = self._known[key]
        return found

    def _made(self, columns: dict[str, Tensor], at: Tensor) -> Tensor:
        target, chunk = self.target, self.chunk
        found = torch.empty(len(at), dtype=self.dtype)
        for first in range(0, len(at), chunk):
            part = at[first : first + chunk]
            hidden = decoded(columns, part, target.dtype, target.hidden_size)
            hidden = F.pad(hidden, (0, 0, 0, chunk - len(part)))
            log_z = log_normalizer(target, hidden.to(target.device))
            found[first : first + chunk] = log_z[: len(part)].cpu()
        return found
