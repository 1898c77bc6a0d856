"""`redrafter configs` and `redrafter examples`: what comes with the library, to see and copy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import reports_input_errors
from redrafter.cli.naming import as_typed
from redrafter.contracts import InputError
from redrafter.files import new_folder, write_bytes
from redrafter.shipped import find, folder, names

_DESCRIPTION = """\
list: what there is; show NAME: a file's text; copy NAME [TO]: a file of your own to change (TO is a
file or a folder, by default NAME in this one); copy: all of it, as ./{what}
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    return serve("configs", argv)


def serve(what: str, argv: Sequence[str] | None) -> int:
    """what: "configs" or "examples". Returns the exit status."""
    parser = argparse.ArgumentParser(
        f"redrafter {what}", description=_DESCRIPTION.format(what=what)
    )
    parser.add_argument("what", choices=("list", "show", "copy"), nargs="?", default="list")
    parser.add_argument("name", nargs="?", help="of a file, with or without .yaml")
    parser.add_argument("to", nargs="?", default=".", help="where to copy it")
    given = parser.parse_args(argv)
    if given.what == "list":
        print(listed(what))
    elif given.what == "copy" and given.name is None:
        print(f"{copy_all(what)}: {len(names(what))} files are here")
    elif given.name is None:
        raise InputError(f"{given.what}: name a file; `redrafter {what} list` has them")
    elif given.what == "show":
        print(_text(find(given.name, what=what)), end="")
    else:
        print(f"{copy(find(given.name, what=what), Path(given.to))}: written")
    return 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"show: {file.name} is no text; copy it") from None


def listed(what: str = "configs") -> str:
    """One line per file: its name and, of a recipe, the command that it is for."""
    found = names(what)
    width = max(map(len, found))
    recipes = [name for name in found if name.endswith(".yaml")]
    firsts = {name: _text(folder(what) / name).splitlines()[0] for name in recipes}
    told = {name: as_typed(first.removeprefix("# ")) for name, first in firsts.items()}
    return "\n".join(f"{name:<{width}}  {told.get(name, '')}".rstrip() for name in found)


def copy(file: Path, to: Path) -> Path:
    """Returns where it went. Raises InputError for what is there already."""
    place = to / file.name if to.is_dir() else to
    if place.exists():
        raise InputError(f"to: {place} exists: name another file, or remove it")
    write_bytes(place, file.read_bytes())
    return place


def copy_all(what: str) -> Path:
    """Every file, in a folder of that name here. Raises InputError where it is there already."""
    place = Path(what)
    if place.resolve() == folder(what).resolve():
        return place  # a clone's own
    if place.exists():
        raise InputError(f"{place} exists: copy single files of `redrafter {what} list`")
    with new_folder(place) as part:
        for name in names(what):
            write_bytes(part / name, (folder(what) / name).read_bytes())
    return place
