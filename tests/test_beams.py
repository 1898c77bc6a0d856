"""One level of a beam search, against sorting all children."""

import pytest
import torch

from redrafter.drafters.beams import best_children


@pytest.mark.parametrize("parents", [1, 3])
@pytest.mark.parametrize("width", [1, 3])
def test_the_best_of_all_children_are_found(parents, width):
    torch.manual_seed(0)
    scores = torch.randn(2, parents, 11, dtype=torch.float64) * 3
    log_q = torch.randn(2, parents, dtype=torch.float64)
    found = best_children(scores, log_q, width)
    every = (log_q[:, :, None] + scores.log_softmax(-1)).flatten(1)
    best, index = every.sort(descending=True)
    assert torch.equal(found.tokens, index[:, :width] % 11)
    assert torch.equal(found.place, index[:, :width] // 11)
    torch.testing.assert_close(found.log_q, best[:, :width])
    torch.testing.assert_close(found.norm, scores.logsumexp(-1))
