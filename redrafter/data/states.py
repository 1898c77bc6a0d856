"""Third stage: what a head reads and learns at every position, made by one teacher-forced pass.

Columns added to tokens and masks, flat over the tokens of all rows:

    states (S, (1 + n) H)     hidden state that feeds lm_head, and behind it what each of n layers
                              gave (`StatesConfig.aux_layers`), in the store's dtype
    scale (S, 1 + n) float32  only for int8: states = int8 * scale, one scale for each of them
    continuation (S, n) int32 what the target says greedily after the row up to and including this
                              position; -1 where nothing is supervised next, and after an EOS
    teacher_ids (S, k) int32, teacher_log_p (S, k) float32
                              the k most probable next tokens at temperature 1

A row of which any of these is not finite (a target that overflows in its dtype, or a store's) is
left out and listed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from redrafter.config import StatesConfig
from redrafter.contracts import InputError
from redrafter.data.answers import check_same_text
from redrafter.data.build_rows import need_rows
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.finite import choice, finite_rows, left_out, rows_kept
from redrafter.data.local import continue_greedily
from redrafter.data.rows import Rows, batches_by_length, right_padded, row_digest
from redrafter.data.store import Job, Store, open_job
from redrafter.data.vocabulary import check_store_ids
from redrafter.processes import by_main, launched
from redrafter.targets.aux_layers import picked
from redrafter.targets.identity import target_identity
from redrafter.targets.model import Target

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "float64": torch.float64,
}  # fmt: skip


#: rows of logits held at once, where the lm_head is needed
LOGIT_ROWS = 512


class StateMaker:
    """Makes the columns above for rows of tokens: the one place that does, whether they go to a
    store or straight to the trainer."""

    def __init__(self, target: Target, config: StatesConfig, continuation: int = 0):
        self.target, self.config, self.continuation = target, config, continuation
        if (config.teacher_top_k or 0) > target.vocab_size:
            raise InputError(
                f"teacher_top_k {config.teacher_top_k} exceeds the vocabulary of {target.name}, "
                f"{target.vocab_size}"
            )
        name = config.dtype
        self.dtype = target.dtype if name == "auto" else DTYPES[name]

    def identity(self) -> dict[str, Any]:
        layers = list(self.target.aux_layers)
        return {
            **({"aux_layers": layers} if layers else {}),
            "target": target_identity(self.target),
            "dtype": str(self.dtype).removeprefix("torch."),
            "continuation": self.continuation,
            "teacher_top_k": self.config.teacher_top_k,
        }

    def overflow(self) -> str:
        """Why a row is left out whose numbers are not finite."""
        computed, stored = (str(d).removeprefix("torch.") for d in (self.target.dtype, self.dtype))
        return (
            f"numbers of the target that are not finite (computed in {computed}, stored as "
            f"{stored}): a wider target.dtype or states.dtype may hold them"
        )

    def bytes_per_token(self) -> int:
        """On disk, tokens and mask included."""
        item = torch.empty(0, dtype=self.dtype).element_size()
        scale = 4 * (1 + len(self.target.aux_layers)) if self.dtype == torch.int8 else 0
        extra = 4 * self.continuation + 8 * (self.config.teacher_top_k or 0)
        return 4 + 1 + self.target.state_size * item + scale + extra

    @torch.no_grad()
    def columns(self, rows: Rows, bar: tqdm | None = None) -> dict[str, Tensor]:
        """The columns of all `rows`, flat and in their order, on the CPU; numbers that are not
        finite as they come (see `finite_rows`)."""
        target, total = self.target, len(rows.tokens)
        out = {"states": torch.empty(total, target.state_size, dtype=self.dtype)}
        if self.dtype == torch.int8:
            out["scale"] = torch.empty(total, 1 + len(target.aux_layers))
        if self.continuation:
            out["continuation"] = torch.full((total, self.continuation), -1, dtype=torch.int32)
        if k := self.config.teacher_top_k:
            out["teacher_ids"] = torch.empty(total, k, dtype=torch.int32)
            out["teacher_log_p"] = torch.empty(total, k)
        lengths, wanted = rows.lengths(), wanted_positions(rows)
        for batch in batches_by_length(lengths, range(rows.n_rows), self.config.forward_tokens):
            tokens, n = right_padded(rows, batch)
            place = torch.arange(tokens.shape[1])
            real = place < n[:, None]
            where = (rows.offsets[batch][:, None] + place)[real]
            hidden = target.states(tokens.to(target.device))[real.to(target.device)]
            for name, values in self.encode(hidden).items():
                out[name][where] = values.to("cpu")
            if self.continuation == 1:  # no pass of its own: the choice is in the hidden state
                chosen = wanted[where]
                parts = hidden[chosen.to(target.device)].split(LOGIT_ROWS)
                picks = torch.cat([choice(target.project(part)) for part in parts])
                out["continuation"][where[chosen], 0] = picks.to("cpu", torch.int32)
            elif self.continuation:
                self._continue(rows, wanted, batch, out["continuation"])
            if bar is not None:
                bar.update(int(n.sum()))
        return out

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        """The columns that follow from (M, (1 + n) H) hidden states as the target made them."""
        found = {"states": hidden.to(self.dtype)}
        if self.dtype == torch.int8:
            parts = hidden.float().unflatten(-1, (-1, self.target.hidden_size))
            scale = parts.abs().amax(-1).clamp(min=1e-12) / 127
            rounded = (parts / scale[..., None]).round().to(torch.int8)
            found = {"states": rounded.flatten(-2), "scale": scale}
        if k := self.config.teacher_top_k:
            parts = hidden.split(LOGIT_ROWS)
            best = [self.target.project(p).float().log_softmax(-1).topk(k, dim=-1) for p in parts]
            found["teacher_ids"] = torch.cat([part.indices for part in best]).int()
            found["teacher_log_p"] = torch.cat([part.values for part in best])
        return found

    def _continue(self, rows: Rows, wanted: Tensor, batch: Sequence[int], out: Tensor) -> None:
        spans = [(int(rows.offsets[r]), int(rows.offsets[r + 1])) for r in batch]
        found = continue_greedily(
            self.target,
            [rows.ids(r) for r in batch],
            [wanted[begin:end].tolist() for begin, end in spans],
            self.continuation,
        )
        for (begin, end), values in zip(spans, found, strict=True):
            out[begin:end] = values.to("cpu", torch.int32)


def wanted_positions(rows: Rows) -> Tensor:
    """(S,) bool: positions whose next token is supervised (and of the same row)."""
    wanted = torch.zeros_like(rows.supervised)
    wanted[:-1] = rows.supervised[1:]
    wanted[rows.offsets[1:] - 1] = False
    return wanted


def decoded(
    columns: dict[str, Tensor], index: Tensor, dtype: torch.dtype, last: int | None = None
) -> Tensor:
    """Hidden states at some positions, (..., (1 + n) H), as numbers of `dtype`.

    last: H, where the last layer's are wanted alone, (..., H)
    """
    states = columns["states"][:, :last][index]
    if "scale" not in columns:
        return states.to(dtype)
    scale = columns["scale"][:, : None if last is None else 1][index]
    parts = states.float().unflatten(-1, (scale.shape[-1], -1))
    return (parts * scale[..., None]).flatten(-2).to(dtype)


def picked_columns(
    columns: dict[str, Tensor], shown: Sequence[int], layers: Sequence[int]
) -> dict[str, Tensor]:
    """Columns with the states of some layers, of a store that holds those of `shown`."""
    names = [name for name in ("states", "scale") if name in columns]
    return {**columns, **{name: picked(columns[name], shown, layers) for name in names}}


def unique_rows(rows: Store) -> Tensor:
    """(R,) int64, ascending: the rows that no earlier row equals in tokens and mask."""
    seen: set[bytes] = set()
    kept = []
    for first in range(0, rows.n_rows, 4096):
        chunk = rows.rows(range(first, min(first + 4096, rows.n_rows)))
        offsets = chunk.offsets.tolist()
        ids, supervised = chunk.tokens.numpy(), chunk.supervised.numpy()
        for i, (begin, end) in enumerate(pairwise(offsets)):
            digest = row_digest(ids[begin:end].tobytes(), supervised[begin:end].tobytes())
            if digest not in seen:
                seen.add(digest)
                kept.append(first + i)
    return torch.tensor(kept, dtype=torch.long)


def build_states(
    target: Target,
    rows: Store,
    config: StatesConfig,
    folder: str | Path,
    *,
    continuation: int = 0,
    named: bool = False,
    progress: bool = True,
) -> Store:
    """Write the states of rows (texts or answers), or open what was written before.

    continuation: n, greedy tokens per position; 0 for none
    named: use a folder in `folder` that is named after the content
    Several processes share the shards out (`filling.py`).
    Raises InputError before any work where config.max_bytes or the disk is too small for it.
    """
    check_same_text(rows, target)
    check_context(rows, target)
    maker = StateMaker(target, config, continuation)
    identity = {**maker.identity(), "rows": rows.digest, "shard_bytes": config.shard_bytes}
    job = open_job(folder, "states", identity, named)
    if job.complete:
        return need_rows(open_filled(job), rows.name)
    check_store_ids(rows, target)
    kept = unique_rows(rows)
    groups = groups_of(rows.lengths[kept] * maker.bytes_per_token(), config.shard_bytes)
    sizes = [int(rows.lengths[kept[group]].sum()) for group in groups]
    left = sum(size for i, size in enumerate(sizes) if i not in job.receipts)
    by_main(lambda: estimate(maker, job, rows, kept, sum(sizes), left, progress))

    def make(index: int, bar: tqdm) -> Shard:
        return state_columns(maker, rows, kept[groups[index]], bar)

    store = fill(
        job, sizes, make, what="hidden states", unit="token", progress=progress,
        **facts_of(rows, kept),
    )  # fmt: skip
    return need_rows(store, rows.name)


def state_columns(maker: StateMaker, rows: Store, chosen: Tensor, bar: tqdm | None = None) -> Shard:
    """A shard of states: everything known of the chosen rows of a store, but for those whose
    numbers are not finite, which are listed."""
    read = rows.rows(chosen)
    columns = {
        "row": chosen,
        "source_row": rows.source_row[chosen],
        "length": read.lengths().int(),
        "tokens": read.tokens.int(),
        "supervised": read.supervised,
        **maker.columns(read, bar),
    }
    good = finite_rows(columns, read.lengths())
    return rows_kept(columns, good), left_out(columns["source_row"][~good], maker.overflow())


def facts_of(rows: Store, kept: Tensor) -> dict[str, Any]:
    """What the manifest adds to its counts: rows given, duplicates among them, and the receipt of
    the stages before."""
    duplicates = rows.n_rows - len(kept)
    return {"input": rows.n_rows, "duplicates": duplicates, "made_from": rows.lineage}


def groups_of(sizes: Tensor, limit: int) -> list[Tensor]:
    """Consecutive indices whose sizes (bytes) add up to at most `limit`, or one that is larger."""
    groups, begin, used = [], 0, 0
    for i, size in enumerate(sizes.tolist()):
        if i > begin and used + size > limit:
            groups.append(torch.arange(begin, i))
            begin, used = i, 0
        used += size
    groups.append(torch.arange(begin, len(sizes)))
    return groups


def check_target(store: Store, target: Target) -> None:
    """Raises InputError naming the part of the target that a store was not made with."""
    made, here = store.identity["target"], target_identity(target)
    for part in ("weights", "config", "tokenizer", "template"):
        if part in here and made.get(part) != here[part]:
            raise InputError(
                f"{store.name} was made with another target: its {part} has digest "
                f"{made.get(part)}, {target.name} has {here[part]}; make it anew for this target"
            )


def check_context(rows: Store, target: Target) -> None:
    """Raises InputError where there are no rows, or one is longer than the target can read."""
    if not rows.n_rows:
        raise InputError(
            f"{rows.name} holds no rows ({rows.counts['skipped']} skipped, "
            f"{rows.counts['failed']} failed; its manifest.json says why)"
        )
    context = target.max_positions
    if context is not None and int(rows.lengths.max()) > context:
        row = int(rows.lengths.argmax())
        raise InputError(
            f"{rows.name}: row {row} (row {int(rows.source_row[row])} of the source) has "
            f"{int(rows.lengths[row])} tokens, the context of {target.name} {context}: make the "
            "rows with --max_tokens"
        )


def estimate(
    maker: StateMaker, job: Job, rows: Store, kept: Tensor, total: int, left: int, show: bool
) -> None:
    """Say how large and how long, and refuse what cannot fit."""
    free = shutil.disk_usage(job.folder).free
    refuse_size(maker, job.folder, total, left, free)
    if not show or not left:
        return
    seconds = seconds_per_token(maker, rows, kept, left) * left / launched()
    size, dtype = total * maker.bytes_per_token(), str(maker.dtype).removeprefix("torch.")
    print(
        f"hidden states: {len(kept)} rows ({rows.n_rows - len(kept)} duplicates left out), "
        f"{total} tokens, {readable(size)} in {dtype}, about {minutes(seconds)}"
    )


def refuse_size(
    maker: StateMaker, folder: str | Path, total: int, left: int, free_bytes: int
) -> None:
    """Raises InputError where `total` tokens exceed max_bytes, or the `left` ones among them that
    are still to be written exceed the disk's free bytes."""
    per_token, limit = maker.bytes_per_token(), maker.config.max_bytes
    size, dtype = total * per_token, str(maker.dtype).removeprefix("torch.")
    remedy = (
        "raise max_bytes, take a smaller dtype (int8 is a quarter of float32), fewer rows, or "
        "train with --data.mode online, which writes none"
    )
    if limit is not None and size > limit:
        raise InputError(
            f"{folder}: {total} tokens in {dtype} need {size} bytes ({readable(size)}), "
            f"max_bytes is {limit}: {remedy}"
        )
    if left * per_token > free_bytes:
        raise InputError(
            f"{folder}: {readable(left * per_token)} are still to be written, the disk has "
            f"{readable(free_bytes)} left: free some, or {remedy}"
        )


def seconds_per_token(maker: StateMaker, rows: Store, kept: Tensor, left: int) -> float:
    """Measured on rows of middle length, `left` tokens being the whole work."""
    middle = int(kept[rows.lengths[kept].argsort()[len(kept) // 2]])
    # One forward as it will be, but never a large part of the work itself.
    tokens = min(maker.config.forward_tokens, left // 10)
    probe = rows.rows([middle] * max(1, tokens // int(rows.lengths[middle])))
    clock = time.perf_counter()
    maker.columns(probe)
    return (time.perf_counter() - clock) / len(probe.tokens)


def minutes(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86400:.0f} days"


def readable(size: int) -> str:
    """Bytes for people."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 1000:
            break
        value /= 1000
    return f"{value:.3g} {unit}"
