"""The configurations that come with the library: in a wheel beside it, in a clone in configs/."""

from __future__ import annotations

from pathlib import Path

from redrafter.contracts import InputError

#: what setup.py calls the folder in a wheel
IN_A_WHEEL = "shipped_configs"


def folder() -> Path:
    """Where they lie. Raises InputError where neither is."""
    package = Path(__file__).resolve().parent
    for place in (package / IN_A_WHEEL, package.parent / "configs"):
        if (place / "quickstart.yaml").is_file():
            return place
    raise InputError(
        f"this installation has no configurations ({package / IN_A_WHEEL}): install it from a "
        "wheel, or in a clone by `pip install -e .`"
    )


def names() -> list[str]:
    """Of all files, as paths below the folder, in order."""
    place = folder()
    kinds = ("*.yaml", "*.json")
    return sorted(p.relative_to(place).as_posix() for kind in kinds for p in place.rglob(kind))


def find(name: str, below: str = "", option: str = "name") -> Path:
    """The file of a name, with or without `.yaml`, and with or without the `configs/` that it lies
    in in a clone. below: a folder that may be left out of it

    Raises InputError naming those that there are.
    """
    known, name = names(), name.removeprefix("configs/")
    for tried in (name, f"{name}.yaml", f"{below}/{name}", f"{below}/{name}.yaml"):
        if tried in known:
            return folder() / tried
    there = [k for k in known if k.startswith(below)]
    raise InputError(f"{option}: no file {name!r}, here or among {', '.join(there)}")
