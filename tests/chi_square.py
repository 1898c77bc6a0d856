"""A law tested by counting draws, with a stated power.

For any law q at total variation d from p, Cauchy and Schwarz give sum (q - p)^2 / p >= 4 d^2, so
n draws have a noncentrality of at least 4 n d^2, whatever q is.
"""

import functools
import math

import torch

ALPHA = 1e-4  # probability that a right sampler is called wrong
DISTANCE = 0.04  # total variation that is found ...
POWER = 0.99  # ... with this probability, or more


def chi2_tail(x: float, df: int, noncentrality: float = 0.0) -> float:
    """P(X > x) of the (noncentral) chi-square: a Poisson mixture of central ones."""
    half = noncentrality / 2
    last = int(half + 12 * math.sqrt(half) + 20)
    j = torch.arange(last + 1, dtype=torch.float64)
    log_weight = -half + torch.special.xlogy(j, torch.tensor(half).double()) - torch.lgamma(j + 1)
    tail = torch.special.gammaincc(df / 2 + j, torch.full_like(j, x / 2))
    return float((log_weight.exp() * tail).sum())


@functools.cache
def critical(df: int) -> float:
    low, high = 0.0, 50.0 + 10 * df
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if chi2_tail(middle, df) > ALPHA else (low, middle)
    return high


@functools.cache
def n_draws(cells: int) -> int:
    """The fewest draws that find any law at DISTANCE with probability POWER."""
    df = cells - 1
    low, high = 1, 10**7
    while high - low > 1:
        middle = (low + high) // 2
        enough = chi2_tail(critical(df), df, 4 * middle * DISTANCE**2) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def statistic(draws: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """draws: (..., n) cell of each draw; p: (cells,). Pearson's statistic, (...)."""
    n = draws.shape[-1]
    flat = draws.reshape(-1, n)
    offset = torch.arange(len(flat))[:, None] * len(p)
    counts = torch.bincount((flat + offset).flatten(), minlength=len(flat) * len(p))
    counts = counts.view(*draws.shape[:-1], len(p)).double()
    return ((counts - n * p) ** 2 / (n * p)).sum(-1)


def follows(draws: torch.Tensor, p: torch.Tensor) -> bool:
    p = p.double() / p.double().sum()
    assert draws.shape[-1] >= n_draws(len(p)), "too few draws for the stated power"
    assert float(p.min()) * draws.shape[-1] >= 5, "a cell is too rare for Pearson's statistic"
    return bool(statistic(draws, p) <= critical(len(p) - 1))
