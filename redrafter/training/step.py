"""One batch: from start positions to a loss. What reads the tokens is in the head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from redrafter.config import LOSSES, LossConfig
from redrafter.heads.base import DraftHead
from redrafter.targets.model import Target
from redrafter.training.feed import Batch, Teacher
from redrafter.training.losses import SOFT, chunked, cross_entropy, mixed, top_k_log_p


def loss_weights(config: LossConfig, done: float = 0.0) -> dict[str, float]:
    """Name -> weight of the losses that have one. done: part of the training, 0..1

    Raises ValueError for a configuration that leaves open which losses: see `LossConfig.resolved`.
    """
    weights = {name: getattr(config, name) or 0.0 for name in LOSSES}
    if not any(weights.values()):
        raise ValueError(f"no loss has a weight: {config}")
    if config.towards is not None:
        ends = {name: config.towards.get(name, 0.0) for name in LOSSES}
        weights = {name: (1 - done) * w + done * ends[name] for name, w in weights.items()}
    return {name: weight for name, weight in weights.items() if weight != 0}


def needed_teacher(config: LossConfig) -> Teacher | None:
    """What the losses need to compare with the target's distribution; None if none of them does."""
    ever = {*loss_weights(config), *loss_weights(config, 1.0)}
    return config.teacher if ever & set(SOFT) else None


def depth_weights(config: LossConfig, depth: int, device: torch.device) -> Tensor:
    """(K,), depth_decay^(k-1)."""
    return config.depth_decay ** torch.arange(depth, device=device, dtype=torch.float64)


def total_weight(batch: Batch, config: LossConfig) -> Tensor:
    """Scalar float64: what the losses of an optimiser step are divided by, summed over all its
    micro-batches (and ranks) *before* the first of them runs, so that their split does not matter.
    With weights that are known only then (`chance`), the drafts: the first depth of each weighs 1.
    """
    if config.depth_weights == "chance":
        return batch.mask.any(1).double().sum()
    return (batch.mask * depth_weights(config, batch.mask.shape[1], batch.mask.device)).sum()


class DraftChance:
    """(P, K): the chance that what the head drafts gets as far as each depth, for `chance` weights;
    no gradient. Depths are to be told in their order, whatever chunk they are in.

    floor: a; the factor of a depth is (1 - a) q(label) + a, and a where its label is none that the
        head can draft. Source: the smoothing is D-PACE's (arXiv 2605.18810, equation 7), which
        weighs by the depths behind as well
    """

    def __init__(self, mask: Tensor, floor: float):
        self.floor = floor
        blank = torch.full(mask.shape, floor, dtype=torch.float64, device=mask.device)
        self.factors = blank.masked_fill(mask, 1.0)

    def __call__(self, start: Tensor, depth: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """(m,) float64, of m rows in ascending order of (start, depth). logits: (m, Vd)"""
        q = torch.exp(-cross_entropy(logits.detach(), labels)).double()
        self.factors[start, depth] = (1.0 - self.floor) * q + self.floor
        before = self.factors.cumprod(1).roll(1, dims=1)
        return torch.where(depth > 0, before[start, depth], 1.0)


def batch_loss(
    model: nn.Module,
    head: DraftHead,
    target: Target,
    batch: Batch,
    config: LossConfig,
    denominator: Tensor,
    done: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """This batch's share of the loss of its optimiser step.

    model: `head` itself or what wraps its forward and `contexts`
    denominator: scalar, `total_weight` of the whole step
    done: part of the training, 0..1, for `loss.towards`
    Returns (scalar loss, (3, K) float64: supervised tokens, top-1 hits and loss sum by depth).
    """
    groups = depth_groups(head, batch.mask.shape[1])
    features = wide(model(contexts_of(model, target, batch), batch.tokens, target))  # (P, K, E)
    rows = [features[:, depths][batch.mask[:, depths]] for depths in groups]  # (M, E) each
    del features  # only those of supervised tokens stay
    chance = None
    if config.depth_weights == "chance":
        chance = DraftChance(batch.mask, config.chance_floor)
    total, counts = None, None
    for depths, part in zip(groups, rows, strict=True):
        found = _loss_of(part, depths, head, target, batch, config, denominator, done, chance)
        total = found[0] if total is None else total + found[0]
        counts = found[1] if counts is None else counts + found[1]
    return total, counts


def contexts_of(model: nn.Module, target: Target, batch: Batch) -> Tensor:
    """(P, H), c of every start, of which a head that reads the prefix is given the whole row."""
    if (rows := batch.rows) is None:
        return model.contexts(target, batch.context)
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
    done: float,
    chance: DraftChance | None,
) -> tuple[Tensor, Tensor]:
    """`batch_loss` of some depths, all of one matrix; chunk by chunk, so that whatever a head is
    made of, no more than one chunk of logits is there at a time. features: (M, E)"""
    n_depths, batch = batch.mask.shape[1], batch.at(depths)
    start, depth = _places(batch.mask, depths)
    labels = batch.labels[batch.mask]
    weight = depth_weights(config, n_depths, batch.mask.device)[depth] / denominator
    teacher = teacher_of(batch, target, getattr(head, "draft_ids", None))
    weights = loss_weights(config, done)

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits = wide(logits)
        log_p = None if teacher is None else teacher(rows)
        each = mixed(weights, logits, labels[rows], log_p)
        with torch.no_grad():
            hit = (logits.argmax(-1) == labels[rows]).double()
            found = torch.stack((torch.ones_like(hit), hit, each.double()))
            counts = found.new_zeros(3, n_depths).index_add_(1, depth[rows], found)
            own = weight[rows]
            if chance is not None:
                own = own * chance(start[rows], depth[rows], logits, labels[rows])
        return (each * own.to(each.dtype)).sum(), counts

    # The loss is no place for a mixed precision either; a plan's meta device knows of none.
    whole = (
        nullcontext() if features.is_meta else torch.autocast(features.device.type, enabled=False)
    )
    with whole:
        return chunked(features, head.vocab_matrix(depths.start + 1), loss, config.chunk_rows)


def _places(mask: Tensor, depths: slice) -> tuple[Tensor, Tensor]:
    """(M,) int64 each: which start, and which depth 0, 1, ... the supervised tokens are of.
    mask: (P, k), of these depths"""
    start = torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)
    depth = torch.arange(depths.start, depths.stop, device=mask.device).expand_as(mask)
    return start[mask], depth[mask]


class StepLoss(nn.Module):
    """`batch_loss` as a forward pass: what wraps a module (data parallel, FSDP, ZeRO, mixed
    precision) then knows of every use of the head's parameters, the vocabulary matrix's too."""

    def __init__(self, head: DraftHead, target: Target, config: LossConfig):
        super().__init__()
        self.head, self.target, self.loss_config = head, target, config

    def forward(
        self, batch: Batch, denominator: Tensor, done: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        head, config = self.head, self.loss_config
        return batch_loss(head, head, self.target, batch, config, denominator, done)


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
) -> dict[str, list[float | None]]:
    """What a teacher-forced head gets right, by depth; batches with the target's ids as labels.

    top_1, top_5: share of supervised tokens among the head's best 1 and best 5
    accepted: share of starts whose depths up to this one are all right. On text that the target
        says greedily, what a chain drafted from the same positions has accepted.
    total: adds up counts over all processes, each of which has batches of its own
    """
    n_depths = batches[0].mask.shape[1]
    counts = torch.zeros(4, n_depths, dtype=torch.float64, device=target.device)
    for batch in batches:
        best = best_five(head, target, batch, chunk_rows)
        right = best[..., 0]
        rows = (torch.ones_like(right), right, best.any(-1), right.cumprod(1).bool())
        counts += (torch.stack(rows) & batch.mask).sum(1)
    n, *found = total(counts).tolist()
    names = ("top_1", "top_5", "accepted")
    return {name: _shares(hits, n) for name, hits in zip(names, found, strict=True)}


def best_five(head: DraftHead, target: Target, batch: Batch, chunk_rows: int) -> Tensor:
    """(P, K, 5) bool: whether the label is the head's best guess, second best and so on; False
    where nothing is supervised. Labels are the target's ids, whatever the head's vocabulary."""
    mask = batch.mask
    features = head(contexts_of(head, target, batch), batch.tokens, target)
    found = mask.new_zeros((*mask.shape, min(5, head.draft_vocab_size)))
    for depths in depth_groups(head, mask.shape[1]):
        matrix, there = head.vocab_matrix(depths.start + 1), mask[:, depths]
        rows, labels = features[:, depths][there], batch.labels[:, depths][there]
        pieces = zip(rows.split(chunk_rows), labels.split(chunk_rows), strict=True)
        each = [
            head.to_vocab_ids((part.to(matrix.dtype) @ matrix.T).topk(found.shape[-1]).indices)
            == label[:, None]
            for part, label in pieces
        ]
        found[:, depths][there] = torch.cat(each)
    return found


def _shares(hits: list[float], n: list[float]) -> list[float | None]:
    return [h / m if m else None for h, m in zip(hits, n, strict=True)]
