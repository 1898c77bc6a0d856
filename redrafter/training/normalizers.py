"""What turns some of the target's logits into log-probabilities without the others.

A head with a pruned vocabulary compares itself with log p of the Vd columns that it has. They are
logits less log Z, the logarithm of the sum over all V columns, and that is one number per position
of the text: made once per row, it spares every depth of every step the projection onto V columns
(at V = 49k and Vd = 4k most of a training step). Those of a store's rows are kept in the cache
folder, for the next training on it. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.bars import Bar
from redrafter.data.states import decoded
from redrafter.files import cache_folder, digest_json, write_tensors
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
    of that row alone, whatever was asked for before, so a resumed run finds the same.

    stores: of each part of the data, the digest of the store that its rows lie in; None where they
        lie in none, and nothing is kept
    """

    def __init__(self, target: Target, stores: Sequence[str | None] = ()):
        self.target, self.chunk = target, chunk_of(target)
        self.dtype = torch.promote_types(target.dtype, torch.float32)
        self._kept = [None if name is None else Kept(folder_of(target, name)) for name in stores]
        self._known = {
            (part, row): log_z
            for part, kept in enumerate(self._kept) if kept is not None
            for row, log_z in kept.read(self.dtype)
        }  # fmt: skip

    def of(self, columns: dict[str, Tensor], offsets: Tensor, keys: Tensor) -> Tensor:
        """(S,) float32 (float64 of such a target), zero where nothing that is supervised follows.

        columns: flat, of R rows; offsets: (R + 1,); keys: (R, 2) int64: part and row in it
        """
        found = torch.zeros(int(offsets[-1]), dtype=self.dtype)
        bounds, rows = offsets.tolist(), [tuple(key) for key in keys.tolist()]
        new = [row for row in rows if row not in self._known]
        with Bar(total=len(new), desc="normalizers of rows", unit="row",
                 disable=not (new and is_main())) as bar:  # fmt: skip
            for row, (begin, end) in zip(rows, pairwise(bounds), strict=True):
                at = begin + columns["supervised"][begin + 1 : end].nonzero()[:, 0]
                if row not in self._known:
                    self._known[row] = self._made(columns, at)
                    bar.update(1)
                found[at] = self._known[row]
        self._keep(new)
        return found

    def _keep(self, rows: Sequence[tuple[int, ...]]) -> None:
        for part, kept in enumerate(self._kept):
            made = {row: self._known[part, row] for p, row in rows if p == part}
            if kept is not None and made:
                kept.write(made)

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


def folder_of(target: Target, store: str) -> Path:
    """Where the numbers of a store's rows are kept: named after all that they depend on. store: its
    digest"""
    scale = [target._logit_scale, target._logit_cap, target.wide_head is not None]
    computed = [str(target.dtype), target.device.type, chunk_of(target), *scale]
    name = digest_json([store, target.fingerprint(), *computed])
    return cache_folder() / "normalizers" / name[:32]


class Kept:
    """Numbers of rows in a folder, one file for those that were made together, so that several
    processes may write at a time: `row` (R,) int64, `count` (R,) int64, `log_z` (sum of count,)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Rows and their numbers. A file that is not whole is as good as none."""
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safetensors.safe_open(file, framework="pt") as opened:
                    row, count, log_z = (opened.get_tensor(n) for n in ("row", "count", "log_z"))
            except (OSError, safetensors.SafetensorError):
                continue
            whole = len(row) == len(count) and int(count.sum()) == len(log_z)
            if whole and log_z.dtype == dtype:
                yield from zip(row.tolist(), log_z.split(count.tolist()), strict=True)

    def write(self, made: dict[int, Tensor]) -> None:
        """Nothing where there is no room for it: it is made again."""
        rows = sorted(made)
        tensors = {
            "row": torch.tensor(rows),
            "count": torch.tensor([len(made[row]) for row in rows]),
            "log_z": torch.cat([made[row] for row in rows]),
        }
        try:
            write_tensors(self.folder / f"{digest_json(rows)[:32]}.safetensors", tensors)
        except OSError:
            return
