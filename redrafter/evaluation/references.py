"""Ways of decoding that are not ours: transformers' own, plain and assisted."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from transformers import GenerationConfig

from redrafter.contracts import InputError, StepStats
from redrafter.decode.request import Request
from redrafter.drafters.build import Kind, Resources
from redrafter.drafters.frontier import check_vocabulary
from redrafter.evaluation.runs import Method, PromptBatch, TimedCall
from redrafter.targets.model import Target


class Stock(Method):
    """transformers' own `model.generate`, padded on the left as it wants it."""

    outside = True

    def __init__(self, name: str, target: Target, config: GenerationConfig):
        super().__init__(name, target, config)
        self.eos = Request(target, [[0]], config, 0, None, None, None, None).eos
        # What is not set here, `generate` would take from the model's generation_config.
        self.config = copy.deepcopy(config)
        self.config.update(
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=min(self.eos, default=0),
            repetition_penalty=1.0,
            use_cache=True,
        )
        if not self.eos:
            self.config.eos_token_id = -1

    @torch.inference_mode()
    def _run(self, batch: PromptBatch) -> TimedCall:
        return TimedCall(self._generate(batch), {})

    def _generate(self, batch: PromptBatch, **options: Any) -> list[list[int]]:
        width = max(map(len, batch.prompts))
        ids = torch.full((len(batch.prompts), width), self.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.target.device
        torch.manual_seed(batch.seeds[0])
        made = self.target.model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=self.config, **options
        )
        return [self._until_stop(row) for row in made[:, width:].tolist()]

    def _until_stop(self, row: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(row) if token in self.eos), len(row))
        return row[:end]


def n_layers(model: torch.nn.Module) -> int:
    return model.config.get_text_config().num_hidden_layers


class ForwardCounter:
    """Watches a model's forwards while `generate` runs.

    cached, new: per forward of the whole model, tokens in its cache before and tokens it was given.
    A forward with fewer layers than the model has (early exit sets them in the configuration) is
    a draft and is not counted.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.n_layers = model, n_layers(model)
        self.cached: list[int] = []
        self.new: list[int] = []

    def __enter__(self) -> ForwardCounter:
        self._hook = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        self._hook.remove()

    def _count(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if n_layers(model) == self.n_layers:
            cache = kwargs.get("past_key_values")
            self.cached.append(0 if cache is None else int(cache.get_seq_length()))
            self.new.append(kwargs["input_ids"].shape[1])

    def stats(self, prompt_tokens: int, new_tokens: int) -> StepStats:
        """Steps and what they emitted. The first forward reads the prompt and its first draft
        together: it is the prefill, and all that it emitted is the prefill's own."""
        steps = len(self.new) - 1
        if steps < 1:
            return StepStats([0], [0], lengths=[[]])
        # Before a step the cache holds all but the last known token.
        known = [n + 1 for n in self.cached[1:]] + [prompt_tokens + new_tokens]
        lengths = [max(0, after - before) for before, after in pairwise(known)]
        emitted = max(0, known[-1] - known[0])
        return StepStats(
            [steps], [emitted], nodes_verified=sum(self.new[1:]), forwards=steps, lengths=[lengths]
        )


class Assisted(Stock):
    """transformers' assisted generation, with its own defaults, on one row at a time.

    The defaults of a draft model: 20 tokens at most, fewer where it is less sure than 0.4.
    Sampled, the text has the target's law and is not plain's.
    assistant: a smaller model, or None; options: of the GenerationConfig
    """

    def __init__(
        self,
        name: str,
        target: Target,
        config: GenerationConfig,
        assistant: Target | None = None,
        **options: Any,
    ):
        super().__init__(name, target, config)
        self.law_only = bool(config.do_sample)
        self.options = {} if assistant is None else {"assistant_model": assistant.model}
        # The draft model is given no mask and takes prompt tokens that equal pad_token_id for
        # padding, unless that is an EOS (transformers 5.23). One row needs no padding.
        self.config.pad_token_id = min(self.eos, default=-1)
        self.config.update(**options)

    @torch.inference_mode()
    def _run(self, batch: PromptBatch) -> TimedCall:
        if len(batch.prompts) != 1:
            raise InputError(ONE_ROW.format(self.name))
        with ForwardCounter(self.target.model) as counter:
            tokens = self._generate(batch, **self.options)
        stats = counter.stats(len(batch.prompts[0]), len(tokens[0]))
        return TimedCall(tokens, {}, stats, counter.new[1:])


ONE_ROW = (
    "{!r}: assisted generation of transformers takes one row at a time; set batch_size and "
    "samples_per_prompt to 1"
)


def stock(name: str, target: Target, config: GenerationConfig, resources: Resources) -> Stock:
    """transformers' `model.generate`."""
    return Stock(name, target, config)


def hf_assistant(
    name: str, target: Target, config: GenerationConfig, resources: Resources
) -> Assisted:
    """transformers' assisted generation with the smaller model."""
    check_vocabulary(target, resources.draft)
    return Assisted(name, target, config, resources.draft)


def hf_lookup(
    name: str, target: Target, config: GenerationConfig, resources: Resources, *, tokens: int = 10
) -> Assisted:
    """transformers' prompt lookup.

    tokens: copied per step at most
    """
    return Assisted(name, target, config, prompt_lookup_num_tokens=tokens)


def hf_exit(
    name: str, target: Target, config: GenerationConfig, resources: Resources, *, layer: int
) -> Assisted:
    """transformers' early exit: the target's own first layers draft.

    layer: how many of them; a model whose code ignores num_hidden_layers drafts with all
    """
    layers = n_layers(target.model)
    if not 1 <= layer < layers:
        raise InputError(f"{name!r}: layer {layer} must be 1 to {layers - 1}: {target.name} has "
                         f"{layers}")  # fmt: skip
    return Assisted(name, target, config, assistant_early_exit=layer)


#: What is measured beside our own loops; builders take (name, target, config, resources).
REFERENCES: dict[str, Kind] = {
    "stock": Kind(stock),
    "hf-assistant": Kind(hf_assistant, needs=lambda o: {"draft": 1}),
    "hf-lookup": Kind(hf_lookup, ("tokens",)),
    "hf-exit": Kind(hf_exit, ("layer",)),
}
