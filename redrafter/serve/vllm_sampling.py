"""Whether the running vLLM verifies drafts by the right law at temperature > 0, and what if not.

vLLM 0.32's CPU backend does not: of rows with drafts, temperature, top_k and top_p are expanded to
one value per drafted position into a copy that is then dropped, so that they are whatever lay in
memory (`_expand_kernel_impl`, vllm/utils/cpu_triton_utils.py). In a batch that samples anywhere,
greedy rows with drafts are divided by such a temperature, too. So a test of the two functions that
every draft goes through decides, not a version.

With speculation on, every step goes that way, also one in which nothing is drafted and there is
nothing to constrain; the repair leaves such steps alone. Source: ours.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

_VOCAB, _TOP_K, _ROWS = 6, 4, 4000
_TEMPERATURES = (0.0, 0.6, 1.0, 1.7)
# With 1000 rows per temperature a right sampler's total variation is 0.03 on average, and above
# this less than once in a million; the fault above shows 0.65.
_FAR = 0.08


def fault(device: torch.device) -> str | None:
    """What is wrong with the running vLLM's verification of drafts; None: nothing was found.

    Rows of one distribution at several temperatures, greedy among them, with one or two drafted
    tokens each: what a row makes first must be the argmax, or follow the distribution.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(0)
            return _fault(device, None) or _fault(device, _TOP_K)
    except Exception as error:  # whatever a version that works otherwise raises
        return f"its functions cannot be tested ({type(error).__name__}: {error})"


def _fault(device: torch.device, top_k: int | None) -> str | None:
    logits = torch.linspace(1.5, -1.0, _VOCAB, device=device)
    temperature = torch.tensor(_TEMPERATURES, device=device).repeat(_ROWS // len(_TEMPERATURES))
    counts = torch.arange(_ROWS, device=device) % 3 % 2 + 1
    ends = counts.cumsum(0).to(torch.int32)
    drafts = (torch.arange(int(ends[-1]), device=device) % _VOCAB).to(torch.int32)
    settings = _settings(temperature, top_k)
    warped = rejection_sampler.apply_sampling_constraints(
        logits.expand(len(drafts), -1).clone(), ends, settings
    )
    bonus = torch.zeros((_ROWS, 1), dtype=torch.int32, device=device)
    made = rejection_sampler.rejection_sample(
        drafts, counts.tolist(), 2, ends, None, warped.contiguous(), bonus, settings
    )
    for index, t in enumerate(_TEMPERATURES):
        first = made[index :: len(_TEMPERATURES), 0].long()
        share = torch.bincount(first.clamp(min=0), minlength=_VOCAB).double() / len(first)
        distance = 0.5 * float((share - _exact(logits, t, top_k)).abs().sum())
        if distance > (_FAR if t > 0 else 0.0) or not torch.isfinite(share).all():
            cut = "" if top_k is None else f" and top_k {top_k}"
            return (
                f"at temperature {t}{cut} what it makes of rows with drafts is {distance:.2f} in "
                "total variation from the model's distribution"
            )
    return None


def _settings(temperature: Tensor, top_k: int | None) -> SimpleNamespace:
    """What the functions under test read of vLLM's SamplingMetadata, for one temperature a row."""
    k = None if top_k is None else torch.full_like(temperature, top_k, dtype=torch.int32)
    return SimpleNamespace(
        temperature=temperature, all_greedy=False, all_random=False, generators={}, top_p=None,
        top_k=k,
    )  # fmt: skip


def _exact(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """(V,) float64: the law of a token."""
    p = torch.zeros(_VOCAB, dtype=torch.float64, device=logits.device)
    if temperature == 0.0:
        p[logits.argmax()] = 1.0
        return p
    kept = logits.topk(top_k or _VOCAB).indices
    p[kept] = (logits[kept].double() / temperature).softmax(0)
    return p


def repair() -> None:
    """Expand sampling parameters to drafted positions by plain torch, and leave steps without any
    alone, in this process."""
    constrain = rejection_sampler.apply_sampling_constraints

    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0,
        replace_to: int = 0,
    ) -> Tensor:  # fmt: skip
        x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
        return x.repeat_interleave(counts, output_size=num_tokens)

    def apply_sampling_constraints(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return constrain(logits, *args, **kwargs) if len(logits) else logits

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    rejection_sampler.apply_sampling_constraints = apply_sampling_constraints


class Guard:
    """Stands before vLLM's sampler in this process: knows whether the last batch sampled at all,
    and sees to it that a batch that does never has a draft verified by a sampler at fault.

    That is needed even where nothing is proposed to rows that sample: a request at temperature > 0
    may join the very step in which drafts of greedy rows are verified, and close to
    `max_model_len` vLLM drafts token 0 by itself.
    """

    def __init__(self) -> None:
        self.all_greedy = False  # until a batch was seen
        self._original: tuple[Any, Any] | None = None

    def install(self, verify: bool) -> None:
        """verify: the sampler is right, its verification is left as it is."""
        sample, verification = Sampler.forward, RejectionSampler.forward
        self._original = sample, verification

        def watched(sampler: Any, logits: Tensor, sampling_metadata: Any, *args, **kwargs) -> Any:
            self.all_greedy = bool(sampling_metadata.all_greedy)
            return sample(sampler, logits, sampling_metadata, *args, **kwargs)

        def guarded(
            sampler: Any, metadata: Any, draft_probs: Any, logits: Tensor, sampling_metadata: Any
        ) -> Any:
            if sampling_metadata.all_greedy:
                return verification(sampler, metadata, draft_probs, logits, sampling_metadata)
            # As if nothing had been drafted: each row's next token, from the first of its logits.
            counts = torch.tensor(metadata.num_draft_tokens, device=logits.device) + 1
            first = metadata.cu_num_sampled_tokens.long() - counts
            return sampler.sampler(logits=logits[first], sampling_metadata=sampling_metadata)

        Sampler.forward = watched
        if not verify:
            RejectionSampler.forward = guarded

    def remove(self) -> None:
        if self._original is not None:
            Sampler.forward, RejectionSampler.forward = self._original
            self._original = None
