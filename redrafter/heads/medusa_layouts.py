"""Medusa heads as others write them: FasterDecoding's, and vLLM's, which is written here, too.

    FasterDecoding/Medusa   config.json with medusa_num_heads; medusa_lm_head.safetensors:
                            I.J.linear.{weight, bias} block J of head I, I.R.weight its matrix
    vLLM (MedusaModel)      config.json of model_type medusa; model.safetensors:
                            blocks.I.layers.J.{weight, bias}, lm_heads.I.weight; with
                            original_lm_head one matrix for all; token_map, ids of a pruned one

How many heads and blocks there are is read off the tensors: configurations that people publish say
other numbers. Sources: FasterDecoding/Medusa, medusa/model/medusa_model.py; vllm 0.32,
model_executor/models/medusa.py and transformers_utils/configs/medusa.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.files import write_json, write_tensors
from redrafter.heads.base import DraftHead
from redrafter.heads.medusa import MedusaHead, MedusaHeadConfig
from redrafter.heads.reading import read_config, read_tensors, stored_shapes, weight_files

MODEL_TYPE = "medusa"  # vLLM's; FasterDecoding's configurations have none
_STEM = "medusa_lm_head"
_PREFIX = re.compile(r"^medusa_heads?\.")
_NAMES = {
    r"(\d+)\.(\d+)\.linear\.(weight|bias)": r"blocks.\1.\2.linear.\3",
    r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)": r"blocks.\1.\2.linear.\3",
    r"(\d+)\.\d+\.weight": r"lm_heads.\1.weight",
    r"lm_heads\.(\d+)\.weight": r"lm_heads.\1.weight",
    r"lm_head\.weight": "lm_heads.0.weight",
    r"token_map": "draft_ids",
}


def load_medusa(folder: str | Path) -> MedusaHead:
    """Read heads in either layout, in the dtype that they are stored in.

    Raises InputError naming the file, and what does not fit or is not known.
    """
    folder = Path(folder)
    fields = read_config(folder)
    files = weight_files(folder, _STEM)
    shapes = stored_shapes(files)
    names = {stored: _own_name(stored) for stored in shapes}
    unknown = [stored for stored, name in names.items() if name is None]
    if unknown:
        raise InputError(f"{folder}: unknown tensors {unknown}; these are no Medusa heads")
    stored = read_tensors(files, shapes)
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    config = _config_of(tensors, fields, folder)
    _complete(tensors, config, bool(fields.get("original_lm_head")))
    with torch.device("meta"):
        head = MedusaHead(config)
    expected = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        differing = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        raise InputError(
            f"{folder}: {', '.join(differing)}: missing, or not of the shapes that the other "
            f"tensors have ({config.num_heads} heads, {config.num_draft_layers} blocks each)"
        )
    head.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
    return head


def _own_name(stored: str) -> str | None:
    bare = _PREFIX.sub("", stored)
    for pattern, name in _NAMES.items():
        if re.fullmatch(pattern, bare):
            return re.sub(pattern, name, bare)
    return None


def _config_of(
    tensors: dict[str, Tensor], fields: dict[str, Any], folder: Path
) -> MedusaHeadConfig:
    matrix, ids = tensors.get("lm_heads.0.weight"), tensors.get("draft_ids")
    if matrix is None:
        raise InputError(f"{folder}: no matrix over the vocabulary in its weights")
    numbered = [name.split(".") for name in tensors if "." in name]
    return MedusaHeadConfig(
        vocab_size=len(matrix) if ids is None else int(fields.get("vocab_size", len(matrix))),
        hidden_size=matrix.shape[1],
        draft_vocab_size=None if ids is None else len(ids),
        num_heads=1 + max(int(head) for _, head, *_ in numbered),
        num_draft_layers=max(
            (1 + int(block) for part, _, block, *_ in numbered if part == "blocks"), default=0
        ),
        target_name=Path(str(fields.get("base_model_name_or_path", ""))).name,
    )


def _complete(tensors: dict[str, Tensor], config: MedusaHeadConfig, one_matrix: bool) -> None:
    """What a file may leave out: biases, and the copies of one matrix."""
    first = tensors["lm_heads.0.weight"]
    for i in range(config.num_heads):
        for j in range(config.num_draft_layers):
            bias = f"blocks.{i}.{j}.linear.bias"
            tensors.setdefault(bias, first.new_zeros(config.hidden_size))
        matrix = f"lm_heads.{i}.weight"
        if one_matrix:
            tensors.setdefault(matrix, first)
        if config.draft_vocab_size not in (None, len(tensors.get(matrix, ()))):
            tensors[matrix] = tensors[matrix][tensors["draft_ids"].long()]
    if "draft_ids" in tensors:
        tensors["draft_ids"] = tensors["draft_ids"].long()


def save_vllm_medusa(head: DraftHead, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` as vLLM's MedusaModel reads them.

    A head that draws on the target's lm_head must be bound to it: the matrix is written once, for
    all heads. Raises InputError naming what vLLM's layout cannot express.
    """
    if not isinstance(head, MedusaHead):
        raise InputError(f"vLLM's Medusa is for medusa heads; this is a {head.kind} head")
    config = head.config
    if config.draft_vocab_size is not None:
        raise InputError(
            "vLLM's Medusa makes every matrix as long as the target's vocabulary: train a head "
            f"without draft_vocab_size ({config.draft_vocab_size} here)"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in head.blocks.state_dict().items():
        i, j, _, end = name.split(".")
        tensors[f"blocks.{i}.layers.{j}.{end}"] = tensor
    shared = head.draws_on_target
    for i in range(1 if shared else config.num_heads):
        tensors[f"lm_heads.{i}.weight"] = head.vocab_matrix(i + 1)
    # One dtype: that of the blocks, where the matrix is the target's.
    dtype = next(iter(tensors.values())).dtype
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}
    write_tensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
    content = {
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "medusa_fc_bias": True,
        "model_type": MODEL_TYPE,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_draft_layers,
        "original_lm_head": shared,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "truncated_vocab_size": config.vocab_size,
        "vocab_size": config.vocab_size,
    }
    write_json(Path(folder) / "config.json", content)
