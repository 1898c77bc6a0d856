"""What a head asks of its target, answered by a model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from redrafter.contracts import InputError
from redrafter.files import digest_weights
from redrafter.heads.reading import weight_files


class EngineTarget:
    """The embeddings and the lm_head of vLLM's model, as `redrafter.targets.Target` gives them.

    model: vLLM's module, loaded, in one process (no tensor or pipeline parallelism)
    config: its `vllm.config.ModelConfig`
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self.name = str(config.model)
        self.hidden_size, self.vocab_size = config.get_hidden_size(), config.get_vocab_size()
        if not hasattr(model, "embed_input_ids"):
            raise InputError(
                f"{self.name}: vLLM's {type(model).__name__} has no embed_input_ids, which a "
                "head's drafts are made from; this version of vLLM is too old (0.32 is tested)"
            )
        # Granite's scale is the one that stands in the model's forward; Gemma's is in here.
        self._scale = float(getattr(config.hf_text_config, "embedding_multiplier", 1.0))
        self.tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., H), as the first layer sees it."""
        e = self.model.embed_input_ids(tokens.flatten()).view(*tokens.shape, -1)
        return e if self._scale == 1.0 else e * self._scale

    def project(self, hidden: Tensor) -> Tensor:
        """(B, H) final hidden states -> (B, V) logits, by vLLM's own code."""
        return self.model.compute_logits(hidden)[:, : self.vocab_size]

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, H), without the rows that vLLM pads it with."""
        module = getattr(self.model, "lm_head", None)
        if module is None and self.tied:
            module = getattr(getattr(self.model, "model", None), "embed_tokens", None)
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise InputError(
                f"{self.name}: this head draws on the target's lm_head, and vLLM's "
                f"{type(self.model).__name__} has none that can be read (quantised, or named "
                "otherwise): train a head with head.output own"
            )
        return weight[: self.vocab_size]


def check_sizes(head: Any, model: str, sizes: dict[str, int], path: str) -> None:
    """Raises InputError where a head was made for a model of another width or vocabulary.

    sizes: the model's `hidden_size` and `vocab_size`, as far as they are known
    path: of the head, for the message
    """
    for name, want in sizes.items():
        have = getattr(head.config, name)
        if have != want:
            raise InputError(
                f"{path}: the head's {name} is {have}, that of the model {model} is {want}; "
                "serve the model that the head was trained for"
            )


def is_of(head: Any, folder: Path, tied: bool) -> bool | None:
    """Whether a head was trained for the very weights in a folder; None where nothing can tell.

    tied: the lm_head is the embedding, and a copy of it in the files is no weight of its own
    """
    if not head.config.target_base or head.config.target_adapter:
        return None
    try:
        files = weight_files(folder)
    except InputError:  # another format
        return None
    stored: list[tuple[str, tuple[Path, str]]] = []
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            stored += [(name, (file, name)) for name in opened.keys()]  # noqa: SIM118
    if tied:
        stored = [entry for entry in stored if entry[0] != "lm_head.weight"]
    return digest_weights(stored, whole=_read) == head.config.target_base


@contextmanager
def _read(place: tuple[Path, str]) -> Iterator[Tensor]:
    """One tensor at a time: a checkpoint may be larger than what is left of the memory."""
    file, name = place
    with safetensors.safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor(name)
        # An integer tensor (a quantised checkpoint's) has no sample in bfloat16 worth comparing.
        yield tensor if tensor.is_floating_point() else torch.zeros(1)
