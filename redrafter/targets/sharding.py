"""A target larger than one device: every process holds a part of each layer (DeepSpeed ZeRO-3).

`target.shard zero3`. DeepSpeed splits the weights while transformers loads them (the main process
alone reads the values), and gathers them layer by layer in every forward pass. The embedding and
lm_head stay whole in every process: a draft head is trained on both in every step, and so only the
backbone's forward is collective. A process then holds 1/n of the layers, and the vocabulary.

Processes need not make equally many forwards: rows of different lengths are shared out, and some
are decoded. So a process says before every forward that it makes one, and whoever has finished its
share keeps stepping, on a single token, until all have (`together`; `synced_gpus` of transformers
does the like). Every process still does its own share of the work only. Saying so costs a message
between CPUs per forward, little beside gathering a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from redrafter.contracts import InputError
from redrafter.processes import asked_for, everyone
from redrafter.targets.checkpoint import load_complete

#: DeepSpeed's name of each dtype that it can split
_SWITCH = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "fp16"}

#: weights that are gathered before their module is reached (DeepSpeed's own default)
AHEAD_ELEMENTS = 50_000_000


class ShardedBackbone:
    """A transformers model without its lm_head, split by `split`; called like it.

    Calls are collective: all processes make them alike, or inside of `together`.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module
        self._nothing = torch.zeros(1, 1, dtype=torch.long, device=device)

    def __call__(self, **inputs: Any) -> Any:
        self._say(works=True)
        return self.module(**inputs)

    @contextmanager
    def together(self) -> Iterator[None]:
        """In the body every process makes the forwards that it needs, in any number. All processes
        enter it alike, and nothing else in it is collective."""
        yield
        while self._say(works=False):
            with torch.no_grad():
                self.module(input_ids=self._nothing, use_cache=False)

    def _say(self, works: bool) -> bool:
        """Whether any process makes a forward now."""
        return self.any_of(works)

    @staticmethod
    def any_of(flag: bool) -> bool:
        """Whether any process says so; collective."""
        return any(everyone(flag))

    @staticmethod
    @contextmanager
    def whole(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        """The parameter with its values, in every process; collective."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter

    def bytes_held(self) -> tuple[int, int]:
        """Of the backbone's weights, without the embedding: (in this process, in all of them)."""
        parts = [p for p in self.module.parameters() if hasattr(p, "ds_tensor")]
        held = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parts)
        return held, sum(p.ds_numel * p.ds_tensor.element_size() for p in parts)


def check_launch(adapter: bool, dtype: torch.dtype) -> None:
    """Raises InputError where a target cannot be split."""
    if not asked_for("DEEPSPEED"):
        raise InputError(
            "target.shard zero3 needs processes started by DeepSpeed: accelerate launch "
            "--config_file configs/accelerate/zero3.yaml (or zero1, zero2); without it, leave "
            "target.shard out"
        )
    if adapter:
        raise InputError(
            "target.shard zero3 cannot split an adapter's folder, for merging takes whole weights: "
            "merge it once (peft's merge_and_unload, then save_pretrained) and give that folder"
        )
    if dtype not in _SWITCH:
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"target.shard zero3 has no {name}: set target.dtype float32 or bfloat16")


def _settings(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """For DeepSpeed. Vectors stay whole: gathering them costs more time than they take memory."""
    stage = {
        "stage": 3,
        "stage3_param_persistence_threshold": 8 * width,
        "stage3_prefetch_bucket_size": AHEAD_ELEMENTS,
        "memory_efficient_linear": False,  # it would replace torch's own function for everybody
    }
    switch = _SWITCH[dtype]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": stage,
        **({switch: {"enabled": True}} if switch else {}),
    }


def load_split(
    path: str, config: Any, dtype: torch.dtype, device: torch.device, **kwargs: Any
) -> tuple[Any, ShardedBackbone]:
    """`from_pretrained` with every process keeping its part; collective.

    config: the model's own, for its width. Returns the model and its backbone.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = _settings(dtype, config.get_text_config().hidden_size)
    asked = HfDeepSpeedConfig(settings)  # transformers looks for it as long as it is referred to
    try:
        model = load_complete(path, dtype=dtype, **kwargs)
    finally:
        unset_hf_deepspeed_config()
        del asked
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    _make_whole(model.get_input_embeddings(), model.get_output_embeddings())
    return model, _split(model, settings, device)


def _make_whole(*modules: nn.Module | None) -> None:
    """Their parameters become ordinary ones; those that were the same stay the same."""
    whole: dict[int, nn.Parameter] = {}
    for module in filter(None, modules):
        for name, split in list(module.named_parameters(recurse=False)):
            if id(split) not in whole:
                with ShardedBackbone.whole(split) as values:
                    whole[id(split)] = nn.Parameter(values.data.clone(), requires_grad=False)
            setattr(module, name, whole[id(split)])


def _split(model: Any, settings: dict[str, Any], device: torch.device) -> ShardedBackbone:
    """DeepSpeed gathers in hooks of all modules that it is given: it is not given the embedding."""
    import deepspeed

    backbone, embedding = model.base_model, model.get_input_embeddings()
    place = next(name for name, module in backbone.named_modules() if module is embedding)
    parent, _, name = place.rpartition(".")
    holder = backbone.get_submodule(parent)
    del holder._modules[name]
    try:
        deepspeed.initialize(model=backbone, config=settings, dist_init_required=False)
    finally:
        holder._modules[name] = embedding
    return ShardedBackbone(backbone, device)
