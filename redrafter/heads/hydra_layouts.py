"""Hydra heads as the paper's code writes them (zankner/Hydra), as drafters.

    config.json with hydra_num_heads; hydra_lm_head.safetensors (theirs is a pickle, .pt):
    hydra_mlp.I.J.{linear, res_connection}.{weight, bias}  block J of head I
    hydra_lm_head.I.{weight, bias}                         its matrix over the vocabulary

The bias of the vocabulary becomes the matrix's last column, which multiplies a 1. Refused: other
arguments of theirs than the grounded MLP on the last hidden state; `prefix-mlp` (Hydra++) attends
to the whole prefix by another layer than that of `heads/prefix.py`. Sources: zankner/Hydra,
hydra/train/train.py (names of the files), hydra/model/hydra_heads/prefix_mlp_head.py and its
sibling for `mlp`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from redrafter.contracts import InputError
from redrafter.heads.hydra import HydraHead, HydraHeadConfig
from redrafter.heads.reading import read_config, read_tensors, stored_shapes, weight_files

MODEL_TYPE = "hydra"
_STEM = "hydra_lm_head"
_WANTED = {"hydra_head_arch": "mlp", "grounded_heads": True, "hidden_state_offset": 0}


def load_hydra(folder: str | Path) -> HydraHead:
    """Read Hydra's heads, in the dtype that they are stored in.

    Raises InputError naming the file, and what does not fit or is not supported.
    """
    folder = Path(folder)
    fields = read_config(folder)
    for name, wanted in _WANTED.items():
        if fields.get(name, wanted) != wanted:
            raise InputError(
                f"{folder / 'config.json'}: {name} = {fields[name]!r} is not supported, only "
                f"{wanted!r}: heads that attend to the prefix, or read other states, are of "
                "another kind"
            )
    files = weight_files(folder, _STEM)
    shapes = stored_shapes(files)
    matrix = shapes.get("hydra_lm_head.0.weight")
    blocks = [name.split(".") for name in shapes if name.startswith("hydra_mlp.")]
    if matrix is None or not blocks:
        raise InputError(f"{folder}: no hydra_mlp or no hydra_lm_head in its weights")
    config = HydraHeadConfig(
        vocab_size=matrix[0],
        hidden_size=matrix[1],
        num_heads=1 + max(int(head) for _, head, *_ in blocks),
        num_draft_layers=1 + max(int(block) for _, _, block, *_ in blocks),
        output_bias="hydra_lm_head.0.bias" in shapes,
        target_name=Path(str(fields.get("base_model_name_or_path", ""))).name,
    )
    with torch.device("meta"):
        head = HydraHead(config)
    expected = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    if config.output_bias:
        for i in range(config.num_heads):
            rows, columns = expected[f"hydra_lm_head.{i}.weight"]
            expected[f"hydra_lm_head.{i}.weight"] = (rows, columns - 1)
            expected[f"hydra_lm_head.{i}.bias"] = (rows,)
    tensors = {name: t.clone() for name, t in read_tensors(files, expected).items()}
    if config.output_bias:
        for i in range(config.num_heads):
            bias = tensors.pop(f"hydra_lm_head.{i}.bias")[:, None]
            name = f"hydra_lm_head.{i}.weight"
            tensors[name] = torch.cat((tensors[name], bias), dim=1)
    head.load_state_dict(tensors, assign=True)
    return head
