"""What is common to both loops: reading the request, the prefill, the stops, the result."""

from __future__ import annotations

import copy
import difflib
import math
import operator
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
)

from redrafter.contracts import Generation, InputError, RowState, StepStats
from redrafter.decode.noise import NoiseAhead
from redrafter.decode.warp import Warp, build_processors, score_dtype
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target
from redrafter.targets.text import tokenizer_of

# Fields of a GenerationConfig that this decoder would otherwise silently ignore, with the values
# that mean "off".
_REFUSED = {
    "num_beams": (None, 1), "num_beam_groups": (None, 1), "num_return_sequences": (None, 1),
    "diversity_penalty": (None, 0.0), "penalty_alpha": (None, 0), "dola_layers": (None,),
    "constraints": (None,), "force_words_ids": (None,), "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,), "begin_suppress_tokens": (None,),
    "encoder_repetition_penalty": (None, 1.0), "encoder_no_repeat_ngram_size": (None, 0),
    "prompt_lookup_num_tokens": (None,), "assistant_early_exit": (None,),
    "token_healing": (None, False), "max_time": (None,), "top_h": (None,),
}  # fmt: skip

#: Fields that the loops read, here and in `warp.build_processors`, and those that they refuse.
FIELDS = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "remove_invalid_values", "renormalize_logits", *_REFUSED,
)  # fmt: skip

#: rows of token ids, (B, T), or what a tokenizer returns
Prompts = Sequence[Sequence[int]] | Tensor | Mapping

#: `Generation.finish` of a row for which there was nothing to choose from
NOT_FINITE = "not_finite"


class Request:
    """A generation's fixed part: prompts, warping, limits, stops. Built once, used by both loops.

    Raises InputError before any work where a value cannot be served.
    """

    def __init__(
        self,
        target: Target,
        prompts: Prompts,
        generation_config: GenerationConfig | None,
        seeds: int | Sequence[int],
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList | None,
        streamer,
        attention_mask: Tensor | None,
    ):
        config = copy.deepcopy(generation_config or target.model.generation_config)
        if generation_config is not None:
            _check_fields(config, target)
        for name, off in _REFUSED.items():
            if getattr(config, name, None) not in off:
                value = getattr(config, name)
                raise InputError(f"generation_config.{name}={value!r} is not supported; unset it")
        self.target, self.config = target, config
        self.prompts = as_rows(prompts, attention_mask, target)
        self.n_rows = len(self.prompts)
        self.eos = _eos(config, target)
        self.limit = [self._limit(len(p)) for p in self.prompts]
        self.criteria = list(stopping_criteria or [])
        if config.stop_strings:
            tokenizer = tokenizer_of(target, "generation_config.stop_strings")
            self.criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        if streamer is not None and self.n_rows > 1:
            raise InputError("a streamer takes one prompt; this batch has " + str(self.n_rows))
        self.streamer = streamer
        self.sampled = bool(config.do_sample)
        device = target.device
        self._noise = None
        if self.sampled:
            self._seed = row_seeds(seeds, self.n_rows).to(device)
            self._noise = NoiseAhead(self._seed, target.vocab_size, score_dtype(target.dtype))
        minimum = [
            max(config.min_new_tokens or 0, (config.min_length or 0) - len(p)) for p in self.prompts
        ]
        minimum = torch.tensor(minimum, device=device) if max(minimum) > 0 else None
        try:
            processors = build_processors(config, minimum, self.eos, logits_processor)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # transformers' word on a value
            raise InputError(f"generation_config: {error}") from error
        self.warp = Warp(processors, target.vocab_size, self.n_rows)

    def _limit(self, prompt_length: int) -> int:
        """The most tokens a row may have, prompt included."""
        config, context = self.config, self.target.max_positions
        if context is not None and prompt_length >= context:
            raise InputError(
                f"a prompt of {prompt_length} tokens leaves no room in the context of {context} "
                f"tokens of {self.target.name}; shorten it"
            )
        if config.max_new_tokens is not None:
            limit = prompt_length + config.max_new_tokens
        elif config.max_length is not None:
            limit = config.max_length
        else:
            raise InputError("generation_config sets neither max_new_tokens nor max_length")
        if limit <= prompt_length:
            raise InputError(
                f"the length limit of {limit} tokens leaves no room after a prompt of "
                f"{prompt_length}; raise max_new_tokens or max_length"
            )
        return limit if context is None else min(limit, context)

    def noise(self, first: list[int], n: int) -> Tensor | None:
        """(B, n, V) Gumbel noise of n absolute positions per row from `first` on; None: greedy."""
        return self._noise(first, n) if self._noise else None

    def noise_at(self, position: list[int]) -> Tensor | None:
        """(B, V): `noise` of one absolute position per row."""
        return self._noise.at(position) if self._noise else None

    def sequences(self, slack: int) -> RowState:
        """Prompts on the device, with room for every row's limit and `slack` more tokens."""
        device = self.target.device
        ids = torch.zeros(self.n_rows, max(self.limit) + slack, dtype=torch.long)
        width = max(map(len, self.prompts))  # one tensor, as thousands of rows may be given
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in self.prompts]
        ids[:, :width] = torch.tensor(padded)
        length = torch.tensor([len(p) for p in self.prompts], device=device)
        warpers = self.warp.processors if self.sampled else ()
        temperature = math.prod(
            p.temperature for p in warpers if isinstance(p, TemperatureLogitsWarper)
        )
        live = torch.ones(self.n_rows, dtype=torch.bool, device=device)
        return RowState(
            ids.to(device), length, length.clone(), live, temperature=float(temperature),
            seeds=self._seed if self.sampled else None,
        )  # fmt: skip

    def prefill(
        self, seqs: RowState, slack: int, whole: bool = False
    ) -> tuple[RowCache, Tensor, Tensor]:
        """Right-padded prefill. Returns the cache, (B, V) logits of each row's last prompt token,
        and its hidden state, (B, 1, H), or those of all of its tokens where `whole`, (B, T, H)."""
        target, lengths = self.target, [len(p) for p in self.prompts]
        width = max(lengths)
        cache = target.new_cache(self.n_rows, seqs.ids.shape[1] + slack)
        position = torch.arange(width, device=target.device)[None]
        causal = position[:, :, None] >= position[:, None, :]
        ragged = min(lengths) < width
        cache.prepare(width, position >= seqs.length[:, None] if ragged else None)
        out = target.forward(
            seqs.ids[:, :width],
            position.expand(self.n_rows, -1),
            target.masks(causal, position, position),
            cache,
            keep=seqs.length - 1,
            whole=whole,
        )
        # What was written behind a shorter row's end is overwritten before it can be seen.
        cache.commit(lengths)
        return cache, out.logits[:, 0], out.hidden


class Emitter:
    """Judges tokens one by one on the host: stops, streaming, and the growing result."""

    def __init__(self, request: Request):
        self.request = request
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.finish: list[str | None] = [None] * request.n_rows
        self.started = time.perf_counter()
        if request.streamer is not None:
            request.streamer.put(torch.tensor([request.prompts[0]]))

    def emit(self, row: int, new: list[int]) -> int:
        """Append tokens to a live row until one of them stops it. Returns how many were kept.

        new: none where the scores to choose from were not finite, which ends the row
        """
        if not new:
            self.finish[row] = NOT_FINITE
        for kept, token in enumerate(new, start=1):
            self.tokens[row].append(token)
            if self.request.streamer is not None:
                self.request.streamer.put(torch.tensor([token]))
            self.finish[row] = self._stop(row, token)
            if self.finish[row] is not None:
                return kept
        return len(new)

    def _stop(self, row: int, token: int) -> str | None:
        request = self.request
        if token in request.eos:
            return "eos"
        if request.criteria:
            known = request.prompts[row] + self.tokens[row]
            ids = torch.tensor([known], device=request.target.device)
            for criterion in request.criteria:
                if bool(torch.as_tensor(criterion(ids, None)).any()):
                    is_string = isinstance(criterion, StopStringCriteria)
                    return "stop_string" if is_string else "criteria"
        if len(request.prompts[row]) + len(self.tokens[row]) >= request.limit[row]:
            return "length"
        return None

    @property
    def live(self) -> list[bool]:
        return [reason is None for reason in self.finish]

    @property
    def lengths(self) -> list[int]:
        """Tokens known per row, prompt included."""
        return [len(p) + len(t) for p, t in zip(self.request.prompts, self.tokens, strict=True)]

    def result(self, stats: StepStats) -> Generation:
        if self.request.streamer is not None:
            self.request.streamer.end()
        stats.seconds["total"] = time.perf_counter() - self.started
        if NOT_FINITE in self.finish:
            # To the caller of the loop, which is decorated
            warnings.warn(
                f"{not_finite(self.request.target)}. Rows ended before the first such token; their "
                f"finish is {NOT_FINITE!r}", stacklevel=5,
            )  # fmt: skip
        return Generation(self.tokens, self.finish, stats)


def not_finite(target: Target) -> str:
    """What may be wrong where rows ended so."""
    return (
        f"{target.name} in {str(target.dtype).removeprefix('torch.')} gives scores that are not "
        "finite (nan or infinite): most often numbers overflow, then load it in bfloat16 or "
        "float32; else its weights are damaged, or a logits processor forbids every token"
    )


def as_rows(prompts: Prompts, attention_mask: Tensor | None, target: Target) -> list[list[int]]:
    """Prompts as lists of token ids, padding (known by the mask alone) removed."""
    if isinstance(prompts, Mapping):
        prompts = _of_encoding(prompts)
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise InputError(f"prompts must be (B, T) token ids, not {tuple(prompts.shape)}")
        mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
        if mask.shape != prompts.shape:
            raise InputError(
                f"attention_mask is {tuple(mask.shape)}, the prompts are {tuple(prompts.shape)}"
            )
        prompts = [
            row[keep.bool()].tolist() for row, keep in zip(prompts.cpu(), mask.cpu(), strict=True)
        ]
    elif attention_mask is not None:
        raise InputError("attention_mask goes with a (B, T) tensor of prompts; lists need none")
    rows = [_token_ids(b, row) for b, row in enumerate(prompts)]
    if not rows:
        raise InputError("no prompts were given")
    for b, row in enumerate(rows):
        if not row:
            raise InputError(f"prompt {b} is empty; give at least the BOS token")
        if not 0 <= min(row) <= max(row) < target.vocab_size:
            raise InputError(
                f"prompt {b} has token id {max(row) if min(row) >= 0 else min(row)}, outside the "
                f"vocabulary of {target.vocab_size} of {target.name}; wrong tokenizer?"
            )
    return rows


def _token_ids(b: int, row: Sequence[int]) -> list[int]:
    """Row b as integers; text and fractions are none."""
    try:
        return [operator.index(token) for token in row]
    except TypeError:
        raise InputError(
            f"prompt {b} is {str(row)[:60]!r}, no row of token ids such as [1, 2, 3]; "
            "redrafter.generate takes text"
        ) from None


def _of_encoding(encoding: Mapping) -> list[list[int]]:
    """The rows of what a tokenizer returned, without its padding."""
    if "input_ids" not in encoding:
        raise InputError(f"prompts: no input_ids among {', '.join(map(repr, encoding))}")
    parts = [encoding["input_ids"], encoding.get("attention_mask")]
    ids, mask = (x.tolist() if hasattr(x, "tolist") else x for x in parts)
    if mask is None:
        return [ids] if ids and isinstance(ids[0], int) else ids
    if ids and isinstance(ids[0], int):
        ids, mask = [ids], [mask]
    return [
        [token for token, keep in zip(*row, strict=True) if keep]
        for row in zip(ids, mask, strict=True)
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """What a misspelt name was probably meant to be, for the end of a message."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_fields(config: GenerationConfig, target: Target) -> None:
    """A GenerationConfig keeps whatever it is given; what nobody reads is a misspelling, unless the
    model's own has it too (as some on the Hub have)."""
    known = vars(GenerationConfig())
    for name in vars(config):
        theirs = name in known or name.startswith("_")
        if not theirs and not hasattr(target.model.generation_config, name):
            raise InputError(
                f"generation_config.{name}: transformers has no such field{nearest(name, known)}"
            )


def _eos(config: GenerationConfig, target: Target) -> set[int]:
    eos = config.eos_token_id
    if eos is None:
        return target.eos_token_ids
    # transformers' users switch EOS off by -1
    return {e for e in ([eos] if isinstance(eos, int) else eos) if e >= 0}


def sample_seeds(seeds: int | Sequence[int], n_prompts: int, samples: int) -> Sequence[int] | int:
    """Of `samples` rows of every prompt, one prompt's behind the other's: as given, where every row
    has its own; else sample j of a prompt has the prompt's seed + j. Raises InputError."""
    n_given = len(seeds) if hasattr(seeds, "__len__") else 0
    if samples == 1 or n_given == n_prompts * samples:
        return seeds
    if n_given not in (0, n_prompts):
        raise InputError(
            f"seeds: {n_given} given for {n_prompts} prompts of {samples} samples; give one for "
            f"all, one for each prompt or one for each of the {n_prompts * samples} rows"
        )
    own = row_seeds(seeds, n_prompts).tolist()
    return [seed + j for seed in own for j in range(samples)]


def row_seeds(seeds: int | Sequence[int], n_rows: int) -> Tensor:
    """One seed for every row, or one each: a row's text depends on its own seed alone."""
    try:
        given = [seeds] * n_rows if isinstance(seeds, int) else seeds
        rows = [operator.index(seed) for seed in given]
    except TypeError:
        raise InputError(f"seeds: {seeds!r} is neither an integer nor one for each row") from None
    if len(rows) != n_rows:
        raise InputError(f"seeds: {len(rows)} given for {n_rows} prompts")
    for seed in rows:
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"seeds: {seed} is not a signed 64-bit integer")
    return torch.tensor(rows, dtype=torch.long)
