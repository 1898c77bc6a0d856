"""The one list of what can be loaded as a draft head, told apart by its `config.json`.

A kind of this library lies in the module of its name, which calls its class HEAD; `config.KINDS`
names them all. `given_to` knows of no kind, so that what travels with an export
(`custom_generate/`) takes its own kind along and no other.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from redrafter.config import KINDS
from redrafter.contracts import InputError
from redrafter.fetch import fetch
from redrafter.heads import apple, hydra_layouts, medusa_layouts, mlp_speculator
from redrafter.heads.base import DraftHead
from redrafter.heads.owner import AllowOther, check_target
from redrafter.heads.reading import read_config
from redrafter.products import multiplier_for

#: model_type of another project's layout -> its reader; a speculator's is written here, too, but
#: what others write differs in details
_READERS = {
    apple.MODEL_TYPE: apple.load_apple,
    "mlp_speculator": mlp_speculator.load_mlp_speculator,
    medusa_layouts.MODEL_TYPE: medusa_layouts.load_medusa,
    hydra_layouts.MODEL_TYPE: hydra_layouts.load_hydra,
}
#: key of a configuration that names no model_type -> the one whose it is
_UNNAMED = {
    "medusa_num_heads": medusa_layouts.MODEL_TYPE,
    "hydra_num_heads": hydra_layouts.MODEL_TYPE,
}


def head_class(kind: str) -> type[DraftHead]:
    """The class of a kind of heads, one of `config.KINDS`."""
    return import_module(f"redrafter.heads.{kind}").HEAD


def own_class(folder: str | Path) -> type[DraftHead] | None:
    """The class of a head that this library wrote; None for another's.

    Raises InputError naming the file where there is no head.
    """
    fields = read_config(folder)
    wanted = fields.get("model_type")
    if wanted in _READERS and "redrafter_version" not in fields:
        return None  # in a layout that others write, too, with details of their own
    classes = (head_class(kind) for kind in KINDS)
    return next((cls for cls in classes if cls.config_class.model_type == wanted), None)


def load_head(
    path: str | Path,
    target: Any = None,
    allow_other_target: AllowOther = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    option: str = "head",
) -> DraftHead:
    """Read a head from a folder or the Hub (`owner/name`, `owner/name@revision`), told apart by its
    `config.json`; nothing is unpickled. A Hub repository is fetched whole: what was trained for the
    head (disco/) and measured on it (profiles/) comes with it.

    target: if given, the head must have its width and vocabulary and its fingerprint; the head is
        then moved to its device and bound
    allow_other_target: "merged" takes a target that computes the same, too (compared with what was
        recorded in training: a base merged with its adapter); True takes any
    revision, token: of a head on the Hub; token None is the usual one (HF_TOKEN, or a login)
    option: what the path was given for, for messages
    Raises InputError naming the file for anything that does not fit.
    """
    path = Path(fetch(str(path), option, revision=revision, token=token))
    fields = read_config(path)
    kind = fields.get("model_type") or next(
        (kind for key, kind in _UNNAMED.items() if key in fields), None
    )
    own = own_class(path)
    if own is None and kind not in _READERS:
        known = {head_class(name).config_class.model_type: None for name in KINDS} | _READERS
        raise InputError(
            f"{path / 'config.json'}: model_type {kind!r} is no draft head known here "
            f"({', '.join(known)})"
        )
    reader = _READERS.get(kind) or own.load
    return given_to(target, reader(path), path, allow_other_target)


def given_to(target: Any, head: Any, path: Path, allow_other_target: AllowOther) -> Any:
    """A head that was read from `path`, ready to draft for a target; see `load_head`."""
    if target is not None:
        check_target(head, target, path, allow_other_target)
        matrix = target.lm_head_weight
        dtype = matrix.dtype if multiplier_for(matrix) is None else torch.float32
        head = computable(head.to(target.device), dtype).bind(target)
    head.name_or_path = str(path)  # what was trained for it may lie beside it
    return head.eval()


def computable(head: Any, dtype: torch.dtype) -> Any:
    """A head that is stored in half precision for a target that computes in float32 or wider does
    so too: the same numbers, and most CPUs have no half-precision products.

    dtype: what the target computes in
    """
    return head.float() if next(head.parameters()).dtype.itemsize < 4 <= dtype.itemsize else head


def load_trainable(
    path: str | Path,
    target: Any = None,
    allow_other_target: AllowOther = False,
    option: str = "head",
) -> DraftHead:
    """`load_head` for whoever goes on training the head, or writes it in another layout.

    Raises InputError for a head of which only drafting is known, too.
    """
    head = load_head(path, target, allow_other_target, option=option)
    if head.only_drafts:
        raise InputError(
            f"{path}: {head.only_drafts} can draft here, but neither be trained nor written; give "
            f"another head"
        )
    return head
