"""A product with one large matrix that does not change, as fast as oneDNN makes it on a CPU.

Stock products of 2 to 17 rows read a large matrix at a fraction of memory's speed; packed once in
oneDNN's own order they cost a third of it (49152 x 576, 4 rows, one thread of an EPYC without
AVX-512: 35 ms, packed 16). One row is no faster, nor are small matrices. The packed matrix is a
second copy. Source: ours; what packs is what inductor's freezing emits.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

#: entries below which packing gains nothing
_LEAST = 1 << 20
_HINT = 17  # rows that oneDNN chooses its order for: the same from 2 to a hundred


class PackedProduct:
    """x W^T for one W (out, in), in inference mode; packed when it is first needed, and anew where
    W's values have changed."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        self._packed: Tensor | None = None
        self._packed_of: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if x.numel() <= x.shape[-1] or not _gains(self.matrix):
            return F.linear(x, self.matrix)
        state = _state(self.matrix)
        if self._packed_of != state:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.matrix.detach(), _HINT)
            self._packed, self._packed_of = packed, state
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, None, "none", [], "")

    def is_of(self, matrix: Tensor | None) -> bool:
        """Whether it multiplies by this matrix, or a view of all of it."""
        own = self.matrix
        return (
            matrix is not None
            and own.data_ptr() == matrix.data_ptr()
            and (own.shape, own.dtype) == (matrix.shape, matrix.dtype)
        )

    def __deepcopy__(self, memo: dict) -> PackedProduct:
        return PackedProduct(copy.deepcopy(self.matrix, memo))  # opaque tensors have no copies


def _state(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), 0 if matrix.is_inference() else matrix._version


def _gains(matrix: Tensor) -> bool:
    return (
        matrix.numel() >= _LEAST
        and matrix.dtype == torch.float32
        and matrix.device.type == "cpu"
        and torch.is_inference_mode_enabled()
        and _available()
    )


@functools.cache
def _available() -> bool:
    """Whether this torch has oneDNN and the two operations, which are not of its public ones."""
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)
