"""Targets in a GGUF file, llama.cpp's format: made plain once, and kept as an ordinary folder.

transformers unpacks the file's weights, which takes minutes for a large one. What comes out, in
float32 and so exactly what the file says, is kept as safetensors with configuration and tokenizer
in a cache folder named after the file's digest; every later command loads that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.files import (
    CACHE,
    cache_folder,
    digest_file,
    new_folder,
    remove_leftovers,
    write_json,
)
from redrafter.targets.gguf_config import read_config
from redrafter.targets.gguf_tokenizer import load_tokenizer

#: raised when other files are to be made of the same GGUF
_MAKING = 2
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_FLOAT32_BYTES = 4
# general.file_type of files whose weights are not quantised, by the number llama.cpp gives them
_FILE_TYPES = {0: "float32", 1: "float16"}


def find_gguf(config: TargetConfig) -> Path | None:
    """The GGUF file that target.path and target.gguf_file mean; None where it is no such target.

    Raises InputError where there is none, several that could be meant, or a part of one.
    """
    path = Path(config.path)
    if config.gguf_file is not None:
        file = _named(config)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"target.path: {config.path!r} does not exist")
        file = path
    elif path.is_dir() and not any((path / n).is_file() for n in _OTHERS):
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise InputError(
                f"target.path: {config.path!r} holds several GGUF files; say which by "
                f"target.gguf_file: {names}"
            )
        file = found[0] if found else None
    else:
        return None
    if file is not None and _PART.search(file.name):
        raise InputError(
            f"target.path: {file} is a part of a GGUF file; join the parts with llama.cpp's "
            "`llama-gguf-split --merge` and give the whole"
        )
    return file


# What marks a folder as a model, or an adapter, whatever else lies in it
_OTHERS = ("config.json", "adapter_config.json")


def _named(config: TargetConfig) -> Path:
    """target.gguf_file of the folder, or of the Hub's repository, target.path."""
    file = Path(config.path, config.gguf_file)
    if file.is_file():
        return file
    if not os.path.isdir(config.path):
        from transformers.utils import cached_file

        try:
            return Path(cached_file(config.path, config.gguf_file, revision=config.revision))
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"target.gguf_file: the Hub did not give {config.gguf_file!r} of "
                f"{config.path!r}: {first}"
            ) from None
    there = ", ".join(found.name for found in sorted(Path(config.path).glob("*.gguf")))
    raise InputError(
        f"target.gguf_file: {config.path!r} has no {config.gguf_file!r}; it has {there or 'none'}"
    )


def as_folder(file: Path) -> str:
    """The ordinary model folder made of a GGUF file, now or before.

    Raises InputError naming the file where it cannot be read or kept.
    """
    status = file.stat()
    digest = _digest(str(file), status.st_size, status.st_mtime_ns)
    cache = cache_folder()
    folder = cache / f"gguf-{digest}-{_MAKING}"
    if folder.is_dir():
        return str(folder)
    _import_gguf(file)
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes one makes it
            if not folder.is_dir():
                remove_leftovers(cache)
                _make(file, folder)
    except OSError as error:
        raise _cannot_keep(file, folder, error) from error
    return str(folder)


@lru_cache
def _digest(path: str, size: int, changed: int) -> str:
    """16 hex digits of a file of that size and time of change."""
    return digest_file(path)[:16]


def _import_gguf(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(
            f"target.path: {file} is a GGUF file, which needs the package gguf, not installed: "
            "pip install gguf"
        ) from None
    return gguf


def _make(file: Path, folder: Path) -> None:
    n_values, dtype = _measure(file)
    room, need = shutil.disk_usage(folder.parent).free, n_values * _FLOAT32_BYTES
    if need > room:
        raise _cannot_keep(file, folder, f"it takes {need:,} bytes, and {room:,} are free")
    print(
        f"{file.name}: unpacking {n_values:,} weights, once; kept in {folder}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    model = _load(file)
    try:
        with new_folder(folder) as part:
            _save(model, file, part, dtype)
    except Exception as error:  # a full disk is safetensors' own class
        raise _cannot_keep(file, folder, error) from error


def unpack(file: Path, folder: Path, dtype: str) -> None:
    """Write the model of a GGUF file into an existing folder, in `dtype`. Raises InputError as
    `as_folder` does."""
    import torch

    _measure(file)
    _save(_load(file).to(getattr(torch, dtype)), file, folder, dtype)


def _save(model: Any, file: Path, folder: Path, dtype: str) -> None:
    """dtype: what config.json says that the model is to be computed in, where one may choose; the
    weights are written as they are."""
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(file, _reader(file))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    write_json(folder / "config.json", {**settings, "dtype": dtype})


def _cannot_keep(file: Path, folder: Path, why: Any) -> InputError:
    return InputError(
        f"target.path: what {file} unpacks to cannot be kept in {folder.parent}: {why}. Make room, "
        f"or name another folder by the environment variable {CACHE}"
    )


def _reader(file: Path) -> Any:
    return _import_gguf(file).GGUFReader(str(file))


def _measure(file: Path) -> tuple[int, str]:
    """Weights in the file, and the dtype that an accelerator should compute in. Raises InputError
    where the file is damaged."""
    _import_gguf(file)
    try:
        reader = _reader(file)
        kind = reader.get_field("general.file_type")
        kind = None if kind is None else int(kind.parts[-1][0])
        return sum(int(t.n_elements) for t in reader.tensors), _FILE_TYPES.get(kind, "bfloat16")
    except Exception as error:  # where the bytes end decides what fails, and how
        raise InputError(
            f"target.path: {file} is no whole GGUF file, perhaps cut off ({error}); get it anew"
        ) from error


def _load(file: Path) -> Any:
    """The model, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        # Without dequantize=True the weights are as plain, but save_pretrained refuses them.
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, config=read_config(file, _reader(file)),
            dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # as various as what can be wrong with a file
        raise InputError(
            f"target.path: transformers cannot read {file} ({error}); give the model that it was "
            "made from"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"target.path: {file} lacks {len(missing)} of the model's weights, "
            f"{', '.join(missing[:3])}; give the model that it was made from"
        )
    return model
