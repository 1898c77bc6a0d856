"""Apple's drafter folders (ml-recurrent-drafter, `recurrent_drafting_drafter`), in and out.

The maths and the tensor names are the same as ours, so weights are copied, not converted. What
their format has no place for is refused, but for the frozen scale of the embeddings, which is
folded into the matrix that reads them. Their drafter, when it decodes, also takes the row's maximum
off the logits and keeps the best 50: that changes no order, so it is left to their code.
Source: apple/ml-recurrent-drafter, configuration_drafter.py and modeling_drafter.py.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.files import write_json, write_tensors
from redrafter.heads.base import DraftHead
from redrafter.heads.reading import read_config, with_weights
from redrafter.heads.recurrent import RecurrentHead, RecurrentHeadConfig

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
    config.check(str(file))
    return with_weights(RecurrentHead(config), folder)


def save_apple(head: DraftHead, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` as Apple's code reads them.

    A head that draws on the target's lm_head must be bound to it: the matrix behind its last map is
    multiplied out, (V, H) x (H, E), and is from then on the head's own.
    Raises InputError naming what their format cannot express.
    """
    if not isinstance(head, RecurrentHead):
        raise InputError(f"Apple's format is for recurrent heads; this is a {head.kind} head")
    config = head.config
    foreign = {
        "first_state": config.first_state == "code" or config.cell == "sum",
        "cell": config.cell in ("simple", "sum"),
        "input_norm": not config.input_norm,
        "state_norm": not config.state_norm,
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
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    scale: Tensor | None = tensors.pop("inverse_rms", None)
    if scale is not None:
        matrix = tensors["rnn_w.weight"]
        tensors["rnn_w.weight"] = (matrix.double() * scale.double()).to(matrix.dtype)
    if head.draws_on_target:
        last = tensors.pop("to_hidden.weight")
        matrix = head.vocab_matrix().detach().cpu().float() @ last.float()
        tensors[f"lm_head.{config.num_draft_layers}.weight"] = matrix.to(last.dtype)
    dtype = next(iter(tensors.values())).dtype
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    # Every key that their `save_pretrained` writes. num_lookback_tokens is never read by their
    # code, and no launcher of theirs sets it; the dtype has the name that all versions read.
    content = {
        "architectures": ["Drafter"],
        "exit_dim": config.exit_dim,
        "hidden_size": config.hidden_size,
        "model_type": MODEL_TYPE,
        "num_draft_layers": config.num_draft_layers,
        "num_lookback_tokens": -1,
        "rnn": config.cell == "simple",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
        "vocab_size": config.vocab_size,
    }
    write_json(folder / "config.json", content)
