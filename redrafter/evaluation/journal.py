"""What was done so far, piece by piece, so that a run goes on where it stopped.

JSON lines: the first one holds what the pieces depend on, every other one piece (of Spec-Bench, one
question of one run, answered by all methods). A line is on the disk before the next piece begins;
of a line that a kill cut short nothing is kept.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from redrafter.contracts import InputError
from redrafter.files import plain_values, write_bytes

Key = tuple[int, int | str]  # as `names` says
RUN_AND_QUESTION = ("run", "question_id")


class Journal:
    """entries: what `add` was given, by its key, of earlier processes too."""

    def __init__(
        self, path: str | Path, identity: dict[str, Any],
        names: tuple[str, str] = RUN_AND_QUESTION,
    ):  # fmt: skip
        """identity: JSON-able; names: of a key's two parts, in the file. Raises InputError where
        the file was written under another identity, or is damaged."""
        self.path, self.names = Path(path), names
        self.entries: dict[Key, dict[str, Any]] = {}
        identity = json.loads(json.dumps(plain_values(identity)))
        if self.path.exists():
            self._read(identity)
        if not self.path.exists():
            write_bytes(self.path, _line({"identity": identity}))

    @staticmethod
    def begun(path: str | Path) -> dict[str, Any] | None:
        """The identity that a file was begun under; None where there is none that can be read."""
        try:
            with open(path, encoding="utf-8") as file:
                return json.loads(file.readline())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def add(self, key: Key, entry: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(_line({**dict(zip(self.names, key, strict=True)), **entry}))
            file.flush()
            os.fsync(file.fileno())
        self.entries[key] = entry

    def _read(self, identity: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            self.path.unlink()
            return
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(identity, entry["identity"])
                else:
                    first, second = (entry.pop(name) for name in self.names)
                    self.entries[first, second] = entry
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{self.path}:{number} is damaged ({type(error).__name__}): remove the file, "
                    "or give another out"
                ) from None
        if len(whole) < len(content):
            write_bytes(self.path, whole)

    def _check(self, wanted: dict[str, Any], made: dict[str, Any]) -> None:
        differ = [key for key in {**wanted, **made} if wanted.get(key) != made.get(key)]
        if differ:
            raise InputError(
                f"{self.path} was made with another {', '.join(differ)}: remove it, or give "
                "another out"
            )


def _line(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
