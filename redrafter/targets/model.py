"""The frozen language model: the only way to its forward pass, its embedding and its lm_head."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from redrafter.contracts import InputError
from redrafter.files import digest_json, digest_weights
from redrafter.products import PackedProduct
from redrafter.targets.adapters import (
    WeightDigests,
    digests_of,
    plain_model,
    probe_tokens,
)
from redrafter.targets.aux_layers import picked, show_layers, with_layers
from redrafter.targets.cache import RowCache
from redrafter.targets.checkpoint import choose_experts
from redrafter.targets.invariant import Form, KernelForm
from redrafter.targets.layers import check_layers, context_of, eos_of, windows_of
from redrafter.targets.masks import additive_masks, for_rows
from redrafter.targets.offload import reader
from redrafter.targets.probe import check_target
from redrafter.targets.recurrent import StateCache, find_mixers
from redrafter.targets.sharding import ShardedBackbone

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TargetOutput:
    """logits: (B, N, V) raw; hidden: (B, N, H), the tensor that feeds lm_head, or with the states
    of further layers behind it, (B, N, (1 + n) H) (`redrafter.targets.aux_layers`)."""

    logits: Tensor
    hidden: Tensor


class Target:
    """A Hugging Face causal language model, frozen, in evaluation mode.

    Tree verification needs attention whose keys can be masked one by one. Models with recurrent or
    linear-attention layers verify chains, where their states are kept in the cache; those with
    ALiBi, or with states elsewhere, are refused when loaded.

    model: a transformers model, or a PeftModel, whose adapter is then kept as it is
    parts: what it was made from, where an adapter has been merged (`load_target` does that)
    backbone: of a model that several processes hold in parts (see `redrafter.targets.sharding`)
    tokenizer_error: why there is no tokenizer, for whoever needs text (`redrafter.targets.text`)
    check: raises InputError where its logits, computed as decoding does, are not the model's
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        parts: WeightDigests | None = None,
        backbone: ShardedBackbone | None = None,
        tokenizer_error: InputError | None = None,
        check: Callable[[Any], None] = check_target,
    ):
        model = plain_model(model)
        self.model = model.eval().requires_grad_(False)
        self._parts = parts
        self._adapted = parts is not None or bool(getattr(model, "peft_config", None))
        self.tokenizer, self.tokenizer_error = tokenizer, tokenizer_error
        self.config = model.config.get_text_config()
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.sharded = backbone is not None
        self.backbone = model.base_model if backbone is None else backbone
        self.lm_head = model.get_output_embeddings()
        if self.lm_head is None:
            raise InputError(f"{self.name}: {type(model).__name__} has no lm_head; not a causal LM")
        if hasattr(self.lm_head, "base_layer"):
            raise InputError(
                f"{self.name}: its adapter changes the lm_head, which only a merged model shows as "
                "one matrix: call merge_and_unload() first, or save the adapter and load its folder"
            )
        #: what can be verified on it: any tree, or one path of tokens only
        self.has_states = bool(find_mixers(model))
        self.verifies: Literal["trees", "chains"] = "chains" if self.has_states else "trees"
        check_layers(self)
        self.windows = windows_of(self.config)
        #: whether a query may look at every key before it, however far
        self.sees_all = list(self.windows.values()) == [None]
        self.device = self.lm_head.weight.device
        self.dtype = self.lm_head.weight.dtype
        self.vocab_size = self.lm_head.weight.shape[0]
        self.hidden_size = self.lm_head.weight.shape[1]
        self.n_layers = self.config.num_hidden_layers
        #: layers whose hidden states stand behind the last one's (`redrafter.targets.aux_layers`)
        self.aux_layers: tuple[int, ...] = ()
        self.max_positions = context_of(self.config)
        cohere = getattr(self.config, "logit_scale", None) or 1.0
        granite = getattr(self.config, "logits_scaling", None) or 1.0
        self._logit_scale = cohere / granite
        self._logit_cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2, 3
        #: what gives float32 logits where the dtype's own are narrower (`widen_logits`)
        self.wide_head: nn.Linear | PackedProduct | None = None
        #: how its products are computed where that is fixed (`redrafter.targets.invariant`)
        self.invariant: Form | KernelForm | None = None
        choose_experts(model, self.dtype)
        plain_head = type(self.lm_head) is nn.Linear and self.lm_head.bias is None
        self.lm_product = PackedProduct(self.lm_head.weight, always=True) if plain_head else None
        self._no_mask = torch.empty(1, 1, 1, 0)
        #: a shorter way to the same hidden states, where there is one (`redrafter.targets.fused`)
        self.fused: Any = None
        takes = inspect.signature(model.base_model.forward).parameters
        self._attends = "cache_params" not in takes  # Mamba's classes have no attention
        self._cache_name = "past_key_values" if self._attends else "cache_params"
        check(self)

    def new_cache(self, n_rows: int, capacity: int) -> RowCache:
        """An empty cache of `capacity` tokens a row, with which texts begin.

        Raises InputError where `exact invariant` holds by kernels, and the class would compute.
        """
        if self.by_kernels and not self.fused.untouched:
            raise InputError(
                f"target.exact invariant: the model of {self.name} has been changed since it was "
                "loaded (an adapter, a hook, other weights, a second target made of it): its own "
                "class would compute, whose sums depend on what is beside a token. Undo the "
                "change, or load the target anew"
            )
        for copies in (self.lm_product, self.fused):
            if copies is not None:
                copies.renew()
        if self.fused is not None:
            return self.fused.new_cache(self.n_layers, n_rows, capacity)
        kind = StateCache if self.has_states else RowCache
        return kind(self.n_layers, n_rows, capacity, self.device)

    @property
    def by_kernels(self) -> bool:
        """Whether its scores are the same bit for bit by the kernels' forward alone, into which
        nobody can look."""
        return isinstance(self.invariant, KernelForm)

    @property
    def state_size(self) -> int:
        """(1 + n) H: numbers of what it gives as hidden states of a position."""
        return (1 + len(self.aux_layers)) * self.hidden_size

    def show(self, layers: Sequence[int]) -> None:
        """See `redrafter.targets.aux_layers.show_layers`."""
        show_layers(self, layers)

    def pick(self, hidden: Tensor, layers: Sequence[int]) -> Tensor:
        """Of hidden states as it gives them, the last and those of some of its `aux_layers`."""
        return picked(hidden, self.aux_layers, layers)

    def together(self) -> AbstractContextManager[None]:
        """Processes that share the target's weights all enter this where each of them makes as many
        forwards as it needs; nothing in the body may wait for another process."""
        return self.backbone.together() if self.sharded else nullcontext()

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, H), frozen."""
        return self.lm_head.weight

    @property
    def embedding_weight(self) -> Tensor:
        """(V, H), what `embed` looks up, before any scale."""
        return self.model.get_input_embeddings().weight

    @property
    def eos_token_ids(self) -> set[int]:
        return eos_of(self.model.generation_config, self.config)

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., H), as the first layer sees it.

        Gemma's scale is inside transformers' embedding module; Granite's is not.
        """
        e = self.model.get_input_embeddings()(tokens)
        scale = getattr(self.config, "embedding_multiplier", 1.0)
        return e if scale == 1.0 else e * scale

    def project(self, hidden: Tensor, columns: Tensor | None = None) -> Tensor:
        """(..., H) final hidden states -> (..., V) logits, with the model's scale and soft-cap;
        what other layers gave may stand behind them.

        columns: (Vd,) int64, those of an lm_head that is a plain `nn.Linear`; None: all
        """
        if hidden.shape[-1] > self.hidden_size:
            hidden = hidden[..., : self.hidden_size]
        if columns is None:
            if self.wide_head is not None:
                logits = self.wide_head(hidden.float())
            else:
                logits = (self.lm_product or self.lm_head)(hidden)
        else:
            bias = None if self.lm_head.bias is None else self.lm_head.bias[columns]
            logits = nn.functional.linear(hidden, self.lm_head.weight[columns], bias)
        # Skipped where neutral: a pass over (N, V) costs as much as a small matrix product.
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        cap = self._logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor],
        cache: Cache,
        keep: Tensor | None = None,
        whole: bool = False,
    ) -> TargetOutput:
        """One forward of the target over new tokens; their keys and values enter the cache.

        tokens, positions: (B, N) int64; masks: from `masks()`.
        keep: (B,) int64, node of each row whose outputs are wanted (the result has N = 1), so a
              prefill does not project every position; None wants all. whole: all hidden states too
        """
        hidden = self._hidden(tokens, positions, masks, cache)
        kept = hidden
        if keep is not None:
            kept = hidden[torch.arange(len(keep), device=hidden.device), keep][:, None]
        hidden = hidden if whole else kept
        return TargetOutput(self.project(kept), hidden)

    def _hidden(
        self, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor], cache: Cache
    ) -> Tensor:
        """As `forward`, all hidden states, (B, N, (1 + n) H)."""
        if self.fused is not None and isinstance(cache, RowCache) and self.fused.untouched:
            return self.fused(tokens, positions, masks, cache, self.aux_layers)
        return self._by_class(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=for_rows(masks, len(tokens)) if self._attends else None,
            use_cache=True,
            **{self._cache_name: cache},
        )

    def _by_class(self, **inputs: Any) -> Tensor:
        if self.aux_layers:
            return with_layers(self.backbone, self.aux_layers, **inputs)
        return self.backbone(**inputs).last_hidden_state

    def masks(
        self, allowed: Tensor, query_position: Tensor, key_position: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Additive attention masks, one per window type where the model mixes them.

        allowed: (B, N, S) bool; query_position: (B, N); key_position: (B, S)
        """
        masks = additive_masks(allowed, query_position, key_position, self.windows, self.dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def no_mask(self, width: int) -> Tensor:
        """(1, 1, 1, width): every query sees every key, which needs `sees_all`. Made once."""
        if self._no_mask.shape[-1] < width:
            shape = (1, 1, 1, 2 * width)
            self._no_mask = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self._no_mask[..., :width]

    @torch.inference_mode()
    def states(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Teacher-forced hidden states (the tensor that feeds lm_head).

        tokens: (B, T) int64, right-padded. Causal attention never looks right, so the padding
        cannot reach a real position, and `lengths` is not needed. Returns (B, T, (1 + n) H); the
        states at the padding mean nothing.
        """
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        widens = self.fused is not None and self.fused.widens
        if (self.by_kernels or widens) and self.fused.untouched:  # to the last bit the loop's
            cache, row = self.new_cache(batch, length), positions[:1]
            cache.prepare(length)
            masks = self.masks(row[:, :, None] >= row[:, None], row, row)
            return self._hidden(tokens, positions, masks, cache)
        return self._by_class(input_ids=tokens, position_ids=positions, use_cache=False)

    def fingerprint(self) -> str:
        """sha256 over shapes, a sample of every weight (in bfloat16, so that the same checkpoint
        loaded in float32 agrees) and the tokenizer's vocabulary. 16 hex digits. With an adapter:
        over base, adapter and vocabulary, see `redrafter.targets.adapters`."""
        if not hasattr(self, "_fingerprint"):
            texts = []
            if self.tokenizer is not None:
                texts = [json.dumps(sorted(self.tokenizer.get_vocab().items()))]
            if self._adapted:
                parts = self.digests()
                self._fingerprint = digest_json([parts.base, parts.adapter, *texts])[:16]
            else:
                self._fingerprint = self._digest(*texts)
        return self._fingerprint

    def digests(self) -> WeightDigests:
        """Digests of the base's weights and of the adapter, if there is one."""
        if self._parts is None:
            self._parts = digests_of(self.model) if self._adapted else WeightDigests(self._digest())
        return self._parts

    def _digest(self, *texts: str) -> str:
        whole = nullcontext
        if self.sharded:
            whole = self.backbone.whole
        elif hasattr(self.model, "hf_device_map"):
            whole = reader(self.model)
        return digest_weights(self.model.named_parameters(), *texts, whole=whole)

    @torch.inference_mode()
    def probe(self) -> dict[str, list[float]]:
        """A few numbers that tell whether two models compute the same: of the last 4 of 16 fixed
        tokens, 8 values of the hidden state and 8 logits, less their mean. Source: ours."""
        n = min(16, self.max_positions or 16)
        ids = probe_tokens(self.vocab_size, n).to(self.device)
        hidden = self.states(ids)[0, -4:]
        logits = self.project(hidden)
        logits = logits[:, :: max(1, self.vocab_size // 8)][:, :8]
        some = {
            "hidden": hidden[:, :: max(1, self.hidden_size // 8)][:, :8],
            "logits": logits - logits.mean(-1, keepdim=True),
        }
        return {k: [float(f"{x:.5g}") for x in v.flatten().tolist()] for k, v in some.items()}
