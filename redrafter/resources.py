"""What drafters are made from besides the target: opened where it lies, or taken as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module

from redrafter.config import TargetConfig, TreeConfig
from redrafter.contracts import InputError
from redrafter.costs import price
from redrafter.drafters.bigram import BigramTable
from redrafter.drafters.build import Resources
from redrafter.drafters.suffix import ReferenceTexts
from redrafter.fetch import fetch
from redrafter.heads.load import load_head
from redrafter.tables.bigrams import open_bigrams, open_probed
from redrafter.tables.reference import reference_texts
from redrafter.targets.load import load_target
from redrafter.targets.model import Target


def gather(
    wanted: Mapping[str, int],
    target: Target,
    given: Mapping[str, Any],
    tree: TreeConfig | None = None,
    batch_size: int = 1,
) -> Resources:
    """The resources of drafters.

    wanted: as `drafters.build.needs` says; of what is given as a path only this is opened
    given: {resource: its object, its path or Hub id, or None}
    tree: of a head whose name has no size; batch_size: rows that are priced, where costs are wanted
    Raises InputError naming a resource that is neither, or what is wrong where it lies.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        kind, opened = _OPENED[name]
        if isinstance(value, (str, Path)):
            found[name] = opened(str(value), target, wanted[name]) if name in wanted else None
        elif value is None or isinstance(value, kind):
            found[name] = value
        else:
            raise InputError(
                f"{name}: a {type(value).__name__} is neither a path, a Hub id nor a "
                f"{kind.__name__}"
            )
    if "price" in wanted:
        found["price"] = partial(price, target, batch_size=batch_size)
    return Resources(**found, tree=tree or TreeConfig())


def _head(path: str, target: Target, width: int) -> Any:
    return load_head(path, target)


def _draft(path: str, target: Target, width: int) -> Target:
    """A smaller model that computes where and as the target does."""
    dtype = str(target.dtype).removeprefix("torch.")
    folder = fetch(path, "draft model")
    return load_target(TargetConfig(path=folder, device=str(target.device), dtype=dtype))


def _bigrams(path: str, target: Target, width: int) -> BigramTable:
    return open_bigrams(path if "://" in path else fetch(path, "bigrams"), target, width)[0]


def _probed(path: str, target: Target, width: int) -> BigramTable:
    return open_probed(fetch(path, "probed"), target)


def _reference(path: str, target: Target, width: int) -> ReferenceTexts:
    return reference_texts(path, target, progress=True)


#: resource -> its class, and how it is opened where a path is given
_OPENED: dict[str, tuple[type, Callable[[str, Target, int], Any]]] = {
    "head": (Module, _head),
    "draft": (Target, _draft),
    "bigrams": (BigramTable, _bigrams),
    "probed": (BigramTable, _probed),
    "reference": (ReferenceTexts, _reference),
}
