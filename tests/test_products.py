"""Large products by packed matrices: the same numbers, of the values that the matrix has now."""

import copy

import pytest
import torch
from models import tiny
from torch import nn
from torch.nn import functional as F

from redrafter.heads.recurrent import RecurrentHead
from redrafter.products import Linear, PackedProduct, SplitProduct, _available
from redrafter.targets.model import Target

LARGE, SMALL = (1 << 11, 1 << 9), (1 << 9, 1 << 8)
pytestmark = pytest.mark.usefixtures("no_kernels")  # those: test_kernels.py
needs_onednn = pytest.mark.skipif(not _available(), reason="this torch packs no matrices")


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def check(product, matrix, rows=5):
    x = drawn(2, rows, matrix.shape[1], dtype=matrix.dtype)
    with torch.inference_mode():
        found = product(x)
    torch.testing.assert_close(found, F.linear(x, matrix), rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 50])
def test_numbers_are_those_of_the_matrix(rows):
    matrix = drawn(*LARGE)
    product = PackedProduct(matrix)
    check(product, matrix, rows)
    assert product._packed is not None


@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1], SMALL])
def test_a_single_row_is_multiplied_by_columns_where_they_are_faster(shape):
    matrix, bias = drawn(*shape), drawn(shape[0])
    product, x = PackedProduct(matrix), drawn(1, 1, shape[1])
    with torch.inference_mode():
        found, added = product(x), product(x, bias)
    for y, b in ((found, None), (added, bias)):
        torch.testing.assert_close(y, F.linear(x, matrix, b), rtol=1e-4, atol=1e-3)
    copied = product._columns is not None and product._columns.data_ptr() != matrix.data_ptr()
    assert copied == (shape == LARGE) and product._packed is None


@needs_onednn
def test_how_a_product_is_made_depends_on_its_size_alone():
    """Not on what was made before: the same product has the same last digits in every run."""
    matrix, rows = drawn(1 << 10, 400), [drawn(n, 400) for n in (1, 2, 3, 40)]
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        product = PackedProduct(matrix)
        with torch.inference_mode():
            made = {i: product(rows[i]) for i in order}
        found.append([made[i] for i in range(4)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@needs_onednn
@pytest.mark.parametrize("again", [False, True])
def test_the_part_of_a_product_that_stays_is_made_once(again):
    linear = Linear(96, 40)
    split, c, s = SplitProduct(linear, 32), drawn(2, 1, 32), drawn(2, 3, 64)
    with torch.inference_mode():
        wanted = F.linear(torch.cat([c.expand(-1, 3, -1), s], -1), linear.weight, linear.bias)
        torch.testing.assert_close(split(c, s, again), wanted)
        made = split._last[1]
        torch.testing.assert_close(split(c, s, again), wanted)
        assert (split._last[1] is made) == again
        other = split(2 * c, s, again)  # another c, whatever the caller believes
    assert (other - wanted).abs().max() > 0.1


@needs_onednn
def test_a_matrix_that_changes_is_packed_anew():
    matrix = nn.Parameter(drawn(*LARGE))
    product = PackedProduct(matrix)
    check(product, matrix)
    with torch.no_grad():
        matrix.mul_(-2)
    check(product, matrix)
    matrix.data = drawn(*reversed(LARGE)).t().contiguous()
    check(product, matrix)


@needs_onednn
def test_a_matrix_that_changes_without_a_trace_is_found_where_a_text_begins():
    """In any of the parts that it is made of."""
    matrix = nn.Parameter(drawn(*LARGE))
    parts = [nn.Parameter(part) for part in matrix.detach().split(LARGE[0] // 2)]
    product = PackedProduct(matrix, parts=parts)
    check(product, matrix)
    packed = product._packed
    product.renew()
    check(product, matrix)
    assert product._packed is packed, "nothing changed"
    for part in parts:
        part.data += 0.5
        product.renew()
        check(product, matrix)


@needs_onednn
def test_copies_are_of_the_copy():
    matrix = nn.Parameter(drawn(*LARGE))
    product = PackedProduct(matrix)
    check(product, matrix)
    other = copy.deepcopy(product)
    with torch.no_grad():
        other.matrix.mul_(3)
    check(other, 3 * matrix.detach())
    check(product, matrix)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SMALL, torch.float32), (LARGE, torch.float64), (LARGE, torch.bfloat16)]
)
def test_what_gains_nothing_is_not_packed(shape, dtype):
    matrix = drawn(*shape, dtype=dtype)
    product = PackedProduct(matrix)
    x = drawn(3, shape[1], dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(product(x), F.linear(x, matrix))
    assert product._packed is None


def test_gradients_pass_where_there_are_any():
    product = PackedProduct(nn.Parameter(drawn(*LARGE)))
    product(drawn(3, LARGE[1])).sum().backward()
    assert product.matrix.grad is not None and product._packed is None


@needs_onednn
def test_a_head_on_the_targets_matrix_shares_it():
    wide = tiny.__wrapped__("llama", vocab_size=1 << 15)
    target = Target(wide.model.float())
    head = RecurrentHead.for_target(target, output="target").eval()
    context, tokens = drawn(1, 1, target.hidden_size), torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        target.project(drawn(3, target.hidden_size))
        _, logits = head.read(target, tokens, context, None, 1)
        states = head.advance(target, tokens, context, None, 1)
        wanted = F.linear(head.features(context, states), target.lm_head_weight)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert list(head._products.values()) == [target.lm_product]
    assert target.lm_product._packed is not None


@needs_onednn
def test_a_head_that_is_trained_drafts_with_its_present_weights():
    """A fused optimiser changes weights and leaves their version as it was."""
    target = Target(tiny.__wrapped__("llama", vocab_size=1 << 15).model.float())
    head = RecurrentHead.for_target(target, output="own")
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)
    context, tokens = drawn(1, 1, target.hidden_size), torch.tensor([[1, 2, 3]])
    for _ in range(2):
        with torch.inference_mode():
            head.eval()  # as whoever evaluates in training calls it
            _, logits = head.read(target, tokens, context, None, 1)
            states = head.advance(target, tokens, context, None, 1)
            wanted = F.linear(head.features(context, states), head.vocab_matrix(1))
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        head.train()
        states = head.advance(target, tokens, context, None, 1)
        head.logits(context, states).square().sum().backward()
        optimizer.step()
