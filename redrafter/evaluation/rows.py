"""The paper's verification of the N-Grammys: k rows of w guesses as a batch (arXiv 2411.03786).

The reference that the tree of the same rows is tested against, greedy and for one prompt. Every
row begins with the last emitted token and sees its own copy of the keys and values so far; the
longest match wins, of equally long ones the first row, and its keys and values are kept for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from redrafter.contracts import Generation, Truth
from redrafter.decode.request import Emitter, Request
from redrafter.decode.stats import StepTimer, count_step
from redrafter.drafters.ngrammys import NGrammys
from redrafter.targets.model import Target


@torch.inference_mode()
def decode_rows(
    target: Target,
    prompt: Sequence[int],
    drafter: NGrammys,
    max_new_tokens: int,
    eos: int | Iterable[int] | None = None,
) -> Generation:
    """Greedy decoding of one prompt by k rows.

    eos: token ids that end the text; None takes the target's
    Returns what `speculative` would: same tokens, steps and accepted depths; of `nodes_verified`
    every step counts k * (w + 1). Raises InputError where the prompt does not fit.
    """
    ends = eos if eos is None or isinstance(eos, int) else list(eos)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends)
    request = Request(target, [prompt], config, 0, None, None, None, None)
    k, w, limit = drafter.k, drafter.w, request.limit[0]
    emitter, timer = Emitter(request), StepTimer(1, w)
    stats, cache = timer.stats, DynamicCache()
    seqs = request.sequences(slack=w + 1)

    def forward(tokens: Tensor) -> Tensor:
        """(R, n) new tokens behind what is cached -> (R, n) greedy choices."""
        past, n = cache.get_seq_length(), tokens.shape[1]
        keys = torch.arange(past + n, device=target.device).expand(len(tokens), -1)
        position = keys[:, past:]
        masks = target.masks(keys[:, None] <= position[:, :, None], position, keys)
        # A guess may lie past the context; no kept token does.
        return target.forward(tokens, position.clamp(max=limit - 1), masks, cache).logits.argmax(-1)

    def emit(new: list[int]) -> int:
        at = emitter.lengths[0]
        seqs.ids[0, at : at + len(new)] = torch.tensor(new)
        kept = emitter.emit(0, new)
        seqs.length = torch.tensor(emitter.lengths, device=target.device)
        seqs.live = torch.tensor(emitter.live, device=target.device)
        return kept

    with timer("prefill"):
        first = forward(seqs.ids[:, : len(prompt)])[:, -1]
        cache.batch_repeat_interleave(k)
        emit(first.tolist())
        drafter.begin(seqs)
        drafter.observe(Truth(first[:, None], seqs.live.long()))
    while any(emitter.live):
        with timer("draft"):
            drafter.start()
            for level in range(1, w + 1):
                drafter.extend(level)
            rows, valid = (x[0] for x in drafter.rows())
        level = torch.arange(1, w + 1, device=target.device)
        valid = valid & (level <= limit - seqs.length)
        with timer("verify"):
            choice = forward(torch.cat([seqs.root.expand(k, 1), rows], 1))  # (k, w+1)
            matches = ((choice[:, :-1] == rows) & valid).long().cumprod(1).sum(1)
            count = int(matches.max())
            winner = int((matches == count).long().argmax())  # the first of equal ones
            cache.batch_select_indices(torch.full((k,), winner, device=target.device))
            # Kept: the old root and the guesses that were accepted, not the new root.
            if count < w:
                cache.crop(count - w)
        new = choice[winner].tolist()
        kept = emit(new[: count + 1])
        count_step(stats, 0, int(valid.sum(1).max()), count, kept)
        stats.forwards += 1
        stats.nodes_verified += k * (w + 1)
        with timer("draft"):
            told = torch.where(seqs.live, count + 1, 0)
            drafter.observe(Truth(choice[winner][None], told))
    return emitter.result(stats)
