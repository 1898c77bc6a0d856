"""Plain decoding: one token per target forward. The oracle that every drafter is tested against,
and the baseline that speedups are quoted over; it shares nothing with the tree code."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from redrafter.contracts import Drafter, Generation, Lookahead, StepStats
from redrafter.decode.request import Emitter, Prompts, Request
from redrafter.decode.verify import choose_scored, to_host
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target


@torch.inference_mode()
def plain(
    target: Target,
    prompts: Prompts,
    generation_config: GenerationConfig | None = None,
    *,
    seeds: int | Sequence[int] = 0,
    drafter: Drafter | None = None,
    lookahead: Lookahead | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer=None,
    attention_mask: Tensor | None = None,
) -> Generation:
    """Decode without drafting. Same signature and result as `speculative`.

    prompts: rows of token ids, or (B, T) with `attention_mask` where padded
    generation_config: transformers'; None takes the target's own. It is taken at its word: fields
        left unset are off. Unlike `generate`, nothing but EOS is filled in from the target's own
        configuration, and sampling has no hidden top_k = 50
    seeds: one for all rows or one per row; used where `do_sample` is set. A row's text depends on
        its prompt, its seed and the sampling parameters, and on nothing else
    drafter, lookahead: accepted so that the two loops can be swapped, and ignored
    """
    request = Request(
        target, prompts, generation_config, seeds,
        logits_processor, stopping_criteria, streamer, attention_mask,
    )  # fmt: skip
    return plain_loop(request)


def plain_loop(request: Request) -> Generation:
    """Choose, forward, repeat: `plain` of what was asked for."""
    n_rows, target = request.n_rows, request.target
    stats = StepStats([0] * n_rows, [0] * n_rows)
    emitter = Emitter(request)
    seqs = request.sequences(slack=1)
    cache, logits, _ = request.prefill(seqs, slack=0)
    stats.seconds = {"prefill": time.perf_counter() - emitter.started, "draft": 0.0, "verify": 0.0}
    lengths = emitter.lengths
    while True:
        scores = request.warp.rows(logits, seqs)
        chosen, best = choose_scored(scores, request.noise_at(lengths))
        for row, token in enumerate(to_host(chosen, best)):
            if emitter.finish[row] is None:
                stats.emitted[row] += emitter.emit(row, token)
        live, lengths = emitter.live, emitter.lengths
        if not any(live):
            break
        if request.warp.reads_prefix:  # a finished row: stale, unseen
            seqs.ids.scatter_(1, seqs.length[:, None], chosen[:, None])
        position = torch.tensor([[n - 1] for n in lengths], device=target.device)
        if request.warp.processors:  # nothing else here reads it
            seqs.length = position[:, 0] + 1
        clock = time.perf_counter()
        logits = _forward(target, chosen, position, cache, lengths)
        stats.seconds["verify"] += time.perf_counter() - clock
        stats.forwards += 1
        stats.nodes_verified += sum(live)
        for row in range(n_rows):
            stats.steps[row] += live[row]
    # The prefill's own token is not a step's.
    stats.emitted = [max(0, n - 1) for n in stats.emitted]
    return emitter.result(stats)


def _forward(
    target: Target,
    root: Tensor,
    position: Tensor,
    cache: RowCache,
    lengths: list[int],
) -> Tensor:
    """One new token per row, at `position` (B, 1). Returns (B, V) logits."""
    cache.prepare(1)
    width = cache.width
    if target.sees_all and cache.uniform:
        masks = target.no_mask(width)
    else:
        keys = torch.arange(width, device=root.device)[None]
        masks = target.masks((keys <= position)[:, None], position, keys.expand(len(root), -1))
    logits = target.forward(root[:, None], position, masks, cache).logits[:, 0]
    cache.commit(lengths)
    return logits
