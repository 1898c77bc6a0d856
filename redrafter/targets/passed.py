"""Targets that have passed the probe (`probe.py`), remembered in the cache folder.

A small model's probe takes a quarter of loading it once its files are in memory, a large one's on a
CPU nearly half. It need not be passed twice: what it finds depends on the files, the classes that
compute, the libraries and the code in this folder. A mark is named after a digest of all of these,
and only a pass leaves one. Files count as the same by name, size and times, as for `make`; a
library that puts its own functions in the place of the classes' is another code. A model that is
not loaded from a folder whole and alone is probed each time. Source: ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from typing import Any

from redrafter.files import cache_folder, digest_json, write_json
from redrafter.kernels import SOURCES
from redrafter.products import has_kernels
from redrafter.targets.probe import check_target

#: configurations, lists of shards, and weights
_READ = (".json", ".safetensors", ".bin")


def files_of(path: str, revision: str | None = None) -> list[Any] | None:
    """What tells the files of a model or adapter from others, before they are read. None where they
    do not lie on this machine."""
    from transformers.utils import cached_file

    if not os.path.isdir(path):
        try:
            file = cached_file(path, "config.json", revision=revision, local_files_only=True)
        except (OSError, ValueError):
            return None
        path = os.path.dirname(file)
    return [os.path.realpath(path), *_stats(path, _READ)]


def _stats(folder: str | Path, endings: tuple[str, ...]) -> list[Any]:
    found = ((e.name, e.stat()) for e in os.scandir(folder) if e.name.endswith(endings))
    return sorted([name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in found)


def check_once(target: Any, files: list[Any]) -> None:
    """`check_target` of what was loaded from `files` (`files_of` each folder), unless it has passed
    before. Raises InputError as that does."""
    mark = None if None in files else _mark(target, files)
    if mark is not None and mark.exists():
        return
    check_target(target)
    if mark is None:
        return
    try:
        write_json(mark, {"passed": "redrafter/targets/probe.py", "target": target.name})
    except OSError:  # nowhere to keep it: it is probed again
        return


def _mark(target: Any, files: list[Any]) -> Path | None:
    """The file that says that it passed; None of a model that was changed after it was made."""
    import torch
    import transformers

    code = _code(target.model)
    if code is None:
        return None
    device = target.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    attention = getattr(target.config, "_attn_implementation", None)
    here = Path(__file__).parent
    own = [*_stats(here, (".py",)), *_stats(here.parent, ("products.py", "kernels.py"))]
    own += _stats(SOURCES, (".c", ".h"))
    made_by = [torch.__version__, transformers.__version__, own]
    how = [place, attention, type(target.fused).__name__, has_kernels()]
    key = digest_json([files, made_by, code, str(target.dtype), *how])
    return cache_folder() / "probed" / f"{key[:32]}.json"


def _code(model: Any) -> list[str] | None:
    """Where each function stands that the classes' modules name. None where a part of the model has
    a forward or hooks of its own."""
    parts = list(model.modules())
    if any("forward" in vars(p) or p._forward_hooks or p._forward_pre_hooks for p in parts):
        return None
    names = {type(part).__module__ for part in parts}
    found = set()
    for name in names:
        if name.startswith("torch."):
            continue  # its version tells
        for function in _functions(vars(sys.modules[name])):
            code = getattr(unwrap(function), "__code__", None)
            if code is not None:
                found.add(f"{code.co_filename}:{code.co_firstlineno} {function.__name__}")
    return sorted(found)


def _functions(names: dict[str, Any]) -> Iterator[Any]:
    for value in list(names.values()):
        if isinstance(value, type):
            value = vars(value).get("forward")
        if hasattr(value, "__code__"):
            yield value
