"""Targets and heads without content: the real classes on the meta device, from configurations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from redrafter.config import HeadConfig, OptimConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.fetch import fetch
from redrafter.heads import lora
from redrafter.heads.base import DraftHead, DraftHeadConfig
from redrafter.heads.load import head_class, load_trainable, own_class
from redrafter.heads.reading import read_config
from redrafter.planning.tracing import storage_bytes
from redrafter.products import use_kernels
from redrafter.targets.devices import pick_device
from redrafter.targets.fused import cannot_fuse, packed_bytes
from redrafter.targets.load import load_model_config
from redrafter.targets.model import Target
from redrafter.targets.offload import bytes_by_place, layers_to_places, place_of
from redrafter.targets.paths import check_path
from redrafter.targets.precision import auto_dtype
from redrafter.targets.sharding import AHEAD_ELEMENTS

_WEIGHTS = ("*.safetensors", "*.bin")


class MetaTarget(Target):
    """A target of which only config.json is read. real_device: where the job would put it."""

    def __init__(self, config: TargetConfig):
        model_config = load_model_config(config)
        self.real_device = pick_device(config.device)
        use_kernels(self.real_device)
        if config.dtype == "auto":  # as `load_target` chooses
            dtype = auto_dtype(self.real_device, lambda: model_config)
            dtype = dtype or getattr(model_config, "dtype", None)
        else:
            dtype = getattr(torch, config.dtype)
        kwargs = {} if config.attention == "auto" else {"attn_implementation": config.attention}
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(
                    model_config, dtype=dtype or torch.float32, **kwargs
                )
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"target.path: {config.path!r} is not a causal LM that transformers can make "
                    f"from its configuration: {error}"
                ) from None
        # Not probed: that compares values.
        super().__init__(
            model, name=Path(config.path).name or config.path, check=lambda target: None
        )
        self.wanted = config

    def fingerprint(self) -> str:
        return ""

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        return storage_bytes(list(self.model.parameters()))

    @property
    def copied_bytes(self) -> int:
        """Of second copies of weights, in an order that a CPU's products read faster; they are made
        at load, which tries the target."""
        if self.real_device.type != "cpu":
            return 0
        found = 0 if self.lm_product is None else self.lm_product.copied_bytes
        if self.wanted.forward == "model" or self.wanted.exact != "reported":
            return found
        if cannot_fuse(self.model, self.backbone, self.config) is not None:
            return found
        return found + packed_bytes(self.backbone, self.config)

    def placed_bytes(self) -> tuple[int, int, int]:
        """With `target.device_map`: (weights on the device, in host memory, and the largest part
        that is brought to the device for a forward)"""
        places = layers_to_places(self.model, self.wanted, self.real_device)
        main = place_of(self.real_device)
        found = bytes_by_place(self.model, places)
        outside = [self.model.get_submodule(n) for n, place in places.items() if place != main]
        brought = max((storage_bytes(list(m.parameters())) for m in outside), default=0)
        return found[main], 0 if main == "cpu" else found.get("cpu", 0), brought

    def split_bytes(self, processes: int) -> tuple[int, int]:
        """Of weights that n processes share (`redrafter.targets.sharding`), in each of them:
        (always, and gathered in a forward: a module's, and what DeepSpeed fetches ahead)"""
        embedding = self.model.get_input_embeddings()
        vocabulary = storage_bytes(list({*self.lm_head.parameters(), *embedding.parameters()}))
        layers = self.weight_bytes - vocabulary
        largest = max(
            storage_bytes(list(module.parameters(recurse=False)))
            for module in self.backbone.modules() if module is not embedding
        )  # fmt: skip
        gathered = largest + AHEAD_ELEMENTS * self.dtype.itemsize
        return vocabulary + -(-layers // processes), min(layers, gathered)


def has_weights(config: TargetConfig) -> bool:
    """Whether the target's weights are on this machine; a Hub id that was never fetched has none,
    and a plan does not fetch it."""
    path = Path(check_path(config))
    if path.is_dir():
        return any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any(
        isinstance(try_to_load_from_cache(config.path, name, revision=config.revision), str)
        for name in names
    )


def meta_head(wanted: HeadConfig, target: MetaTarget, depth: int = OptimConfig.depth) -> DraftHead:
    """The head that a training of that many depths begins with."""
    if wanted.init_from is not None:
        wanted = replace(wanted, init_from=fetch(wanted.init_from, "head.init_from"))
        cls = own_class(wanted.init_from)
        if cls is None:  # another layout: only loading tells what it is made of
            head = load_trainable(wanted.init_from).float().to("meta").bind(target)
        else:
            config = cls.config_class.from_dict(read_config(wanted.init_from))
            head = make_meta_head(cls, config, target)
    else:
        cls, fields = head_class(wanted.kind), dict(wanted.options)
        if cls.depth_field is not None:
            fields[cls.depth_field] = depth
        sizes = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
        head = make_meta_head(cls, cls.config_class(**sizes, **fields), target)
    if wanted.lora is not None:
        with torch.device("meta"):
            lora.inject(head, wanted.lora, wanted.init_from)
    return head


def load_meta_head(folder: str, target: MetaTarget) -> DraftHead:
    """The head of a folder, as it would be loaded for decoding."""
    head = meta_head(HeadConfig(init_from=folder), target)
    return head.eval().requires_grad_(False)


def make_meta_head(cls: type[DraftHead], config: DraftHeadConfig, target: MetaTarget) -> DraftHead:
    for name in ("vocab_size", "hidden_size"):
        if getattr(config, name) != getattr(target, name):
            raise InputError(
                f"the head's {name} is {getattr(config, name)}, that of the target {target.name} "
                f"is {getattr(target, name)}: use the target that it was trained for"
            )
    with torch.device("meta"):
        return cls(config).bind(target)


def borrowed_copy_bytes(head: DraftHead, target: Target) -> int:
    """A pruned vocabulary on the target's lm_head is a copy of its rows."""
    if not head.draws_on_target or head.config.draft_vocab_size is None:
        return 0
    return storage_bytes([head.vocab_matrix()])
