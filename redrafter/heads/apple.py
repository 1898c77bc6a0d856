"""Apple's drafter folders (ml-recurrent-drafter, `recurrent_drafting_drafter`), in and out.

The maths and the tensor names are the same as ours, so weights are copied, not converted. What
their format has no place for is refused, but for the frozen scale of the embeddings, which is
folded into the matrix that reads them.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.heads.recurrent import (
    RecurrentHead,
    RecurrentHeadConfig,
    check_config,
    read_config,
    read_tensors,
)

MODEL_TYPE = "recurrent_drafting_drafter"


def load_apple(folder: str | Path) -> RecurrentHead:
    """Read one of Apple's drafters. Raises InputError naming the file where it does not fit."""
    folder = Path(folder)
    fields, file = read_config(folder), folder / "config.json"
    if fields.get("model_type") != MODEL_TYPE:
        raise InputError(f"{file}: model_type {fields.get('model_type')!r} is not {MODEL_TYPE!r}")
    wanted = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers")
    for name in wanted:
        if not isinstance(fields.get(name), int):
            raise InputError(f"{file}: {name} is {fields.get(name)!r}; it must be an integer")
    config = RecurrentHeadConfig(
        **{name: fields[name] for name in wanted},
        cell="simple" if fields.get("rnn", False) else "sum",
    )
    check_config(config, str(file))
    head = RecurrentHead(config)
    expected = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    head.load_state_dict(read_tensors(folder / "model.safetensors", expected))
    return head


def save_apple(head: RecurrentHead, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` as Apple's code reads them.

    Raises InputError naming what their format cannot express.
    """
    config = head.config
    foreign = {
        "first_state": config.first_state == "code" or config.cell == "sum",
        "cell": config.cell in ("simple", "sum"),
        "input_norm": not config.input_norm,
        "output": config.output == "own",
        "draft_vocab_size": config.draft_vocab_size is None,
        # The sum has no matrix to take the scale up.
        "embedding_scale": config.embedding_scale == "none" or config.cell == "simple",
    }
    refused = [f"{name} = {getattr(config, name)!r}" for name, fits in foreign.items() if not fits]
    if refused:
        raise InputError(
            f"Apple's format cannot express {', '.join(refused)}; train a head without it, or "
            "keep the format of this library"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    scale: Tensor | None = tensors.pop("inverse_rms", None)
    if scale is not None:
        tensors["rnn_w.weight"] = tensors["rnn_w.weight"] * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {
        "architectures": ["Drafter"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_draft_layers,
        "rnn": config.cell == "simple",
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
