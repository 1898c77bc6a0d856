"""Rows from files and from the Hub: numbered, in order, one at a time.

    .jsonl, .json (an array, or lines all the same)   also .gz
    .parquet, a folder, a Hub id                      through `datasets`

JSON is read here, not by `datasets`: its loader makes Arrow tables of the lines, which guesses a
type per key (a text that looks like a date becomes one), gives every row the keys of all others,
refuses what does not fit the guess, keeps a copy in the user's cache, and cannot say which line
was broken. Read line by line, a strange row is that row's problem only, and nothing is cached.
Parquet files are streamed, so they leave no copy either. Nothing is ever whole in memory, but for
a .json array.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import tempfile
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.files import digest_file, digest_json

Row = tuple[int, dict[str, Any]]
_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_KINDS = (*_JSON, ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_EXPECTED = "give a .jsonl, .json or .parquet file (.gz too), a glob, a folder, or a Hub id"


@dataclass(frozen=True)
class _Part:
    """One file, or one split of a Hub data set.

    label: what a row is called after, `{label}{number + 1}`
    read: rows with their 0-based number in this part (JSON lines: the line)
    count: how many rows `read` will give, found without parsing them
    """

    label: str
    read: Callable[[], Iterator[tuple[int, Any]]]
    count: Callable[[], int]


class Source:
    """The rows of a source in order: iterating gives (row, content), as often as wanted.

    row: 0-based and ascending; in JSON lines the line, so that empty ones leave gaps
    content: what stands in the row, without keys whose value is null
    Rows after `n_rows` and the last `holdout_rows` are left out. Raises InputError naming file
    and line where something cannot be read, and where no row is left.
    """

    def __init__(self, config: SourceConfig, parts: list[_Part], digest: Callable[[], str]) -> None:
        self.config = config
        self._parts = parts
        self._starts: list[int] = []
        self._digest = digest

    @cached_property
    def digest(self) -> str:
        """Identifies the content: 64 hex digits over the files' bytes; of a Hub data set over its
        id, subset, revision and split, and what `datasets` says of its files."""
        return self._digest()

    @cached_property
    def n_all_rows(self) -> int:
        """Rows of the whole source, held-out ones too. Reads the files once."""
        return sum(part.count() for part in self._parts)

    @property
    def n_rows(self) -> int | None:
        """Rows that iterating gives; None for a stream, whose end nobody knows."""
        if self.config.streaming:
            return None
        kept = max(0, self.n_all_rows - self.config.holdout_rows)
        return kept if self.config.n_rows is None else min(kept, self.config.n_rows)

    def __len__(self) -> int:
        if self.n_rows is None:
            raise TypeError(f"{self.config.path} is a stream: its length is not known")
        return self.n_rows

    def __iter__(self) -> Iterator[Row]:
        # Only held-out rows make it necessary to know the end before the start.
        limit = self.n_rows if self.config.holdout_rows else self.config.n_rows
        seen = 0
        for row in self._all() if limit != 0 else ():
            yield row
            seen += 1
            if seen == limit:
                return
        if not seen:
            raise self._nothing_left()

    def held_out(self, n: int | None = None) -> list[Row]:
        """The last `holdout_rows` rows (all rows where that is 0), of those the last `n`."""
        sizes = [size for size in (self.config.holdout_rows or None, n) if size is not None]
        rows = list(deque(self._all(), maxlen=min(sizes, default=None)))
        if not rows:
            raise self._nothing_left()
        return rows

    def first(self) -> Row:
        """The first row of the whole source, by which `auto` decides."""
        for row in self._all():
            return row
        raise self._nothing_left()

    def where(self, row: int) -> str:
        """How messages call a row that was read: `file:line`."""
        part = bisect_right(self._starts, row) - 1
        return f"{self._parts[part].label}{row - self._starts[part] + 1}"

    def _all(self) -> Iterator[Row]:
        start = 0
        for index, part in enumerate(self._parts):
            if index == len(self._starts):
                self._starts.append(start)
            number = -1
            for number, content in part.read():
                if not isinstance(content, dict):
                    raise InputError(
                        f"{part.label}{number + 1}: not a JSON object but a "
                        f"{type(content).__name__}; every row must be {{...}}"
                    )
                yield start + number, {k: v for k, v in content.items() if v is not None}
            start += number + 1

    def _nothing_left(self) -> InputError:
        held = self.config.holdout_rows
        if not held:
            return InputError(f"{self.config.path} has no rows; give a source that has some")
        return InputError(
            f"{self.config.path}: no rows left ({self.n_all_rows} rows, {held} of them held out); "
            "give a longer file, or lower holdout_rows"
        )


def read_source(config: SourceConfig) -> Source:
    """Open a source; rows are read when it is iterated.

    Raises InputError naming the path and the remedy: nothing there, settings that cannot be met.
    """
    if config.streaming and config.holdout_rows:
        raise InputError(
            f"{config.path}: holdout_rows {config.holdout_rows} counts from the end, and the end "
            "of a stream is not known; set streaming false, or holdout_rows 0 and another split"
        )
    if config.holdout_rows < 0 or (config.n_rows is not None and config.n_rows < 1):
        raise InputError(
            f"{config.path}: n_rows {config.n_rows} must be positive (null: all), and "
            f"holdout_rows {config.holdout_rows} not negative"
        )
    path = Path(config.path)
    if path.is_file():
        return _of_files(config, [path])
    if path.is_dir():
        return _of_folder(config)
    found = [Path(name) for name in sorted(glob.glob(config.path, recursive=True))]
    if found:
        return _of_files(config, [file for file in found if file.is_file()])
    if glob.has_magic(config.path):
        raise InputError(f"{config.path} matches no file: {_EXPECTED}")
    if config.path.endswith(_KINDS) or not _HUB_ID.fullmatch(config.path):
        raise InputError(f"{config.path} does not exist: {_EXPECTED}")
    return _of_datasets(config)


# ---------------------------------------------------------------- files


def _of_files(config: SourceConfig, files: list[Path]) -> Source:
    parts = []
    for file in files:
        if file.name.endswith(".parquet"):
            label = f"{file} row "
            parts.append(_Part(label, partial(_parquet, file), partial(_parquet_rows, file)))
        elif file.name.endswith(_JSON):
            array = ".json" in file.suffixes and _is_array(file)
            read = partial(_array if array else _lines, file)
            count = partial(_count_items if array else _count_lines, file)
            parts.append(_Part(f"{file} row " if array else f"{file}:", read, count))
        else:
            raise InputError(f"{file}: no format that is known by its name; {_EXPECTED}")
    return Source(config, parts, lambda: _digest(files))


def _digest(files: list[Path]) -> str:
    """The order of the files is the order of the rows; their names do not matter."""
    return digest_json([digest_file(file) for file in files])


def _raw_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines as bytes, empty ones too."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as opened:
            yield from enumerate(opened)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); is it whole, and what its name says?"
        ) from None


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _raw_lines(file):
        if line.strip():
            yield number, _parsed(line, f"{file}:{number + 1}")


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error}); convert the file") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(
            f"{where}: not valid JSON ({error.msg} at {place}column {error.colno}); a file holds "
            "one {...} per line, or one array [{...}, ...] in a .json file"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply; remove the row") from None


def _count_lines(file: Path) -> int:
    return sum(1 for _, line in _raw_lines(file) if line.strip())


def _is_array(file: Path) -> bool:
    first = next((line for _, line in _raw_lines(file) if line.strip()), b"")
    return first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(file: Path) -> Iterator[tuple[int, Any]]:
    yield from enumerate(_parsed(b"".join(line for _, line in _raw_lines(file)), str(file)))


def _count_items(file: Path) -> int:
    return sum(1 for _ in _array(file))


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import datasets
    import pyarrow

    try:
        with tempfile.TemporaryDirectory() as cache:  # streaming, it stays empty but for folders
            rows = datasets.load_dataset(
                "parquet", data_files=[glob.escape(str(file.resolve()))], split="train",
                streaming=True, cache_dir=cache,
            )  # fmt: skip
            yield from enumerate(rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: not a whole Parquet file ({_brief(error)})") from None


def _parquet_rows(file: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a whole Parquet file ({_brief(error)})") from None


# ---------------------------------------------------------------- folders and the Hub


def _of_folder(config: SourceConfig) -> Source:
    """The files of one split, as `datasets` tells splits apart by names and by the README."""
    with tempfile.TemporaryDirectory() as cache:
        builder = _builder(config, cache)
    files = builder.config.data_files or {}
    if config.split not in files:
        raise InputError(
            f"{config.path}: no split {config.split!r} among its files, only "
            f"{', '.join(map(str, files))}; set split"
        )
    chosen = [Path(file) for file in files[config.split]]
    if all(file.name.endswith(_KINDS) for file in chosen):
        return _of_files(config, chosen)
    return _of_datasets(config, chosen)


def _of_datasets(config: SourceConfig, files: list[Path] | None = None) -> Source:
    """Whatever else `datasets` can load: streamed, or put into its cache and memory-mapped.

    files: what a local folder holds
    """
    builder = _builder(config)
    try:
        if config.streaming:
            rows = builder.as_streaming_dataset(split=config.split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=config.split)
    except Exception as error:  # theirs have no common class
        raise InputError(
            f"{config.path}: cannot be loaded ({_brief(error)}); check split {config.split!r}, "
            f"subset {config.subset!r} and the connection"
        ) from error
    identity = {
        "path": config.path,
        "subset": config.subset,
        "revision": config.revision,
        "split": config.split,
        # Over the commit and the files that the revision stood for when it was asked for; the
        # same whether the rows are streamed or not.
        "fingerprint": builder.hash,
    }
    part = _Part(f"{config.path} ({config.split}) row ", lambda: enumerate(rows), lambda: len(rows))
    if files is not None:
        return Source(config, [part], lambda: _digest(files))
    return Source(config, [part], lambda: digest_json(identity))


def _builder(config: SourceConfig, cache: str | None = None) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(
            config.path, name=config.subset, revision=config.revision, cache_dir=cache
        )
    except Exception as error:  # theirs have no common class
        offline = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        raise InputError(
            f"{config.path} is no file, and neither a folder nor a data set of the Hub that can "
            f"be loaded{offline}: {_brief(error)}. Check path, subset and revision: {_EXPECTED}"
        ) from error


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
