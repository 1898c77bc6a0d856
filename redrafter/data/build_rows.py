"""First stage: text of a source as rows of tokens, in a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from glob import has_magic
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from redrafter.bars import Bar
from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer
from redrafter.data.day import dated, day_of, prints_date
from redrafter.data.filling import open_filled
from redrafter.data.prepare import prepared
from redrafter.data.rows import RejectedRow, TokenRow, row_names
from redrafter.data.sources import Source, read_source
from redrafter.data.store import Job, Store, begun, job_folder, open_job, shard_name
from redrafter.files import plain_values
from redrafter.processes import by_main, main_first
from redrafter.targets.identity import text_identity

_SHARD_ROWS = 4096
_COMPARED = 64  # rows of an earlier store that are made again, to compare them
_COUNTED = ("rows", "tokens", "supervised")
# Where a source lies and how it is read do not matter, what was read does.
_FREE = {"path", "streaming", "max_failed_rows", "revision", "split", "subset"}
_LONGER = ": shorten rows, raise max_tokens or, in training, lower data.answers.max_new_tokens"
Item = TypeVar("Item")


def build_rows(
    config: SourceConfig,
    tokenizer: Any,
    keep: Literal["prompts", "texts"],
    folder: str | Path,
    *,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
    eos: Collection[int] | None = None,
    named: bool = False,
    progress: bool = True,
) -> Store:
    """Read a source into `folder`, or open what was read before.

    keep: what stands before the answer, for the target to go on; or whole texts with their masks
    max_tokens: longer rows are skipped and counted
    vocab_size: rows of the target's lm_head (see `prepared`); eos: see `Renderer`
    named: use a folder in `folder` that is named after the content
    Duplicates are skipped. Rows skipped and failed are listed in the manifest; written, skipped
    and failed ones add up to its `input`: the rows read, those that became several counted as such
    (`source_rows` then says how many were read).
    Raises InputError where rows that an earlier version made are not what is made today.
    """
    source = main_first(lambda: read_source(config))
    identity = {**source_identity(source, tokenizer), "max_tokens": max_tokens}
    place = job_folder(folder, keep, identity, named)
    day = by_main(lambda: day_of(tokenizer, begun(place)))
    identity = dated(identity, day)

    def read() -> Iterable[TokenRow | RejectedRow]:
        renderer = Renderer(tokenizer, config, day, eos)
        return prepared(source, renderer, config, keep, max_tokens, vocab_size)

    total = _total(source) if progress else 0
    made_before = (place / "manifest.json").exists()
    store = write_rows(read, keep, folder, identity, named, total, made_from=[origin(source)])
    # (Of a store whose day nobody knows, the texts cannot be made again.)
    if made_before and (day is not None or not prints_date(tokenizer)):
        by_main(lambda: _check_first(store, read()))
    return need_rows(store, config.path, _LONGER if max_tokens is not None else "")


def source_identity(source: Source, tokenizer: Any) -> dict[str, Any]:
    """What a source's rows of tokens depend on."""
    return {
        "source": source.digest,
        "read_as": {k: v for k, v in plain_values(source.config).items() if k not in _FREE},
        "text": text_identity(tokenizer),
    }


def write_rows(
    read: Callable[[], Iterable[TokenRow | RejectedRow]],
    kind: str,
    folder: str | Path,
    identity: dict[str, Any],
    named: bool = False,
    total: int | None = 0,
    **facts: Any,
) -> Store:
    """Rows into a store, or what was written before. Text is read in order and only once, so the
    main process writes it all while others wait.

    read: called only if there is something to do
    total: rows to expect, for the progress bar (None: unknown; 0: no bar)
    facts: for the manifest
    """
    job = open_job(folder, kind, identity, named)
    if not job.complete:
        by_main(lambda: _write(job, read(), kind, total, facts))
    return open_filled(job)


def _check_first(store: Store, items: Iterable[TokenRow | RejectedRow]) -> None:
    """Raises InputError where the first rows of an earlier store are not what is made today: an
    earlier version took other parts of a chat for the question, or for the answer."""
    found = store.rows(range(min(_COMPARED, store.n_rows)))
    masks = found.supervised.split(found.lengths().tolist())
    kept = (item for item in items if isinstance(item, TokenRow))
    for i, (mask, row) in enumerate(zip(masks, kept, strict=False)):
        if found.ids(i) != list(row.ids) or mask.tolist() != list(row.supervised):
            raise _made_otherwise(store.name, f"row {row.source_row} of the source")


def _made_otherwise(folder: str | Path, what: str) -> InputError:
    return InputError(
        f"{folder} was made by an earlier version, which took other parts of a chat for the "
        "question or for what is learned, or put a BOS before a text's own, or for a target whose "
        f"texts end otherwise ({what}): remove it, or give another folder, and it is made anew"
    )


def origin(source: Source) -> dict[str, Any]:
    """Where text came from, for the receipt: a Hub id as it is, of a local path its name alone."""
    config = source.config
    on_hub = not Path(config.path).exists() and not has_magic(config.path)
    where = {"split": config.split, "subset": config.subset, "revision": config.revision}
    return {
        "kind": "source", "name": config.path if on_hub else Path(config.path).name,
        "on_hub": on_hub, "digest": source.digest, **(where if on_hub else {}),
        "n_rows": config.n_rows, "holdout_rows": config.holdout_rows,
    }  # fmt: skip


def _write(
    job: Job,
    items: Iterable[TokenRow | RejectedRow],
    kind: str,
    total: int | None,
    facts: dict[str, Any],
) -> None:
    bar = Bar(items, total=total, desc=kind, unit="row", disable=total == 0)
    row = shards = n = n_source = 0
    last = None
    for index, chunk in enumerate(batched(bar, _SHARD_ROWS)):
        kept = [item for item in chunk if isinstance(item, TokenRow)]
        if index not in job.receipts:
            left_out = [asdict(item) for item in chunk if isinstance(item, RejectedRow)]
            job.write(index, columns_of(kept, range(row, row + len(kept))), left_out)
        elif _counts(kept) != tuple(job.receipts[index].get(key, 0) for key in _COUNTED):
            raise _made_otherwise(job.folder, shard_name(index))
        row, shards, n = row + len(kept), index + 1, n + len(chunk)
        # Texts of one row of the source come one after the other.
        numbers = [last, *(item.source_row for item in chunk)]
        n_source += sum(a != b for a, b in pairwise(numbers))
        last = numbers[-1]
    split = {"source_rows": n_source} if n_source != n else {}
    job.finish(shards, input=n, **split, **facts)


def _counts(rows: list[TokenRow]) -> tuple[int, ...]:
    """What a shard's receipt says under `_COUNTED`."""
    lengths = sum(len(row.ids) for row in rows)
    return len(rows), lengths, sum(sum(row.supervised) for row in rows)


def _total(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def columns_of(rows: Iterable[TokenRow], numbers: Iterable[int]) -> dict[str, Tensor]:
    """Rows as the columns of a shard (see `store.py`). numbers: their numbers in the job."""
    rows = list(rows)
    return {
        "row": torch.tensor(list(numbers), dtype=torch.long),
        "source_row": torch.tensor([r.source_row for r in rows], dtype=torch.long),
        "length": torch.tensor([len(r.ids) for r in rows], dtype=torch.int32),
        "tokens": torch.tensor([t for r in rows for t in r.ids], dtype=torch.int32),
        "supervised": torch.tensor([s for r in rows for s in r.supervised], dtype=torch.bool),
    }


def batched(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of n items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, n)):
        yield chunk


def need_rows(store: Store, given: str, remedy: str = "") -> Store:
    """Raises InputError where nothing of `given` is left in a store, naming the reasons."""
    if store.n_rows:
        return store
    reasons = {r["reason"] for shard in store.manifest["shards"] for r in shard["rejected"]}
    raise InputError(
        f"{given}: none of {store.manifest['input']} rows can be used "
        f"({'; '.join(sorted(reasons)[:3])}){remedy}"
    )


def report(store: Store) -> str:
    """One line about what a store holds, and one per reason for which rows were left out, with the
    first of them."""
    counts, given = store.counts, store.manifest.get("input")
    lines = [
        f"{store.name}: {counts['rows']} rows of {store.identity['kind']}, {counts['tokens']} "
        f"tokens, {counts['supervised']} of them supervised, {counts['bytes'] / 1e6:.1f} MB"
    ]
    if given is not None:
        duplicates = store.manifest.get("duplicates", 0)
        lines.append(
            f"  {given} given = {counts['rows']} written + {counts['skipped'] + duplicates} "
            f"skipped + {counts['failed']} failed"
        )
    if temperatures := store.identity.get("temperatures"):
        lines.append(f"  {_answered(temperatures, store.identity['samples_per_prompt'])}")
    if "source_rows" in store.manifest:
        lines.append(
            f"  they are {store.manifest['source_rows']} rows of the source: where the chat "
            "template rewrites what was said before, each answer is a row of its own"
        )
    if tally := store.manifest.get("tally"):
        lines.append("  " + ", ".join(f"{n} {what}" for what, n in tally.items()))
    listed: dict[str, list[int]] = {}
    for entry in (r for shard in store.manifest["shards"] for r in shard["rejected"]):
        listed.setdefault(entry["reason"], []).append(entry["source_row"])
    reasons = Counter({reason: len(rows) for reason, rows in listed.items()})
    if store.manifest.get("duplicates"):  # counted, not listed
        reasons["duplicate"] += store.manifest["duplicates"]
    for reason, n in reasons.most_common(10):
        which = f" ({row_names(listed[reason])} of the source)" if reason in listed else ""
        lines.append(f"  {n} x {reason}{which}")
    return "\n".join(lines)


def _answered(temperatures: Sequence[float], samples: int) -> str:
    """How many answers of a prompt there are, and which."""
    times = f", {samples} times each above 0" if samples > 1 else ""
    each = " and ".join(f"{t:g}" for t in temperatures)
    return f"each prompt answered at temperature {each}{times}"
