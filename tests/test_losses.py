"""The losses: their formulas against numbers worked out by hand, and the chunked sum."""

import math

import pytest
import torch

from redrafter.config import LOSSES
from redrafter.training import losses
from redrafter.training.losses import chunked, mixed

P, Q = [0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.1, 0.2]
LOGITS_Q = (torch.tensor(Q, dtype=torch.float64).log() + 3.0)[None]  # unnormalised on purpose
LOG_P = torch.tensor(P, dtype=torch.float64).log()[None]


def test_against_sums_written_out():
    overlap = sum(min(p, q) for p, q in zip(P, Q, strict=True))
    divergence = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True) if p > 0)
    half = 0.5 * sum(abs(p - q) for p, q in zip(P, Q, strict=True))
    assert losses.cross_entropy(LOGITS_Q, torch.tensor([1])).item() == pytest.approx(-math.log(0.6))
    assert losses.kl(LOGITS_Q, LOG_P).item() == pytest.approx(divergence)
    assert losses.acceptance(LOGITS_Q, LOG_P).item() == pytest.approx(overlap)
    assert losses.total_variation(LOGITS_Q, LOG_P).item() == pytest.approx(half)
    assert losses.minus_log_acceptance(LOGITS_Q, LOG_P).item() == pytest.approx(-math.log(overlap))
    most = math.exp(-3 * overlap)
    hybrid = most * divergence + (1 - most) * half
    assert losses.lk_hybrid(LOGITS_Q, LOG_P).item() == pytest.approx(hybrid)
    p = [0.5, 0.3, 0.15, 0.05]  # the divergence to a p of 0 is infinite
    reverse = sum(q * math.log(q / p) for p, q in zip(p, Q, strict=True))
    found = losses.reverse_kl(LOGITS_Q, torch.tensor(p, dtype=torch.float64).log()[None])
    assert found.item() == pytest.approx(reverse)


def test_the_weight_inside_the_hybrid_has_no_gradient():
    logits = LOGITS_Q.clone().requires_grad_()
    (found,) = torch.autograd.grad(losses.lk_hybrid(logits, LOG_P).sum(), logits)
    overlap = losses.acceptance(LOGITS_Q, LOG_P).item()
    most = math.exp(-3 * overlap)
    parts = most * losses.kl(logits, LOG_P) + (1 - most) * losses.total_variation(logits, LOG_P)
    torch.testing.assert_close(found, torch.autograd.grad(parts.sum(), logits)[0])


def test_the_configuration_names_every_loss():
    assert ("cross_entropy", *losses.SOFT) == LOSSES


def test_a_pruned_vocabulary_counts_as_lost():
    kept = [0, 1]
    q = torch.tensor([0.4, 0.6], dtype=torch.float64)
    found = losses.total_variation(q.log()[None], LOG_P[:, kept])
    assert found.item() == pytest.approx(1 - (min(0.5, 0.4) + min(0.3, 0.6)))


@pytest.mark.parametrize("name", [*losses.SOFT])
def test_gradients_are_finite_where_p_is_zero_or_q_is_far(name):
    logits = torch.tensor([[60.0, 0.0, -60.0, 0.0]], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([[-math.inf, -80.0, 0.0, -math.inf]], dtype=torch.float64)
    value = losses.SOFT[name](logits, log_p).sum()
    value.backward()
    assert math.isfinite(value.item())
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", [*losses.SOFT])
def test_the_minimum_is_at_p(name):
    torch.manual_seed(0)
    log_p = torch.randn(1, 6, dtype=torch.float64).log_softmax(-1)
    at_p = losses.SOFT[name](log_p, log_p).item()
    assert at_p == pytest.approx(0.0, abs=1e-12)
    for _ in range(20):
        assert losses.SOFT[name](log_p + 0.1 * torch.randn_like(log_p), log_p).item() > at_p


MIXTURE = dict(zip(LOSSES, (1.0, 0.5, 0.4, 0.3, 0.2, 0.1), strict=True))
WEIGHTS = {"mixture": MIXTURE, **{name: {name: 1.0} for name in MIXTURE}}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("trained", ["both", "features", "matrix"])
def test_chunked_equals_the_reference(chunk, trained, weights):
    torch.manual_seed(1)
    rows, width, vocab = 37, 8, 50
    features = torch.randn(rows, width, dtype=torch.float64)
    matrix = torch.randn(vocab, width, dtype=torch.float64)
    inputs = [t for t, name in ((features, "features"), (matrix, "matrix"))
              if trained in (name, "both")]  # fmt: skip
    for t in inputs:
        t.requires_grad_()
    labels, weight = torch.randint(vocab, (rows,)), torch.rand(rows, dtype=torch.float64)
    log_p = torch.randn(rows, vocab, dtype=torch.float64)
    log_p[:, ::7] = -math.inf  # p = 0, as after a top-p
    log_p = log_p.log_softmax(-1)
    largest = 0

    def loss(logits, s):
        nonlocal largest
        largest = max(largest, len(logits))
        each = mixed(WEIGHTS[weights], logits, labels[s], log_p[s])
        return (each * weight[s]).sum(), (logits.argmax(-1) == labels[s]).sum()[None]

    reference = (mixed(WEIGHTS[weights], features @ matrix.T, labels, log_p) * weight).sum()
    wanted = torch.autograd.grad(3 * reference, inputs)
    value, hits = chunked(features, matrix, loss, chunk)
    found = torch.autograd.grad(3 * value, inputs)  # 3: what comes from above must be passed on
    assert largest == min(chunk, rows)
    assert hits.item() == ((features @ matrix.T).argmax(-1) == labels).sum().item()
    torch.testing.assert_close(value, reference, atol=1e-6, rtol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def squares(logits, s):
    return logits.square().sum(), torch.tensor([logits.shape[0]])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_rows(weights):
    def loss(logits, s):
        each = mixed(WEIGHTS[weights], logits, labels[s], log_p[s])
        return each.sum(), torch.tensor([logits.shape[0]])

    features = torch.zeros(0, 3, requires_grad=True)
    matrix = torch.ones(4, 3, requires_grad=True)
    labels, log_p = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    value, counts = chunked(features, matrix, loss, 5)
    value.backward()
    assert value.item() == 0 and counts.item() == 0
    assert features.grad.shape == (0, 3) and torch.equal(matrix.grad, torch.zeros(4, 3))


def test_no_gradients_where_none_are_wanted():
    features, matrix = torch.ones(6, 3, requires_grad=True), torch.ones(4, 3)
    with torch.no_grad():
        assert not chunked(features, matrix, squares, 5)[0].requires_grad
    assert not chunked(features.detach(), matrix, squares, 5)[0].requires_grad


def test_losses_add_up_in_grad():
    """Micro-batches: what the first one left in `grad` stays as it is."""
    torch.manual_seed(2)
    features, matrix = torch.randn(9, 3), torch.randn(4, 3, requires_grad=True)
    for part in features.split(3):
        chunked(part, matrix, squares, 2)[0].backward()
    (wanted,) = torch.autograd.grad((features @ matrix.T).square().sum(), matrix)
    torch.testing.assert_close(matrix.grad, wanted)


def test_a_second_backward_is_an_error_and_spoils_nothing():
    """The first one gives its tensors away: they are `grad` now."""
    features = torch.ones(6, 3, requires_grad=True)
    matrix = torch.ones(4, 3, requires_grad=True)
    value, _ = chunked(features, matrix, squares, 5)
    value.backward(retain_graph=True)
    before = matrix.grad.clone(), features.grad.clone()
    with pytest.raises(RuntimeError, match="compute the loss again"):
        value.backward()
    assert torch.equal(matrix.grad, before[0]) and torch.equal(features.grad, before[1])
