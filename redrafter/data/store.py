"""Rows on disk: safetensors shards, a receipt for each, and a manifest once all are there.

    folder/job.json                what is being made (the identity), written before any work
           shard-00000.safetensors  flat columns of some rows (below)
           shard-00000.json        its receipt: digest, counts, rows left out
           manifest.json           identity, totals and all receipts; its presence means complete

Every file appears in one piece (written aside, synced, renamed), so after a kill at any moment a
shard with a receipt is whole, and everything else is made again. Columns of a shard of R rows and
S tokens:

    row (R,) int64         number of the row in the job; a store is read in this order
    source_row (R,) int64  row of the file or data set that it came from
    length (R,) int32      tokens of the row
    check (R, C) int64     CRC-32 of the row's part of every flat column, columns in order of
                           name; compared whenever the part is read
    tokens (S,) int32, supervised (S,) bool, and whatever else the job makes, flat (S, ...)
"""

from __future__ import annotations

import errno
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.data.columns import PER_ROW, bytes_of, index_check, layout_of, row_checks
from redrafter.data.day import KEY
from redrafter.data.remote import Folder, open_folder
from redrafter.data.rows import Rows, offsets_of, starts_per_row
from redrafter.files import (
    digest_file,
    digest_json,
    plain_values,
    remove_leftovers,
    write_json,
    write_tensors,
)
from redrafter.processes import by_main, wait_to_see

FORMAT = 1
#: settings of a job that its receipt tells of
_TOLD = ("temperatures", "samples_per_prompt", "max_new_tokens", "seed", "dtype", "continuation",
         KEY)  # fmt: skip


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


# ------------------------------------------------------------------------------------ writing


class Job:
    """A store being written; the same call after an interruption goes on where it stopped.

    folder: where it lies or will lie, the same for all processes of a launch
    identity: JSON-able; everything that the content depends on. Another identity in the same
        folder is refused, so two jobs never mix; unless it has written nothing yet
    complete, receipts: what the main process found, so that all processes agree on what there is
        to do; every process opens a job, and each may write shards that no other one writes
    Raises InputError naming the folder and the values that differ.
    """

    def __init__(self, folder: str | Path, kind: str, identity: dict[str, Any]):
        self.folder = Path(folder)
        self.identity = plain_values({**identity, "format": FORMAT, "kind": kind})
        self.receipts: dict[int, dict[str, Any]]
        self.complete, self.receipts = by_main(self._begin)
        wait_to_see(self.folder / "job.json")
        # Of the main process it is checked already; others may have been given other settings.
        _check_identity(_read_json(self.folder / "job.json"), self.identity, self.folder)

    def _begin(self) -> tuple[bool, dict[int, dict[str, Any]]]:
        """Make the folder, or look at what an earlier run left: (`complete`, `receipts`)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be made a folder ({error})") from None
        found = self.folder / "job.json"
        complete = (self.folder / "manifest.json").exists()
        begun = any(self.folder.glob("shard-*")) or complete
        if begun and not found.exists():
            raise InputError(f"{found} is missing, but {self.folder} holds shards: remove them")
        if begun:
            _check_identity(_read_json(found), self.identity, self.folder)
        else:
            with disk_errors(self.folder):
                write_json(found, self.identity)
        remove_leftovers(self.folder)
        receipts = {}
        for path in sorted(self.folder.glob("shard-*.json")):
            receipt = _read_json(path)
            shard = self.folder / receipt["file"] if receipt.get("file") else None
            if shard is None or (shard.exists() and shard.stat().st_size == receipt["bytes"]):
                receipts[int(path.stem.split("-")[1])] = receipt
        return complete, receipts

    def write(
        self,
        index: int,
        columns: dict[str, Tensor],
        rejected: Sequence[dict[str, Any]] = (),
        tally: Mapping[str, int] | None = None,
    ) -> None:
        """One shard, whole or absent. columns: as in the module's docstring, `check` left out;
        no columns where all of its rows were left out. tally: counts, which the manifest adds up
        over the shards."""
        # One that had written nothing may have given way to another meanwhile (see above).
        _check_identity(_read_json(self.folder / "job.json"), self.identity, self.folder)
        receipt: dict[str, Any] = {"rows": 0, "tokens": 0, "file": None, "bytes": 0, "sha256": None}
        with disk_errors(self.folder):
            if columns and len(columns["length"]):
                columns = {name: c.contiguous().cpu() for name, c in columns.items()}
                columns["check"] = row_checks(columns)
                path = self.folder / f"{shard_name(index)}.safetensors"
                write_tensors(path, columns)
                receipt |= {
                    "rows": len(columns["length"]), "tokens": len(columns["tokens"]),
                    "supervised": int(columns["supervised"].sum()),
                    "columns": layout_of(columns), "index": index_check(columns),
                    "file": path.name, "bytes": path.stat().st_size, "sha256": digest_file(path),
                }  # fmt: skip
            receipt["rejected"] = plain_values(list(rejected))
            if tally is not None:
                receipt["tally"] = dict(tally)
            write_json(self.folder / f"{shard_name(index)}.json", receipt)
        self.receipts[index] = receipt

    def read(self, index: int) -> dict[str, Tensor]:
        """All columns of a shard written before. Raises InputError naming it if it is damaged."""
        path = self.folder / self.receipts[index]["file"]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checks = columns.pop("check")
            if not torch.equal(row_checks(columns), checks):
                raise InputError(f"{path} is damaged: remove it, it is then made anew")
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            message = f"{path} is damaged ({error}): remove it, it is then made anew"
            raise InputError(message) from None
        return columns

    def finish(self, n_shards: int, **facts: Any) -> None:
        """Write the manifest: from now on the folder is a store."""
        missing = [i for i in range(n_shards) if i not in self.receipts]
        if missing:
            raise RuntimeError(f"{self.folder}: shards {missing[:5]} are not written")
        shards = [self.receipts[i] for i in range(n_shards)]
        rejected = [r for s in shards for r in s["rejected"]]
        counts = {
            "rows": sum(s["rows"] for s in shards),
            "tokens": sum(s["tokens"] for s in shards),
            "supervised": sum(s.get("supervised", 0) for s in shards),
            "bytes": sum(s["bytes"] for s in shards),
            "skipped": sum(not r["failed"] for r in rejected),
            "failed": sum(r["failed"] for r in rejected),
        }
        content = {"identity": self.identity, "counts": counts, "shards": shards, **facts}
        tallies = [s["tally"] for s in shards if "tally" in s]
        if tallies:
            content["tally"] = dict(sorted(sum(map(Counter, tallies), Counter()).items()))
        with disk_errors(self.folder):
            write_json(self.folder / "manifest.json", content)


def open_job(folder: str | Path, kind: str, identity: dict[str, Any], named: bool) -> Job:
    """A job in `folder`, or in a folder there that is named after it, so that many can share it."""
    return Job(job_folder(folder, kind, identity, named), kind, identity)


def job_folder(folder: str | Path, kind: str, identity: dict[str, Any], named: bool) -> Path:
    """Where the job of `open_job` lies. The day is no part of the name: it is read back there."""
    if not named:
        return Path(folder)
    without = {key: value for key, value in identity.items() if key != KEY}
    return Path(folder) / f"{kind}-{digest_json([FORMAT, kind, without])[:12]}"


def begun(folder: Path) -> dict[str, Any] | None:
    """The identity of the job that was begun in a folder, None where there is none."""
    path = folder / "job.json"
    return _read_json(path) if path.exists() else None


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk (or quota) says so, and that nothing is lost."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise InputError(
            f"{folder}: the disk is full. What is written is whole; free some space and run the "
            "same command again to go on"
        ) from error


def _check_identity(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    if found.get("format") != wanted["format"]:
        raise InputError(_other_format(folder, found.get("format")))
    a, b = _flat(found), _flat(wanted)
    differing = [f"{k} {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]
    if differing:
        raise InputError(
            f"{folder} holds another job ({'; '.join(differing[:4])}): give another folder, the "
            "same settings, or remove it"
        )


def _other_format(folder: Path, found: Any) -> str:
    return (
        f"{folder} has store format {found!r}, this version reads and writes {FORMAT}: make it "
        "anew, or use the version of redrafter that made it"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove it to make it anew") from None


# ------------------------------------------------------------------------------------ reading


def _inside(folder: str | Path) -> str:
    """Which stores lie in a folder that is none, as a training's `data` has several."""
    found = sorted(path.parent for path in Path(folder).glob("*/manifest.json"))
    named = (f"{path} ({Store(path).counts['rows']} rows)" for path in found)
    return f", but some in it: give one of {', '.join(named)}" if found else "; is the path right?"


class Store:
    """A complete store, read row by row from memory-mapped shards.

    folder: a path, or a URL that fsspec knows (its shards are then fetched now, and kept)
    kind: what it must hold; None takes any
    What is kept in memory is a few numbers per row. Raises InputError naming what is missing,
    damaged, unfinished or of another kind.
    """

    def __init__(self, folder: str | Path, kind: str | None = None):
        self.files: Folder = open_folder(folder)
        self.name = str(folder)
        if not self.files.exists("manifest.json"):
            begun = self.files.exists("job.json")
            raise InputError(
                f"{self.name} is not complete: run the command that makes it once more"
                if begun
                else f"{self.name} holds no store (no manifest.json){_inside(folder)}"
            )
        self.manifest = _read_json(self.files.local("manifest.json"))
        self.identity = self.manifest.get("identity", {})
        if self.identity.get("format") != FORMAT:
            raise InputError(_other_format(self.name, self.identity.get("format")))
        if kind is not None and self.identity["kind"] != kind:
            raise InputError(f"{self.name} holds {self.identity['kind']}, not {kind}")
        self.counts = self.manifest["counts"]
        self.shards = [s for s in self.manifest["shards"] if s["file"]]
        self._index()

    @property
    def digest(self) -> str:
        """Of everything that the content depends on, and of the content itself."""
        return digest_json([self.identity, [s["sha256"] for s in self.shards]])

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """For people, from the source to this store: what each stage was and how much of it there
        is. Names no folder."""
        own = {"kind": self.identity["kind"], "digest": self.digest, **self.counts}
        own |= {k: self.identity[k] for k in _TOLD if k in self.identity}
        return [*self.manifest.get("made_from", []), own]

    @property
    def n_rows(self) -> int:
        return len(self.shard)

    def _index(self) -> None:
        """Row -> shard, place in it, first token, length; sorted by the job's row number."""
        shard, row, source_row, length, first, supervised = [], [], [], [], [], []
        self.columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for number, entry in enumerate(self.shards):
            with self._open(number) as file:
                per_row = {name: file.get_tensor(name) for name in PER_ROW}
                if index_check(per_row) != entry["index"]:
                    raise InputError(self._damaged(number, "its index is not what was written"))
                own = per_row["length"].long()
                row.append(per_row["row"])
                source_row.append(per_row["source_row"])
                ends = own.cumsum(0)
                mask = file.get_tensor("supervised")
                if self.columns and self.layout != entry["columns"]:
                    raise InputError(f"{self.name}: {entry['file']} has other columns than others")
                self.layout = entry["columns"]
                for name, (dtype, shape) in self.layout.items():
                    part = file.get_slice(name)
                    kind = (getattr(torch, dtype), tuple(shape))
                    found = (part[:0].dtype, tuple(part.get_shape()))
                    if found != (kind[0], (entry["tokens"], *shape)):
                        raise InputError(self._damaged(number, f"{name} has another shape"))
                    self.columns[name] = kind
                supervised.append(starts_per_row(mask, own))
            shard.append(torch.full_like(own, number))
            length.append(own)
            first.append(ends - own)
        joined = [torch.cat(x) if x else torch.zeros(0, dtype=torch.long)
                  for x in (row, shard, source_row, length, first)]  # fmt: skip
        place = torch.cat([torch.arange(len(x)) for x in length]) if length else joined[0]
        order = joined[0].argsort(stable=True)
        self.row, self.shard, self.source_row, self.lengths, self._first = (
            x[order] for x in joined
        )
        self._place = place[order]
        self.starts = (torch.cat(supervised) if supervised else torch.zeros(0, 2).long())[order]

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        """A shard, mapped only while it is read, so that what was read can leave the memory."""
        entry = self.shards[number]
        path = self.files.local(entry["file"], entry["bytes"], entry["sha256"])
        if not path.exists():
            raise InputError(
                f"{self.name}/{entry['file']} is missing: bring it back, or remove its receipt "
                "and manifest.json and run the command that made the store"
            )
        if path.stat().st_size != entry["bytes"]:
            raise InputError(self._damaged(number, f"{path.stat().st_size} bytes long"))
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            raise InputError(self._damaged(number, str(error))) from None

    def _damaged(self, number: int, why: str) -> str:
        entry = self.shards[number]
        return (
            f"{self.name}/{entry['file']} is damaged ({why}; {entry['bytes']} bytes and "
            f"{entry['rows']} rows are recorded): remove it, its receipt and manifest.json, and "
            "run the command that made the store"
        )

    def read(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, Tensor]:
        """Flat columns of some rows, in the order asked for; each row is checked.

        Returns `columns` as (S, ...) tensors that own their memory, and `offsets` (R + 1,).
        Raises InputError naming the shard and row that do not have the content recorded.
        """
        chosen = torch.as_tensor(rows, dtype=torch.long)
        lengths = self.lengths[chosen]
        offsets = offsets_of(lengths)
        total = int(offsets[-1])
        out = {n: torch.empty(total, *self.columns[n][1], dtype=self.columns[n][0])
               for n in columns}  # fmt: skip
        shard, names = self.shard[chosen], sorted(self.columns)
        for number in shard.unique().tolist():
            with self._open(number) as file:
                checks = file.get_tensor("check")
                slices = {name: file.get_slice(name) for name in columns}
                for i in (shard == number).nonzero()[:, 0].tolist():
                    row = int(chosen[i])
                    begin, n = int(self._first[row]), int(self.lengths[row])
                    for name, part in slices.items():
                        piece = part[begin : begin + n]
                        expected = int(checks[self._place[row], names.index(name)])
                        if zlib.crc32(bytes_of(piece)[0]) != expected:
                            what = f"row {row}, {name}, is not what was written"
                            raise InputError(self._damaged(number, what))
                        out[name][int(offsets[i]) : int(offsets[i + 1])] = piece
        return {**out, "offsets": offsets}

    def rows(self, rows: Sequence[int] | None = None) -> Rows:
        """Tokens and masks of some rows (None: all)."""
        found = self.read(range(self.n_rows) if rows is None else rows, ["tokens", "supervised"])
        return Rows(found["tokens"].long(), found["supervised"], found["offsets"])

    def verify(self) -> None:
        """Every shard's digest. Raises InputError naming the first one that differs."""
        for number, entry in enumerate(self.shards):
            path = self.files.local(entry["file"], entry["bytes"], entry["sha256"])
            with self._open(number):
                pass
            if digest_file(path) != entry["sha256"]:
                raise InputError(self._damaged(number, "its digest differs"))
