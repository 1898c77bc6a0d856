"""The test that laws are tested with: against tables, and its power."""

import math

import pytest
import torch
from chi_square import DISTANCE, chi2_tail, critical, follows, n_draws, statistic


def test_chi_square_against_tables():
    # Abramowitz and Stegun, table 26.8: upper percentage points
    for df, x, tail in ((1, 3.84146, 0.05), (7, 24.3219, 0.001), (10, 15.9871, 0.1)):
        assert chi2_tail(x, df) == pytest.approx(tail, rel=1e-4)
    # One degree of freedom is a shifted normal squared.
    for x, shift in ((4.0, 1.5), (9.0, 3.0), (15.1, 5.5)):
        root = math.sqrt(x)
        normal = 0.5 * (math.erfc((root - shift) / 2**0.5) + math.erfc((root + shift) / 2**0.5))
        assert chi2_tail(x, 1, shift**2) == pytest.approx(normal, rel=1e-9)


@pytest.mark.parametrize("cells", [4, 8, 64])
def test_the_stated_power_is_real(cells):
    """On the law that is hardest to find at this distance, and on the right one."""
    random = torch.Generator().manual_seed(cells)
    p = torch.rand(cells, generator=random).double() + 0.2
    half = cells // 2
    p = torch.cat([p[:half] / p[:half].sum(), p[half:] / p[half:].sum()]) / 2
    sign = torch.ones(cells).double()
    sign[half:] = -1
    worst = p * (1 + 2 * DISTANCE * sign)  # equality in Cauchy and Schwarz
    assert float((worst - p).abs().sum() / 2) == pytest.approx(DISTANCE)
    n, trials = n_draws(cells), 200

    def draws(law):
        return torch.multinomial(law, trials * n, True, generator=random).view(trials, n)

    found = statistic(draws(worst), p) > critical(cells - 1)
    # 0.99 expected; fewer than 0.95 of 200 has a probability below 1e-5
    assert found.double().mean() >= 0.95
    right = statistic(draws(p), p)
    assert (right <= critical(cells - 1)).all()
    assert right.mean() == pytest.approx(cells - 1, rel=0.1)  # it is a chi-square at all
    # With a tenth of the draws the same law would mostly pass: the number is not idle.
    few = statistic(draws(worst)[:, : n // 10], p) > critical(cells - 1)
    assert few.double().mean() < 0.5


def test_a_known_biased_rule_is_found():
    """Taking the best of several beams by ratio turns the first law into the second."""
    p, biased = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1 / 3, 2 / 3, 0, 0])
    random = torch.Generator().manual_seed(0)
    n = n_draws(len(p))
    assert not follows(torch.multinomial(biased, n, True, generator=random), p)
    assert follows(torch.multinomial(p, n, True, generator=random), p)
