"""What the parts of a job hold in memory at their peak, by running them on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from redrafter.config import LossConfig, OptimConfig
from redrafter.contracts import AllLevels, Drafter, RowState
from redrafter.data.answers import generation_config
from redrafter.data.states import LOGIT_ROWS, StateMaker
from redrafter.decode.plain import plain_loop
from redrafter.decode.request import Request
from redrafter.decode.speculative import speculative_loop
from redrafter.heads.base import DraftHead
from redrafter.planning.tracing import Piece, Trace, longest_way, storage_bytes, traced
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target
from redrafter.training.feed import Batch
from redrafter.training.normalizers import chunk_of, log_normalizer, needs_normalizers
from redrafter.training.optimizer import make_optimizer
from redrafter.training.row_states import RowStates
from redrafter.training.step import batch_loss, needed_teacher, total_weight

ACTIVATIONS, LOGITS, BACKWARD = "activations", "logits chunk", "backward pass"


@dataclass(frozen=True)
class Moment:
    """Bytes at the peak of a part of a step. gradients: those that live then; activations, logits,
    backward: made by the head, by the loss, by the backward pass"""

    gradients: int
    activations: int
    logits: int
    backward: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.backward


@dataclass(frozen=True)
class StepMemory:
    """What an optimiser step takes beside weights and averages, in bytes.

    batch: what is learned from; gradients: all of them; loss, backward: its two moments
    """

    batch: int
    gradients: int
    loss: Moment
    backward: Moment

    @property
    def peak(self) -> int:
        return self.batch + max(self.loss.total, self.backward.total)


#: part of a training at which all of its losses have their weights
HALFWAY = 0.5


class _Labelled(nn.Module):
    """The head, whose forward is told apart from the loss."""

    def __init__(self, head: DraftHead, trace: Trace):
        super().__init__()
        self.head, self.trace = head, trace

    def forward(self, context: Tensor, tokens: Tensor, target: Target) -> Tensor:
        with self.trace.label(ACTIVATIONS):
            return self.head(context, tokens, target)

    def contexts(self, target: Target, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        with self.trace.label(ACTIVATIONS):
            return self.head.contexts(target, hidden, tokens)


def meta_batch(
    target: Target, loss: LossConfig, positions: int, depth: int, k: int = 0, pruned: bool = False
) -> Batch:
    """As `Feed` makes it, every position supervised, on the target's device. k: stored probable
    tokens per position, for the teacher `top_k`; pruned: for a head with some of the tokens."""
    grid, device = (positions, depth), target.device

    def floats(*shape: int, dtype: torch.dtype = target.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    batch = Batch(
        floats(positions, target.state_size), ids(*grid), ids(*grid),
        torch.ones(grid, dtype=torch.bool, device=device),
    )  # fmt: skip
    teacher = needed_teacher(loss)
    if teacher == "states":
        batch.teacher = floats(*grid, target.hidden_size)
        if needs_normalizers(target, pruned, teacher):
            batch.teacher_log_z = floats(*grid, dtype=torch.float32)
    elif teacher == "top_k":
        batch.teacher_ids = ids(*grid, k)
        batch.teacher_log_p = floats(*grid, k, dtype=torch.float32)
    return batch


def meta_rows(target: Target, positions: int, row_starts: int, row_tokens: int) -> RowStates:
    """The rows of such a batch, all of `row_tokens` tokens, for a head that reads the prefix."""
    n, start = -(-positions // row_starts), torch.arange(positions)
    shape = (n, max(2, row_tokens) - 1)  # behind the last token there is no start
    return RowStates(
        torch.zeros(*shape, target.state_size, dtype=target.dtype, device=target.device),
        torch.zeros(shape, dtype=torch.long, device=target.device),
        start // row_starts, torch.full_like(start, shape[1] - 1),
    )  # fmt: skip


def batch_bytes(batch: Batch) -> int:
    rows = () if batch.rows is None else vars(batch.rows).values()
    return storage_bytes([*batch._fields(), *rows])


def step_memory(
    head: DraftHead, target: Target, loss: LossConfig, optim: OptimConfig, k: int = 0,
    row_tokens: int = 0,
) -> StepMemory:  # fmt: skip
    """One optimiser step: every micro-batch forward and back, then the clipping. row_tokens: of the
    rows of a head that reads the prefix"""
    positions = optim.batch_positions * optim.accumulation
    pruned = head.config.draft_vocab_size is not None
    batch = meta_batch(target, loss, positions, optim.depth, k, pruned)
    if head.reads_prefix:
        batch.rows = meta_rows(target, positions, optim.row_starts, row_tokens)
    head.train()
    peaks: dict[str, tuple[int, dict[int, Piece]]] = {LOGITS: (0, {}), BACKWARD: (0, {})}
    with traced() as trace:
        model = _Labelled(head, trace)
        denominator = total_weight(batch, loss)
        for part in batch.split(optim.accumulation):
            with _moment(trace, LOGITS, peaks):
                value, _ = batch_loss(model, head, target, part, loss, denominator, HALFWAY)
            with _moment(trace, BACKWARD, peaks):
                value.backward()
        if optim.clip_norm is not None:
            with _moment(trace, BACKWARD, peaks):
                nn.utils.clip_grad_norm_(head.parameters(), optim.clip_norm)
        grads = [p.grad for p in head.parameters() if p.grad is not None]
        own, total = trace.numbers_of(grads), storage_bytes(grads)
    for parameter in head.parameters():
        parameter.grad = None
    moments = [_sorted_out(at_peak, own) for _, at_peak in peaks.values()]
    return StepMemory(batch_bytes(batch), total, *moments)


def normalizer_bytes(target: Target) -> int:
    """What making log Z of a pruned head's rows takes at once (`training/normalizers.py`)."""
    shape = (chunk_of(target), target.hidden_size)
    hidden = torch.zeros(shape, dtype=target.dtype, device=target.device)
    with traced() as trace:
        log_normalizer(target, hidden)
    return trace.peak_bytes


@contextmanager
def _moment(trace: Trace, name: str, peaks: dict) -> Iterator[None]:
    """Keeps the highest peak of what goes by this name."""
    trace.forget_peak()
    with trace.label(name):
        yield
    peaks[name] = max(peaks[name], (trace.peak_bytes, trace.at_peak), key=lambda peak: peak[0])


def _sorted_out(at_peak: dict[int, Piece], gradients: set[int]) -> Moment:
    found = dict.fromkeys((ACTIVATIONS, LOGITS, BACKWARD), 0)
    kept = 0
    for number, piece in at_peak.items():
        if number in gradients:
            kept += piece.n_bytes
        else:
            found[piece.label or LOGITS] += piece.n_bytes
    return Moment(kept, *found.values())


def averages_per_element(optim: OptimConfig) -> int:
    """Numbers that the optimizer keeps for each trained one, asked of it."""
    small = nn.Linear(4, 4, bias=False)
    optimizer = make_optimizer(small, optim)
    small(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    kept = optimizer.state[small.weight].values()
    return sum(1 for t in kept if t.numel() == small.weight.numel())


@torch.no_grad()
def states_memory(maker: StateMaker, rows: int, tokens: int) -> int:
    """Bytes on the device while the states of `rows` rows of `tokens` tokens each are made."""
    target = maker.target
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=target.device)
    real = torch.ones(rows, tokens, dtype=torch.bool, device=target.device)
    with traced() as trace:
        hidden = target.states(ids)[real]
        maker.encode(hidden)
        if maker.continuation == 1:
            target.project(hidden[:LOGIT_ROWS]).argmax(-1)
    return trace.peak_bytes


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes on the device while a batch is decoded: keys and values, and all else at the peak."""

    cache: int
    working: int


@torch.inference_mode()
def decode_memory(
    target: Target,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    temperature: float,
    drafter: Drafter | None = None,
) -> DecodeMemory:
    """A prefill and the last step of a batch whose rows are all as long as allowed, by the shipped
    loops. drafter: one that reads nothing from the host by itself"""
    context = target.max_positions
    if context is not None:
        prompt_tokens = max(1, min(prompt_tokens, context - new_tokens))
    prompts = [[0] * prompt_tokens for _ in range(rows)]
    wanted = generation_config(temperature, new_tokens)
    wanted.eos_token_id = -1  # the longest rows are those that nothing ends early
    with traced() as trace, longest_way():
        request = _AlmostDone(target, prompts, wanted, list(range(rows)), None, None, None, None)
        if drafter is None:
            plain_loop(request)
        else:
            speculative_loop(request, drafter, AllLevels(), "seeded")
    return DecodeMemory(request.cache.n_bytes, trace.peak_bytes - request.cache.n_bytes)


class _AlmostDone(Request):
    """Once the prompts are read, each row is as long as it may be but for two tokens: the prefill's
    own, and that of one more forward."""

    def prefill(
        self, seqs: RowState, slack: int, whole: bool = False
    ) -> tuple[RowCache, Tensor, Tensor]:
        self.cache, logits, hidden = super().prefill(seqs, slack, whole)
        self.prompts = [
            prompt + [0] * (limit - 2 - len(prompt))
            for prompt, limit in zip(self.prompts, self.limit, strict=True)
        ]
        self.cache.commit([len(prompt) for prompt in self.prompts])
        return self.cache, logits, hidden


@torch.no_grad()
def forward_memory(target: Target, rows: int, tokens: int, projected: Sequence[int] = ()) -> int:
    """Bytes of a forward without a cache, then of logits at `projected` shapes, float32 beside."""
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=target.device)
    with traced() as trace:
        hidden = target.states(ids)
        if projected:
            logits = target.project(hidden[tuple(slice(n) for n in projected)])
            logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return trace.peak_bytes
