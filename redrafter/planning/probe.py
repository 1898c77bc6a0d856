"""Seconds of the parts of a job, by a few real batches on this device.

Only what fits and has weights here is probed; a plan says what was not, and why. The figures are of
one process: with more, work is shared and communication comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from redrafter.config import LossConfig, OptimConfig, PlanConfig, TargetConfig
from redrafter.data.answers import generation_config
from redrafter.data.rows import Rows, offsets_of
from redrafter.data.states import StateMaker
from redrafter.decode.plain import plain
from redrafter.heads.base import DraftHead
from redrafter.planning.memory import HALFWAY, meta_batch, meta_rows
from redrafter.planning.meta import has_weights
from redrafter.planning.plan import Plan
from redrafter.targets.model import Target
from redrafter.training.optimizer import make_optimizer
from redrafter.training.step import batch_loss, total_weight

_LEAST_TOKENS = 4  # decoded by a probe


def why_not(plan: Plan, config: TargetConfig, wanted: PlanConfig) -> str | None:
    """Why nothing can be probed; None where it can."""
    if wanted.probe_s == 0:
        return "plan_for.probe_s 0"
    if not has_weights(config):
        return "no weights here: a configuration has shapes, but no speed"
    if config.shard != "none":
        return "processes that share the target are timed by their own progress bar"
    if plan.refusals():
        return "it does not fit"
    return None


def repeated(seconds: float, work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call of `work`, the first one left out; as many calls as fit."""

    def once() -> float:
        clock = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - clock

    once()
    found, end = [once()], time.perf_counter() + seconds
    while time.perf_counter() + found[-1] < end:
        found.append(once())
    return sorted(found)[len(found) // 2]


def decode_seconds(
    target: Target, rows: int, prompt_tokens: int, new_tokens: int, temperature: float, most: float
) -> float:
    """Of a batch of answers, all as long as allowed, by plain decoding."""
    context = target.max_positions
    if context is not None:
        prompt_tokens = max(1, min(prompt_tokens, context - new_tokens))
    prompts = torch.randint(target.vocab_size, (rows, prompt_tokens)).tolist()

    def decode(n: int) -> Callable[[], Any]:
        settings = generation_config(temperature, n)
        settings.eos_token_id = -1
        return lambda: plain(target, prompts, settings, seeds=list(range(rows)))

    n = min(new_tokens, _LEAST_TOKENS)
    first = repeated(most / 2, decode(1), target.device)
    if n == 1:
        return first
    return first + (new_tokens - 1) * max(
        0.0, repeated(most / 2, decode(n), target.device) - first
    ) / (n - 1)


def states_seconds(maker: StateMaker, row_tokens: int, most: float) -> float:
    """Per token."""
    rows = max(1, maker.config.forward_tokens // row_tokens)
    ids = torch.randint(maker.target.vocab_size, (rows * row_tokens,))
    lengths = torch.full((rows,), row_tokens)
    made = Rows(ids, torch.ones_like(ids, dtype=torch.bool), offsets_of(lengths))
    return repeated(most, lambda: maker.columns(made), maker.target.device) / len(ids)


def step_seconds(
    head: DraftHead, target: Target, loss: LossConfig, optim: OptimConfig, k: int, most: float,
    row_tokens: int = 0,
) -> float:  # fmt: skip
    """Of an optimiser step, on random numbers. row_tokens: see `step_memory`"""
    optimizer = make_optimizer(head, optim)
    positions, pruned = optim.batch_positions * optim.accumulation, head.config.draft_vocab_size
    batch = meta_batch(target, loss, positions, optim.depth, k, pruned is not None)
    batch.context.normal_()
    if head.reads_prefix:
        batch.rows = meta_rows(target, positions, optim.row_starts, row_tokens)
        batch.rows.hidden.normal_()
    batch.tokens.random_(target.vocab_size)
    batch.labels.random_(head.draft_vocab_size)
    if batch.teacher is not None:
        batch.teacher.normal_()
    if batch.teacher_ids is not None:
        batch.teacher_ids.copy_(torch.arange(k))
        batch.teacher_log_p.fill_(-1.0 - k)

    def step() -> None:
        weight = total_weight(batch, loss)
        for part in batch.split(optim.accumulation):
            batch_loss(head, head, target, part, loss, weight, HALFWAY)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeated(most, step, target.device)
