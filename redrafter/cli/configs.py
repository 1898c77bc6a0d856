"""`redrafter configs`: the recipes that come with the library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import reports_input_errors
from redrafter.contracts import InputError
from redrafter.files import write_bytes
from redrafter.shipped import find, folder, names

_DESCRIPTION = """\
list: names and the command of each; show NAME: a file's text; copy NAME [TO]: a file of your own to
change (TO is a file or a folder, by default NAME in this one)
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("redrafter configs", description=_DESCRIPTION)
    parser.add_argument("what", choices=("list", "show", "copy"), nargs="?", default="list")
    parser.add_argument("name", nargs="?", help="of a file, with or without .yaml")
    parser.add_argument("to", nargs="?", default=".", help="where to copy it")
    given = parser.parse_args(argv)
    if given.what == "list":
        print(listed())
        return 0
    if given.name is None:
        raise InputError(f"{given.what}: name a file; `redrafter configs list` has them")
    file = find(given.name)
    if given.what == "show":
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    print(f"{copy(file, Path(given.to))}: written")
    return 0


def listed() -> str:
    """One line per file: its name and, of a recipe, the command that it is for."""
    found = names()
    width = max(map(len, found))
    firsts = {name: (folder() / name).read_text(encoding="utf-8").splitlines()[0] for name in found}
    return "\n".join(
        f"{name:<{width}}  {first.removeprefix('# ') if first.startswith('#') else ''}".rstrip()
        for name, first in firsts.items()
    )


def copy(file: Path, to: Path) -> Path:
    """Returns where it went. Raises InputError for what is there already."""
    place = to / file.name if to.is_dir() else to
    if place.exists():
        raise InputError(f"to: {place} exists: name another file, or remove it")
    write_bytes(place, file.read_bytes())
    return place
