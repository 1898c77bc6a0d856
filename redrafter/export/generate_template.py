"""Decode with this folder's draft head through transformers alone:

    model.generate(**inputs, custom_generate="user/head", trust_remote_code=True)

gives the tokens of `model.generate(**inputs)`, in fewer forward passes. Needs torch, transformers
and safetensors; the library that trained the head is not needed. This file, as
`custom_generate/generate.py`, and what it uses of the library are copied into every export by
`redrafter/export/custom_generate.py`.

transformers itself reads the arguments and makes logits processors and stopping criteria of them;
only the loop that chooses tokens is replaced. What differs from plain `generate`:

- Sampling: a token is a function of the probabilities, a seed and its position, so the text of a
  seed is the same in any batch, and by `redrafter.speculative`. `seeds` (one, or one per row) fixes
  it; without, seeds come from torch's generator, so `torch.manual_seed` does.
- A row of a batch gets what it would get alone: processors and criteria of your own are given one
  row at a time, without its padding, and criteria are asked after every emitted token. What
  transformers' own processors count from the padded batch's beginning means the same place here.
- Output ends with the model's context.
- Where the model's scores are not finite, as after an overflow, an error says so.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation import logits_process as hf
from transformers.utils import cached_file

from redrafter.config import TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.request import NOT_FINITE, not_finite
from redrafter.decode.speculative import speculative
from redrafter.decode.warp import without_padding
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.base import DraftHead as Head  # an export has the class of its own kind here
from redrafter.heads.load import given_to
from redrafter.targets.model import Target

#: arguments about downloads, which `generate` hands on as they are
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
#: arguments of `generate` that this decoder cannot serve
_REFUSED = (
    "assistant_model", "prefix_allowed_tokens_fn", "negative_prompt_ids",
    "negative_prompt_attention_mask", "synced_gpus", "past_key_values", "inputs_embeds",
    "position_ids",
)  # fmt: skip
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
#: what transformers prepares for the loop's forwards
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
#: made from lengths that count padding; the loop has a minimum of its own
_MINIMA = (hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor)


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    streamer: Any = None,
    *,
    head: str | Path | None = None,
    seeds: int | Sequence[int] | None = None,
    tree: dict[str, Any] | None = None,
    allow_other_target: bool | str = False,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate` with a draft head; its arguments, and

    head: the head's folder or Hub id; None: where this code came from (`custom_generate`)
    seeds: for sampling, one for all rows or one per row; see the module's docstring. Further copies
        of a prompt (`num_return_sequences`) take the seeds that follow
    tree: fields of `TreeConfig`: width, depth, shape, nodes. None: 4 wide and 4 deep; on a CPU,
        where every verified token costs, 2 wide for one row, and a chain of 2 for several
    allow_other_target: "merged" takes a model that computes what the head's target did, True any
    Raises InputError (a ValueError) naming the argument that cannot be served, or what does not
    fit head and model, before anything is decoded.
    """
    for name in _REFUSED:
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            raise _unsupported(name)
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    own = list(logits_processor or ())
    decoder = _Decoder(
        str(head or _own_source()), hub, allow_other_target,
        None if tree is None else _tree(tree), seeds, streamer, own,
    )  # fmt: skip
    criteria = list(stopping_criteria or ())
    if strings := _stop_strings(model, generation_config, kwargs):
        if tokenizer is None:
            raise InputError("stop_strings: give tokenizer=..., too")
        criteria.append(StopStringCriteria(tokenizer, strings))
        kwargs["stop_strings"] = None  # transformers does not hand the tokenizer on to us
    with _evaluating(model):
        # No streamer: transformers would show it the prompt, as the loop does.
        return type(model).generate(
            model, inputs, generation_config, logits_processor=own or None,
            stopping_criteria=criteria or None, custom_generate=decoder, **kwargs,
        )  # fmt: skip


@dataclass(frozen=True)
class _Decoder:
    """What transformers calls in place of its own loop, with all arguments put together."""

    source: str
    hub: dict[str, Any]
    allow_other_target: bool | str
    tree: TreeConfig | None
    seeds: int | Sequence[int] | None
    streamer: Any
    own_processors: list[Any]

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs
    ):
        config, rows = generation_config, len(input_ids)
        _check(model, config, inputs)
        mask = inputs.get("attention_mask")  # None: no padding
        processors = [
            p for p in logits_processor
            if _is_own(p, self.own_processors) or not isinstance(p, _MINIMA)
        ]  # fmt: skip
        if input_ids.shape[1] > 1:  # it is for a batch of single tokens, not for a row of one
            kind = hf.ForcedBOSTokenLogitsProcessor
            processors = [p for p in processors if not isinstance(p, kind)]
        if mask is not None:
            processors = [without_padding(p, (mask == 0).sum(1)) for p in processors]
        seeds = 0
        if config.do_sample:
            seeds = _seeds(self.seeds, rows, config.num_return_sequences or 1)
        loaded = _load(model, self.source, self.hub, self.allow_other_target)
        target = loaded.target
        wanted, criteria, pad = _limits(config, stopping_criteria, input_ids, mask, target)
        tree = self.tree or _usual_tree(rows, target.device, loaded.head.max_depth)
        result = speculative(
            target, input_ids, wanted, attention_mask=mask, seeds=seeds, streamer=self.streamer,
            drafter=HeadDrafter(loaded.head, target, tree),
            logits_processor=processors, stopping_criteria=criteria,
        )  # fmt: skip
        if NOT_FINITE in result.finish:
            raise InputError(not_finite(target))
        longest = max(map(len, result.tokens))
        made = [row + [pad] * (longest - len(row)) for row in result.tokens]
        sequences = torch.cat([input_ids, torch.tensor(made, device=input_ids.device)], 1)
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences


def _unsupported(name: str, what: str = "") -> InputError:
    return InputError(
        f"{name}{what} is not supported when decoding with a draft head: leave it out, or call "
        "generate without custom_generate"
    )


def _tree(fields: dict[str, Any]) -> TreeConfig:
    try:
        return TreeConfig(**fields)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(TreeConfig))
        raise InputError(f"tree: {error}; its fields are {known}") from None


def _usual_tree(rows: int, device: torch.device, most: int | None) -> TreeConfig:
    """most: levels that the head can draft; None: any"""
    width, depth = TreeConfig.width, TreeConfig.depth
    if device.type == "cpu":
        width, depth = (2, 4) if rows == 1 else (1, 2)
    return TreeConfig(width=width, depth=min(depth, most or depth))


def _own_source() -> str:
    """What the user gave as `custom_generate`. transformers runs a copy of this file and does not
    say where it is from, so it is read off the call of `generate` that led here."""
    frame = sys._getframe(1)
    while frame is not None:
        source = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(source, (str, os.PathLike)):
            return str(source)
        frame = frame.f_back
    raise InputError("head: which one? Give head=..., its folder or Hub id")


def _stop_strings(model: Any, config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
    """The ones in force, by transformers' order of precedence."""
    if "stop_strings" in kwargs:
        return kwargs["stop_strings"]
    return getattr(config, "stop_strings", None) or model.generation_config.stop_strings


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A model that is being trained is back in training afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model: Any, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    """What can be known of the arguments once transformers has put them together."""
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        options = ("num_beams", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens",
                   "assistant_early_exit", "constraints", "force_words_ids")  # fmt: skip
        off = (None, 1, 0)
        given = [n for n in options if getattr(config, n, None) not in off]
        raise _unsupported(", ".join(given) or "generation_config", f" ({mode.value})")
    if model.config.is_encoder_decoder:
        raise InputError("a draft head needs a decoder-only model; this one has an encoder")
    for name in _OUTPUTS:
        if getattr(config, name, None):
            raise _unsupported(name)
    if config.cache_implementation not in (None, "dynamic"):
        raise InputError(
            f"cache_implementation={config.cache_implementation!r}: decoding with a draft head has "
            "a cache of its own; give cache_implementation='dynamic'"
        )
    if config.token_healing:
        raise _unsupported("token_healing")
    for name, value in inputs.items():
        if name not in _PREPARED and value is not None and value is not False:
            raise _unsupported(name)


def _is_own(one: Any, others: list[Any]) -> bool:
    return any(one is other for other in others)


def _limits(
    config: GenerationConfig, criteria: Any, input_ids: Tensor, mask: Tensor | None, target: Target
) -> tuple[GenerationConfig, list[Any], int | None]:
    """What ends a row: lengths and EOS as the loop takes them, the criteria that are neither, and
    the token that fills up rows which end early."""
    width = input_ids.shape[1]
    eos = [e for c in criteria if isinstance(c, EosTokenCriteria) for e in c.eos_token_id.tolist()]
    others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    limit = criteria.max_length
    new = (config.max_length if limit is None else limit) - width
    wanted = GenerationConfig(
        do_sample=bool(config.do_sample), max_new_tokens=new,
        min_new_tokens=max(0, (config.min_length or 0) - width), eos_token_id=eos or -1,
    )  # fmt: skip
    longest = width if mask is None else int(mask.sum(1).max())
    ends_early = target.max_positions is not None and longest + new > target.max_positions
    if ends_early:
        warnings.warn(
            f"the context of {target.max_positions} tokens of {target.name} ends the text before "
            f"the {new} new tokens asked for",
            stacklevel=2,
        )
    pad = config.pad_token_id if config.pad_token_id is not None or not eos else eos[0]
    if pad is None and len(input_ids) > 1 and (others or ends_early):
        raise InputError("rows may end early, and nothing is there to fill them: give pad_token_id")
    return wanted, others, pad


def _seeds(seeds: int | Sequence[int] | None, rows: int, copies: int) -> list[int]:
    """One per row."""
    if seeds is None:
        return torch.randint(2**62, (rows,)).tolist()
    given = [seeds] * (rows // copies) if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(given) == rows:
        return given
    if len(given) * copies != rows:
        raise InputError(f"seeds: {len(given)} given for {rows // copies} prompts")
    return [seed + copy for seed in given for copy in range(copies)]


# ------------------------------------------------------------------------------------ the head


@dataclass
class _Loaded:
    """Kept on the model from call to call; copies and pickles of the model go without it."""

    target: Target
    head: Head
    key: tuple[Any, ...]
    place: int  # of the lm_head's values

    def fits(self, model: Any) -> bool:
        """Whether the model is still where and what it was."""
        lm_head = model.get_output_embeddings()
        same = lm_head is self.target.lm_head and lm_head.weight.dtype == self.target.dtype
        return same and lm_head.weight.data_ptr() == self.place

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def _load(model: Any, source: str, hub: dict[str, Any], allow: Any) -> _Loaded:
    """The head for this model, read once."""
    weights = Path(source, "model.safetensors")
    if os.path.isdir(source):
        stamp = weights.stat().st_mtime_ns if weights.is_file() else None
    else:
        # This very file's commit, where transformers put it in the name of its folder.
        commit = Path(__file__).resolve().parent.parent.name
        if "revision" not in hub and re.fullmatch("[0-9a-f]{40}", commit):
            hub = {**hub, "revision": commit}
        stamp = hub.get("revision")
    key = (source, stamp, str(allow))
    loaded = getattr(model, "_draft_head", None)
    if isinstance(loaded, _Loaded) and loaded.key == key and loaded.fits(model):
        return loaded
    folder = source
    if not os.path.isdir(source):
        files = [cached_file(source, name, **hub) for name in ("config.json", weights.name)]
        folder = str(Path(files[0]).parent)
    trainable = [p for p in model.parameters() if p.requires_grad]
    target = Target(model)
    for parameter in trainable:  # a target is frozen; the user's model is as it was
        parameter.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):  # its tensors are drawn before they are read
        head = given_to(target, Head.load(folder), Path(folder), allow)
    place = target.lm_head_weight.data_ptr()
    model._draft_head = _Loaded(target, head, key, place)
    return model._draft_head
