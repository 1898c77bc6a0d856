"""The one list of what can be loaded as a draft head, told apart by its `config.json`.

`load_own` knows this library's own layout alone, so that what travels with an export
(`custom_generate/`) takes none of the other layouts along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redrafter.contracts import InputError
from redrafter.fetch import fetch
from redrafter.heads.apple import load_apple
from redrafter.heads.mlp_speculator import load_mlp_speculator
from redrafter.heads.owner import AllowOther, check_target
from redrafter.heads.reading import read_config, with_weights
from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig, check_config


def load_head(
    path: str | Path,
    target: Any = None,
    allow_other_target: AllowOther = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    option: str = "head",
) -> Any:
    """Read a head from a folder or the Hub (`owner/name`, `owner/name@revision`), told apart by its
    `config.json`; nothing is unpickled. A Hub repository is fetched whole: what was trained for the
    head (disco/) and measured on it (profiles/) comes with it.

    target: if given, the head must have its width and vocabulary and its fingerprint; the head is
        then moved to its device and bound
    allow_other_target: "merged" takes a target that computes the same, too (compared with what was
        recorded in training: a base merged with its adapter); True takes any
    revision, token: of a head on the Hub; token None is the usual one (HF_TOKEN, or a login)
    option: what the path was given for, for messages
    Returns a RecurrentHead (ours or Apple's), or an MLPSpeculator (IBM's or Arctic's), which drafts
    alike but is not trained here.
    Raises InputError naming the file for anything that does not fit.
    """
    path = Path(fetch(str(path), option, revision=revision, token=token))
    fields = read_config(path)
    loaders = {
        RecurrentHeadConfig.model_type: _load_own,
        "recurrent_drafting_drafter": load_apple,
        "mlp_speculator": load_mlp_speculator,
    }
    kind = fields.get("model_type")
    if kind not in loaders:
        raise InputError(
            f"{path / 'config.json'}: model_type {kind!r} is no draft head known here "
            f"({', '.join(loaders)})"
        )
    return _given_to(target, loaders[kind](path), path, allow_other_target)


def load_own(
    folder: str | Path, target: Any = None, allow_other_target: AllowOther = False
) -> RecurrentHead:
    """`load_head` of a local folder of this library's own layout."""
    return _given_to(target, _load_own(Path(folder)), Path(folder), allow_other_target)


def _given_to(target: Any, head: Any, path: Path, allow_other_target: AllowOther) -> Any:
    if target is not None:
        check_target(head, target, path, allow_other_target)
        head = _computable(head.to(target.device), target).bind(target)
    head.name_or_path = str(path)  # what was trained for it may lie beside it
    return head.eval()


def _computable(head: Any, target: Any) -> Any:
    """A head that is stored in half precision for a target that computes in float32 or wider does
    so too: the same numbers, and most CPUs have no half-precision products."""
    widths = [x.dtype.itemsize for x in (next(head.parameters()), target.lm_head_weight)]
    return head.float() if widths[0] < 4 <= widths[1] else head


def load_recurrent(
    path: str | Path,
    target: Any = None,
    allow_other_target: AllowOther = False,
    option: str = "head",
) -> RecurrentHead:
    """`load_head` for whoever goes on training the head, or writes it in another layout.

    Raises InputError for a head that is not recurrent, too.
    """
    head = load_head(path, target, allow_other_target, option=option)
    if not isinstance(head, RecurrentHead):
        raise InputError(
            f"{path}: a {type(head).__name__} can draft here, but neither be trained nor written; "
            "give a recurrent head (ours or Apple's)"
        )
    return head


def _load_own(path: Path) -> RecurrentHead:
    config = RecurrentHeadConfig.from_dict(read_config(path))
    check_config(config, str(path / "config.json"))
    return with_weights(RecurrentHead(config), path)
