"""Where a model lies, and what transformers says where it cannot be read."""

from __future__ import annotations

import os

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.targets.gguf import as_folder, find_gguf

#: A checkpoint's own code is never run, and nobody is asked on a terminal whether it may.
OWN_CODE = {"trust_remote_code": False}
_SAID_CHARS = 400  # of an error of somebody else's


def check_path(config: TargetConfig) -> str:
    """target.path, of a GGUF file the folder that it was unpacked to. Raises InputError where it is
    plainly neither a model's folder nor a Hub id."""
    file = find_gguf(config)
    if file is not None:
        return as_folder(file)
    path = config.path
    if os.path.isfile(path):
        raise InputError(
            f"target.path: {path!r} is {_file_kind(path)}; give the folder of a Hugging Face model "
            "(config.json, weights, tokenizer), a GGUF file, or a Hub id"
        )
    if os.sep in path and not os.path.isdir(path) and path.count("/") != 1:
        raise InputError(f"target.path: folder {path!r} does not exist")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"target.path: {path!r} has no config.json; not a Hugging Face model")
    return path


def _file_kind(path: str) -> str:
    """What a file is that was given for a folder, by its name."""
    if os.path.splitext(path)[1] in (".safetensors", ".bin", ".pt", ".pth"):
        return "a file of weights alone"
    return "a file, not a folder"


def said(error: Exception) -> str:
    """What transformers says, but for options of its own that are none here."""
    if "trust_remote_code" in str(error):
        return (
            "it needs code from its own folder (auto_map), which is never run here. What the "
            "installed transformers has a class for is supported: take a checkpoint converted to "
            "one (a model_type that transformers knows)"
        )
    return " ".join(str(error).split())[:_SAID_CHARS] or type(error).__name__
