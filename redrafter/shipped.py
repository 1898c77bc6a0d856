"""What a clone has beside the library and a wheel brings inside: configurations and examples."""

from __future__ import annotations

import difflib
from pathlib import Path

from redrafter.contracts import InputError

#: folder of a clone -> a file that tells it from another of that name
_KNOWN_BY = {"configs": "quickstart.yaml", "examples": "teaching_loop.py"}


def folder(what: str = "configs") -> Path:
    """Where "configs" or "examples" lie: setup.py calls them shipped_X in a wheel. Raises
    InputError where they are nowhere."""
    package = Path(__file__).resolve().parent
    for place in (package / f"shipped_{what}", package.parent / what):
        if (place / _KNOWN_BY[what]).is_file():
            return place
    raise InputError(
        f"this installation has no {what} ({package / f'shipped_{what}'}): install it from a "
        "wheel, or in a clone by `pip install -e .`"
    )


def names(what: str = "configs") -> list[str]:
    """Of all files, as paths below the folder, in order."""
    place = folder(what)
    kinds = ("*.yaml", "*.json", "*.md") if what == "configs" else ("*",)
    found = {p.relative_to(place) for kind in kinds for p in place.rglob(kind) if p.is_file()}
    return sorted(p.as_posix() for p in found if "__pycache__" not in p.parts)


def find(name: str, below: str = "", option: str = "name", what: str = "configs") -> Path:
    """The file of a name, with or without `.yaml`, and with or without the `configs/` that it lies
    in in a clone. below: a folder that may be left out of it

    Raises InputError naming those that are like it, or those that there are.
    """
    known, name = names(what), name.removeprefix(f"{what}/")
    for tried in (name, f"{name}.yaml", f"{below}/{name}", f"{below}/{name}.yaml"):
        if tried in known:
            return folder(what) / tried
    there = [k for k in known if k.startswith(below)]
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
    if near:
        said = f"did you mean {' or '.join(near)}?"
    else:
        said = ", ".join(there) if below else f"`redrafter {what}` lists them"
    raise InputError(
        f"{option}: no file {name!r}, here or among those that come with the library: {said}"
    )
