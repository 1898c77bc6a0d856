"""One batch: from start positions to a loss. What reads the tokens is in the head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from redrafter.config import LossConfig
from redrafter.heads.base import DraftHead
from redrafter.targets.model import Target
from redrafter.training.feed import Batch, Teacher
from redrafter.training.losses import SOFT, chunked, mixed, top_k_log_p


def loss_weights(config: LossConfig) -> dict[str, float]:
    """Name -> weight of the losses that have one."""
    names = ("cross_entropy", *SOFT)
    return {name: weight for name in names if (weight := getattr(config, name)) != 0}


def needed_teacher(config: LossConfig) -> Teacher | None:
    """What the losses need to compare with the target's distribution; None if none of them does."""
    return config.teacher if any(name in SOFT for name in loss_weights(config)) else None


def depth_weights(config: LossConfig, depth: int, device: torch.device) -> Tensor:
    """(K,), depth_decay^(k-1)."""
    return config.depth_decay ** torch.arange(depth, device=device, dtype=torch.float64)


def total_weight(batch: Batch, config: LossConfig) -> Tensor:
    """Scalar float64: what the losses of an optimiser step are divided by, summed over all its
    micro-batches (and ranks) *before* the first of them runs, so that their split does not matter.
    """
    return (batch.mask * depth_weights(config, batch.mask.shape[1], batch.mask.device)).sum()


def batch_loss(
    model: nn.Module,
    head: DraftHead,
    target: Target,
    batch: Batch,
    config: LossConfig,
    denominator: Tensor,
) -> tuple[Tensor, Tensor]:
    """This batch's share of the loss of its optimiser step.

    model: `head` itself or what wraps its forward and `contexts`
    denominator: scalar, `total_weight` of the whole step
    Returns (scalar loss, (3, K) float64: supervised tokens, top-1 hits and loss sum by depth).
    """
    groups = depth_groups(head, batch.mask.shape[1])
    features = wide(model(contexts_of(model, target, batch), batch.tokens, target))  # (P, K, E)
    rows = [features[:, depths][batch.mask[:, depths]] for depths in groups]  # (M, E) each
    del features  # only those of supervised tokens stay
    total, counts = None, None
    for depths, part in zip(groups, rows, strict=True):
        found = _loss_of(part, depths, head, target, batch, config, denominator)
        total = found[0] if total is None else total + found[0]
        counts = found[1] if counts is None else counts + found[1]
    return total, counts


def contexts_of(model: nn.Module, target: Target, batch: Batch) -> Tensor:
    """(P, H), c of every start: h_t, or what a head that reads the prefix makes of its row."""
    if (rows := batch.rows) is None:
        return batch.context
    return model.contexts(target, rows.hidden, rows.tokens)[rows.row, rows.place]


def depth_groups(head: DraftHead, n_depths: int) -> list[slice]:
    """Depths (0, 1, ...) whose features multiply one matrix: all of them, or each by itself."""
    if head.shares_matrix:
        return [slice(0, n_depths)]
    return [slice(k, k + 1) for k in range(n_depths)]


def _loss_of(
    features: Tensor,
    depths: slice,
    head: DraftHead,
    target: Target,
    batch: Batch,
    config: LossConfig,
    denominator: Tensor,
) -> tuple[Tensor, Tensor]:
    """`batch_loss` of some depths, all of one matrix; chunk by chunk, so that whatever a head is
    made of, no more than one chunk of logits is there at a time. features: (M, E)"""
    n_depths, batch = batch.mask.shape[1], batch.at(depths)
    depth = torch.arange(n_depths, device=batch.mask.device)[depths].expand_as(batch.mask)
    depth, labels = depth[batch.mask], batch.labels[batch.mask]
    weight = depth_weights(config, n_depths, batch.mask.device)[depth] / denominator
    teacher = teacher_of(batch, target, getattr(head, "draft_ids", None))
    weights = loss_weights(config)

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits = wide(logits)
        log_p = None if teacher is None else teacher(rows)
        each = mixed(weights, logits, labels[rows], log_p)
        with torch.no_grad():
            hit = (logits.argmax(-1) == labels[rows]).double()
            found = torch.stack((torch.ones_like(hit), hit, each.double()))
            counts = found.new_zeros(3, n_depths).index_add_(1, depth[rows], found)
        return (each * weight[rows].to(each.dtype)).sum(), counts

    # The loss is no place for a mixed precision either; a plan's meta device knows of none.
    whole = (
        nullcontext() if features.is_meta else torch.autocast(features.device.type, enabled=False)
    )
    with whole:
        return chunked(features, head.vocab_matrix(depths.start + 1), loss, config.chunk_rows)


class StepLoss(nn.Module):
    """`batch_loss` as a forward pass: what wraps a module (data parallel, FSDP, ZeRO, mixed
    precision) then knows of every use of the head's parameters, the vocabulary matrix's too."""

    def __init__(self, head: DraftHead, target: Target, config: LossConfig):
        super().__init__()
        self.head, self.target, self.loss_config = head, target, config

    def forward(self, batch: Batch, denominator: Tensor) -> tuple[Tensor, Tensor]:
        return batch_loss(self.head, self.head, self.target, batch, self.loss_config, denominator)


def wide(logits: Tensor) -> Tensor:
    """Half precision is no place for a logarithm of a sum."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def teacher_of(
    batch: Batch, target: Target, draft_ids: Tensor | None
) -> Callable[[slice], Tensor] | None:
    """Gives log p of the target at temperature 1, (m, Vd), for some of the supervised tokens.

    draft_ids: (Vd,) int64, a pruned vocabulary, which takes columns as they are, without dividing
        by their sum; None: all V
    """
    kept = slice(None) if draft_ids is None else draft_ids
    if batch.teacher_log_z is not None:
        hidden, log_z = batch.teacher[batch.mask], batch.teacher_log_z[batch.mask]
        return torch.no_grad()(
            lambda rows: wide(target.project(hidden[rows], draft_ids)) - log_z[rows, None]
        )
    if batch.teacher is not None:
        hidden = batch.teacher[batch.mask]
        return torch.no_grad()(
            lambda rows: wide(target.project(hidden[rows])).log_softmax(-1)[:, kept]
        )
    if batch.teacher_ids is not None:
        ids, log_p = batch.teacher_ids[batch.mask], batch.teacher_log_p[batch.mask]
        return lambda rows: top_k_log_p(ids[rows], log_p[rows], target.vocab_size)[:, kept]
    return None


@torch.no_grad()
def depth_accuracy(
    head: DraftHead,
    target: Target,
    batches: list[Batch],
    chunk_rows: int,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> dict[str, list[float]]:
    """Share of supervised tokens among the head's best 1 and best 5, by depth (teacher-forced).

    total: adds up counts over all processes, each of which has batches of its own
    """
    n_depths = batches[0].mask.shape[1]
    counts = torch.zeros(3, n_depths, dtype=torch.float64, device=target.device)
    for batch in batches:
        features = head(contexts_of(head, target, batch), batch.tokens, target)
        for depths in depth_groups(head, n_depths):
            matrix, mask = head.vocab_matrix(depths.start + 1), batch.mask[:, depths]
            depth = torch.arange(n_depths, device=target.device)[depths].expand_as(mask)[mask]
            rows, labels = features[:, depths][mask], batch.labels[:, depths][mask]
            for part in torch.arange(len(rows), device=rows.device).split(chunk_rows):
                logits = rows[part].to(matrix.dtype) @ matrix.T
                best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[part, None]
                one = torch.ones_like(labels[part])
                found = torch.stack((one, best[:, 0], best.any(-1))).double()
                counts.index_add_(1, depth[part], found)
    n, top_1, top_5 = total(counts).tolist()
    return {"top_1": _shares(top_1, n), "top_5": _shares(top_5, n)}


def _shares(hits: list[float], n: list[float]) -> list[float | None]:
    return [h / m if m else None for h, m in zip(hits, n, strict=True)]
