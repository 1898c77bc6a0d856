"""Losses of a draft head, per position; plain references first, the chunked sum last.

q is the head's distribution, p the target's; both over the (draft) vocabulary, Vd columns. Which
loss serves which verification rule:

- `cross_entropy` on the target's own tokens raises log q(token). With greedy labels it trains what
  greedy decoding, the seeded rule and every rule of membership (q = 1) test: is the token that the
  target will emit among the drafted ones.
- `kl` (forward, p || q) is the same with every label weighted by p: fewer samples needed where the
  target is uncertain, and what the coupled seeded proposal wants (both sides add one noise to their
  log-probabilities, so q must be p everywhere, not only at its maximum).
- `total_variation` is 1 - (the probability that one draw from q is accepted by the ratio rule).
- `minus_log_acceptance` is minus the logarithm of that probability, which keeps a gradient when q
  is far from p (LK losses, arXiv 2602.23881).
- `lk_hybrid` is KL where little would be accepted and total variation where much would: their
  mean with the weights lambda and 1 - lambda, lambda = exp(-3 acceptance) (the same paper).
- `reverse_kl` (q || p) is the same divergence with every token weighted by q: it takes mass away
  from what the target would not say, and leaves out what the head cannot tell apart.

With a pruned draft vocabulary, pass log p of the kept columns, not renormalised: the acceptance and
the total variation then count what was pruned as lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def cross_entropy(logits_q: Tensor, labels: Tensor) -> Tensor:
    """logits_q: (..., V); labels: (...) int64. Returns (...), -log q(label) in nats."""
    return F.cross_entropy(logits_q.flatten(0, -2), labels.flatten(), reduction="none").view(
        labels.shape
    )


def kl(logits_q: Tensor, log_p: Tensor) -> Tensor:
    """logits_q, log_p: (..., V). Returns (...), sum_v p (log p - log q) in nats."""
    difference = log_p - logits_q.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * difference, 0.0).sum(-1)


def acceptance(logits_q: Tensor, log_p: Tensor) -> Tensor:
    """Returns (...), sum_v min(p, q): how often one draw from q is accepted by the ratio rule."""
    return torch.minimum(log_p.exp(), logits_q.softmax(-1)).sum(-1)


def total_variation(logits_q: Tensor, log_p: Tensor) -> Tensor:
    """logits_q, log_p: (..., V). Returns (...) in 0..1.

    Half of sum |p - q| where p sums to one; written as 1 - sum min(p, q), it also holds for a p
    of which columns were pruned.
    """
    return 1.0 - acceptance(logits_q, log_p)


def minus_log_acceptance(logits_q: Tensor, log_p: Tensor) -> Tensor:
    """logits_q, log_p: (..., V). Returns (...), -log sum_v min(p, q), in nats.

    Formed from logarithms, so that it stays finite when p and q share almost nothing.
    """
    return -torch.minimum(log_p, logits_q.log_softmax(-1)).logsumexp(-1)


#: log p that a smaller one counts as in `reverse_kl`, which is infinite where p is 0
_LEAST_LOG_P = -100.0


def reverse_kl(logits_q: Tensor, log_p: Tensor) -> Tensor:
    """logits_q, log_p: (..., V). Returns (...), sum_v q (log q - log p) in nats."""
    log_q = logits_q.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p.clamp(min=_LEAST_LOG_P))).sum(-1)


#: how fast the weight of KL falls; the best one of the paper
_HYBRID_ETA = 3.0


def lk_hybrid(logits_q: Tensor, log_p: Tensor) -> Tensor:
    """logits_q, log_p: (..., V). Returns (...), lambda KL(p || q) + (1 - lambda) TV, per position;
    lambda is a weight and has no gradient (arXiv 2602.23881)."""
    accepted = acceptance(logits_q, log_p)
    weight = torch.exp(-_HYBRID_ETA * accepted.detach())
    return weight * kl(logits_q, log_p) + (1.0 - weight) * (1.0 - accepted)


#: losses that compare with p and need the target's logits
SOFT = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "minus_log_acceptance": minus_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def mixed(
    weights: dict[str, float], logits_q: Tensor, labels: Tensor, log_p: Tensor | None
) -> Tensor:
    """Weighted sum of the losses named in `weights` ("cross_entropy" or a key of SOFT): (...).

    log_p may be None where only the cross-entropy has a weight.
    """
    total = logits_q.new_zeros(labels.shape)
    for name, weight in weights.items():
        if weight == 0:
            continue
        if name == "cross_entropy":
            total = total + weight * cross_entropy(logits_q, labels)
        else:
            total = total + weight * SOFT[name](logits_q, log_p)
    return total


def top_k_log_p(ids: Tensor, log_p: Tensor, vocab_size: int) -> Tensor:
    """A whole distribution from its k most probable tokens: what is left is spread evenly over the
    others. Source: ours.

    ids: (..., k) int64, all different; log_p: (..., k) their log-probabilities. Returns (..., V).
    """
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-12)
    others = (rest / max(1, vocab_size - ids.shape[-1])).log()
    return others.expand(*ids.shape[:-1], vocab_size).clone().scatter_(-1, ids, log_p)


ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def chunked(features: Tensor, matrix: Tensor, loss: ChunkLoss, chunk: int) -> tuple[Tensor, Tensor]:
    """sum over chunks of loss(features @ matrix^T), never holding more than chunk x V logits.

    features: (M, E); matrix: (V, E), trained or frozen
    loss: (logits of rows `s`, s) -> (scalar sum over these rows, a vector of counts to report);
        the sum of all chunks must be the wanted loss: weights and normalisation are its business
    chunk: rows per chunk
    Returns the loss (differentiable once, in features and matrix) and the summed counts.

    Source: ours. The gradients of a chunk are made together with its value and only they are kept:
    (M, E) and (V, E) numbers, no second forward in the backward pass. The backward pass hands over
    these very tensors, so that the (V, E) one becomes `matrix.grad` and is never there twice (but
    for a matrix that has a `grad` already: autograd adds the new one to it, then frees it).
    """
    need_features = torch.is_grad_enabled() and features.requires_grad
    need_matrix = torch.is_grad_enabled() and matrix.requires_grad
    return _Chunked.apply(features, matrix, loss, chunk, need_features, need_matrix)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, matrix, loss, chunk, need_features, need_matrix):
        grad_features = torch.empty_like(features) if need_features else None
        grad_matrix = torch.zeros_like(matrix) if need_matrix else None
        total, counts = None, None
        for start in range(0, max(1, len(features)), chunk):  # one empty chunk if M = 0
            rows = slice(start, min(start + chunk, len(features)))
            f = features[rows].detach().to(matrix.dtype)
            grad_logits, value, count = _one_chunk(
                f, matrix.detach(), loss, rows, need_features or need_matrix
            )
            if need_features:
                grad_features[rows] = grad_logits @ matrix.detach()
            if need_matrix:
                grad_matrix.addmm_(grad_logits.T, f)
            del grad_logits  # else it lives beside the next chunk's logits
            total = value if total is None else total + value
            counts = count if counts is None else counts + count
        ctx.grads = (grad_features, grad_matrix)
        ctx.mark_non_differentiable(counts)
        return total, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of this chunked loss were handed over by an earlier backward pass: "
                "compute the loss again"
            )
        # Not kept, and scaled in place: autograd makes `grad` of a tensor that nobody else holds,
        # and would copy any other.
        grads, ctx.grads = ctx.grads, None
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_total.to(grad.dtype))
        return *grads, None, None, None, None


def _one_chunk(
    features: Tensor, matrix: Tensor, loss: ChunkLoss, rows: slice, need_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradient of the loss in the logits (None unless `need_grad`), loss, and counts of one chunk.

    A function of its own, so that what the loss was made of is freed before the gradient is used.
    """
    logits = F.linear(features, matrix).requires_grad_(need_grad)
    with torch.enable_grad():
        value, count = loss(logits, rows)
    grad = torch.autograd.grad(value, logits)[0] if need_grad else None
    return grad, value.detach(), count.detach()
