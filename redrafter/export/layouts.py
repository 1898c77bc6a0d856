"""Heads from one layout to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from redrafter.contracts import InputError
from redrafter.export.complete import complete
from redrafter.files import new_folder, provenance, write_json
from redrafter.heads.apple import save_apple
from redrafter.heads.base import DraftHead
from redrafter.heads.load import given_to, load_trainable
from redrafter.heads.medusa_layouts import save_vllm_medusa
from redrafter.heads.mlp_speculator import save_speculator
from redrafter.heads.owner import belong_to

#: layout of another project -> what writes a head in it
WRITERS = {
    "apple": save_apple,
    "vllm-medusa": save_vllm_medusa,
    "mlp_speculator": save_speculator,
}


def convert(
    head: str | Path, to: str, out: str | Path, target: Any = None, dtype: str | None = None
) -> DraftHead:
    """Write the head of a folder in the layout `to` ("redrafter", or one of `WRITERS`) as the
    folder `out`.

    dtype: of the weights that are written; None leaves them
    target: the one it was trained for; "redrafter" records it, so that another one is refused
        later, and adds what every export carries
    Returns the head. Raises InputError, before anything is written, where the head does not fit the
    target, the layout cannot express it, or `out` holds something.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"out: {out} exists; give a folder that does not, or an empty one")
    read = load_trainable(head)
    if to != "redrafter" and (more := read.reads_more):
        raise InputError(
            f"{head}: the layout {to} has no place for a context of {more}: train a head "
            "without, or keep the layout redrafter"
        )
    stored = next(read.parameters()).dtype  # before it computes as the target does
    read = given_to(target, read, Path(head), False)
    if to != "redrafter" and read.draws_on_target and target is None:
        raise InputError(
            f"{head}: this head draws on the target's lm_head, and the layout {to} has it in the "
            "head: give --target.path"
        )
    read = read.to(stored if dtype is None else getattr(torch, dtype))
    if not all(bool(p.isfinite().all()) for p in read.parameters()):
        raise InputError(f"dtype: {head} has weights beyond the range of {dtype}: take bfloat16")
    with new_folder(out) as part:
        if to in WRITERS:
            WRITERS[to](read, part)
        else:
            if target is not None:
                belong_to(read, target)
            read.save_pretrained(part)
        write_json(part / "provenance.json", provenance(layout=to, converted_from=origin(head)))
        if to == "redrafter" and target is not None:
            for told in complete(part, target):
                print(told, flush=True)
    return read


def origin(folder: str | Path) -> dict[str, Any]:
    """What the head was made from, so that an evaluation still knows the rows it was trained on."""
    file = Path(folder) / "provenance.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return {"head": Path(folder).resolve().name, "provenance": known}
