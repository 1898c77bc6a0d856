"""LoRA on a draft head: small trainable maps beside its frozen ones (arXiv 2106.09685, peft's).

    adapt(head, settings)   puts them in, in place; the head is used as ever, and starts as it was
    save / load             as an adapter: adapter_config.json, adapter_model.safetensors
    merged(head)            a plain head with the maps added in: what is measured and exported

Every `nn.Linear` of the head can be adapted: a recurrence (rnn_w, rnn_u), the residual blocks, the
maps between widths, and the output matrices, where they are the head's own. Those are never called
but read as matrices (chunked loss), so the head's `vocab_matrix` adds its W + s B A: a gradient of
the size of W is there during a step, as without LoRA; AdamW's averages and checkpoints are small.
`dropout` does not reach them. Not adapted: a GRU cell (no linear layer), embeddings, norms, biases,
and an output matrix that is the target's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redrafter.config import LoraSettings
from redrafter.contracts import InputError
from redrafter.files import write_tensors
from redrafter.heads.reading import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's, of the only adapter
_PREFIX = "base_model.model."  # so that peft's own PeftModel.from_pretrained(head, folder) reads it


def adapt(head: PreTrainedModel, settings: LoraSettings, start: str | Path) -> PreTrainedModel:
    """Freeze the head and put LoRA on it, in place; all it says stays the same until it is trained.

    start: where the head came from; its name is written into the adapter's configuration
    Raises InputError naming target modules that the head does not have.
    """
    start_fingerprint = head.fingerprint()
    inject(head, settings, start)
    del head._fingerprint  # of what it was
    head.lora_start = start_fingerprint
    return head


def inject(head: PreTrainedModel, settings: LoraSettings, start: str | Path) -> None:
    """`adapt`, of a head whose weights may have no content."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("head.lora needs peft, which is not installed: pip install peft") from None
    linear = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    chosen = _chosen(linear, settings.target_modules)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=chosen,
        base_model_name_or_path=Path(start).name,
    )
    inject_adapter_in_model(config, head)


def _chosen(linear: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    """Full names; a wanted one stands for itself or, as in peft, for a name that ends in it."""
    if wanted is None:
        return linear
    chosen = []
    for part in wanted:
        found = [name for name in linear if name == part or name.endswith(f".{part}")]
        if not found:
            raise InputError(
                f"head.lora.target_modules: the head has no linear map {part!r}, only "
                f"{', '.join(linear)}"
            )
        chosen += found
    return sorted(set(chosen))


def is_adapted(head: nn.Module) -> bool:
    return hasattr(head, "lora_start")


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear map that may have LoRA on it; (out, in), with gradient."""
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight
    return layer.weight + layer.get_delta_weight(_NAME)


def merged(head: PreTrainedModel) -> PreTrainedModel:
    """A plain head with the LoRA maps added in, for measuring and export; a head without LoRA is
    returned as it is. The adapted one is not touched."""
    if not is_adapted(head):
        return head
    tensors = {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in head.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in head.named_modules():
        if hasattr(module, "get_delta_weight"):
            tensors[f"{name}.weight"] = effective_weight(module).detach()
    with torch.device("meta"):  # no random numbers are drawn: a training goes on unmoved
        plain = type(head)(head.config)
    plain.load_state_dict(tensors, assign=True)
    plain._frozen_matrix = head._frozen_matrix  # bound as the other is
    return plain.eval()


def _tensors(head: PreTrainedModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(head, save_embedding_layers=False)
    return {_PREFIX + name: tensor.contiguous() for name, tensor in found.items()}


def save(head: PreTrainedModel, folder: str | Path) -> None:
    """The adapter alone, as peft lays it out. `folder` must exist."""
    head.peft_config[_NAME].save_pretrained(str(folder))
    about = {"format": "pt", "start": head.lora_start}
    write_tensors(Path(folder) / WEIGHTS, _tensors(head), about)


def load(folder: str | Path, head: PreTrainedModel) -> None:
    """Put the weights of `save` into a head that was adapted alike.

    Raises InputError naming the file where it is missing, damaged, or was trained on another head.
    """
    file = Path(folder) / WEIGHTS
    expected = {name: tuple(tensor.shape) for name, tensor in _tensors(head).items()}
    tensors = read_tensors(file, expected)
    with safetensors.safe_open(file, framework="pt") as opened:
        start = (opened.metadata() or {}).get("start")
    if start != head.lora_start:
        raise InputError(
            f"{file} was trained on a head with fingerprint {start}, head.init_from has "
            f"{head.lora_start}: give the head that it was trained on"
        )
    own: dict[str, Any] = head.state_dict()
    for name, tensor in tensors.items():
        stem, _, kind = name.removeprefix(_PREFIX).rpartition(".")
        own[f"{stem}.{_NAME}.{kind}"].copy_(tensor)
