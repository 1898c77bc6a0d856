"""One level of a beam search, against sorting all children."""

import pytest
import torch

from redrafter.drafters.beams import best_children, best_columns


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


@pytest.mark.parametrize("columns", [1 << 14, (1 << 14) + 37])
def test_the_best_of_many_columns_are_found_where_they_lie_side_by_side_and_last(columns):
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))
    x[0, :, 129:135] += 20  # in one block
    x[1, 0, -4:] = torch.tensor([11.0, 14.0, 12.0, 13.0])
    x[1, 1] = float("-inf")
    x[1, 1, 77::4000] = torch.arange(len(x[1, 1, 77::4000])).float()
    found, wanted = best_columns(x, 4), x.topk(4)
    assert torch.equal(found[0], wanted.values) and torch.equal(found[1], wanted.indices)
