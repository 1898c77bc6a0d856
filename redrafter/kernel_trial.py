"""Kernels are tried before they are used: against float64, by torch's operations.

A compiler, a processor or a broken file might make something else of them. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def is_right(kernels: Any) -> bool:
    """All of them against float64, and in products each number of rows that has code of its own
    against the rows of many."""
    drawn = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float32, device="cpu")

    kinds = (torch.float32, torch.bfloat16)
    products = (_multiplies(kernels, draw, kind) for kind in kinds)
    attentions = (_attends(kernels, draw, kind) for kind in kinds)
    others = (other(kernels, draw) for other in (_surrounds, _goes_by_rows, _chooses))
    return all(products) and all(attentions) and all(others)


def _near(found: Tensor, wanted: Tensor, atol: float = 1e-4) -> bool:
    return torch.allclose(found.double(), wanted, rtol=1e-5, atol=atol)


def _multiplies(kernels: Any, draw: Callable[..., Tensor], kind: torch.dtype) -> bool:
    """kind: of the matrix"""
    out = 9 * kernels.panel - 1  # panels of which few rows take several at once, and one left over
    x, matrix, add = draw(29, 69), draw(out, 69), draw(29, out)
    matrix = matrix.to(kind)
    panels = kernels.panels(matrix)
    every = panels(x, add)
    few = (panels(x[:n], add[:n]).equal(every[:n]) for n in range(1, 15))
    paired = kind is torch.bfloat16 and kernels.pairs  # which rounds x
    wanted = (x.bfloat16() if paired else x).double() @ matrix.double().t() + add
    same = paired or kernels.panels(matrix.float())(x, add).equal(every)
    return _near(every, wanted) and all(few) and same and panels.bytes == matrix.itemsize


def _surrounds(kernels: Any, draw: Callable[..., Tensor]) -> bool:
    """What stands around a product, alone and among several in one call."""
    rows, out, width = 9, kernels.panel + 3, 20
    x, matrix, table, onto = draw(rows, width), draw(out, width), draw(3, out), draw(rows, out)
    panels, bare = kernels.panels(matrix), x.double() @ matrix.double().t()
    each = bare + table.repeat_interleave(3, 0)
    at = torch.arange(rows, device="cpu") * 5 % 3
    apart, last = draw(rows, 2 * out), draw(rows, out)
    steps = [
        kernels.step(
            rows, apart[:, out:].data_ptr(), panels, x.data_ptr(), add=table.data_ptr(), known=3,
            at=at.data_ptr(), silu=True, onto=onto.data_ptr(), y_stride=2 * out,
        ),
        kernels.step(rows, last.data_ptr(), out=out, add=table.data_ptr(), each=3),
    ]  # fmt: skip
    kernels.take(kernels.steps(steps), rows)
    return (
        _near(panels(x, table), each)
        and _near(panels(x, table, True, onto), F.silu(each) + onto)
        and _near(apart[:, out:], F.silu(bare + table[at]) + onto)
        and last.equal(table.repeat_interleave(3, 0))
    )


def _attends(kernels: Any, draw: Callable[..., Tensor], kind: torch.dtype) -> bool:
    """kind: of keys and values. And hidden keys between others add nothing, to the last bit."""
    rows, queries, heads, key_heads, dim, keys = 2, 3, 4, 2, kernels.panel + 8, kernels.panel + 3
    q = draw(rows, queries, heads, dim)
    k, v = (draw(rows, key_heads, keys, dim).to(kind) for _ in "kv")
    least = torch.finfo(torch.float32).min
    mask = draw(rows, 1, queries, keys).relu() * least
    mask[0, ..., -9:], mask[1, ..., :9] = least, least  # keys before and behind all that are seen
    mask[..., kernels.panel // 2 + 2] = 0

    def attended(k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        n = k.shape[2]
        sizes = kernels.sizes(
            rows, queries, heads, key_heads, dim, n, heads * dim, *k.stride()[:3], *v.stride()[:3],
            mask[0].numel(), n, dim**-0.5,
        )  # fmt: skip
        return kernels.attention(q, k, v, mask, sizes).view(q.shape)

    seen = torch.arange(keys, device="cpu") % 5 % 2 == 0
    among = torch.zeros_like(mask).masked_fill_(~seen, least)
    few = k[:, :, seen], v[:, :, seen], among[..., seen].contiguous()
    wide_k, wide_v = (x.double().repeat_interleave(heads // key_heads, 1) for x in (k, v))
    scores = q.double().transpose(1, 2) @ wide_k.transpose(2, 3) * dim**-0.5 + mask
    paired = kind is torch.bfloat16 and kernels.pairs  # which rounds queries and weights
    wanted = (scores.softmax(-1) @ wide_v).transpose(1, 2)
    near = _near(attended(k, v, mask), wanted, 2e-2 if paired else 1e-4)
    return near and attended(k, v, among).equal(attended(*few))


def _goes_by_rows(kernels: Any, draw: Callable[..., Tensor]) -> bool:
    rows, dim = 3, kernels.panel + 6
    x, weight, cos, sin = draw(rows, 2 * dim), draw(2 * dim), draw(rows, dim), draw(rows, dim)
    norm = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)
    gate, up = x.double().chunk(2, -1)
    place = torch.tensor([2, 0, 1], device="cpu")
    heads = x.double().view(rows, 2, dim)
    turned = heads * cos[place, None] + heads.roll(dim // 2, -1) * sin[place, None]
    return (
        _near(kernels.rms_norm(x, weight, 1e-5), norm)
        and _near(kernels.silu_gated(x), F.silu(gate) * up)
        and _near(kernels.rotate(x, place, cos, sin, 2, dim), turned.flatten(1))
    )


def _chooses(kernels: Any, draw: Callable[..., Tensor]) -> bool:
    rows, parents, width, columns = 2, 3, 5, 11 * kernels.panel + 3
    scores, log_q = draw(rows, parents, columns), draw(rows, parents)
    scores[0, 1, 3::7] = -torch.inf
    tokens, places, values = kernels.best_children(scores, log_q, width)
    every = (scores.double().log_softmax(-1) + log_q[:, :, None]).flatten(1)
    best, index = every.topk(width)
    return (places * columns + tokens).equal(index) and _near(values, best)
