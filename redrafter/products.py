"""Products with matrices that do not change, as fast as a CPU makes them.

Three orders of a matrix W (out, in) are faster than the one that it comes in:

    panels    for any number of rows, by the kernels of `kernels.py`, where they could be compiled:
              6 rows times 288 -> 4096 take 0.48 ms where one takes 0.37

and where they could not, by what torch brings:

    columns   (in, out), for a single row, where W has at least as many rows as columns: one row
              times 288 -> 4096 takes 0.46 ms and not 0.86
    packed    oneDNN's own, for several rows of a large W: 4 rows times 576 -> 49152 take 16 ms
              and not 46, 17 rows times 576 -> 3072 2.9 and not 4.9

(One thread of an EPYC without AVX-512, W not in its caches; docs/results/costs.md.) Which is taken
depends on the product's size alone, so that the same product has the same last digits in every run.
Each is a copy of W, made when it is first needed. Small matrices are left as they are. They are for
float32; panels also for a W in bfloat16, where the CPU has no tiles for it (AMX): torch's own
products take longer there than in float32, the kernels', which sum in float32, half as long, and
where the CPU multiplies bfloat16 in pairs (AVX512-BF16), 17 rows a quarter.
A draft may be made by W rounded to bfloat16 (`rounds`), as it decides no token.
Source: ours; what packs is what inductor's freezing emits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.kernels import FLOATS, Kernels, Panels, load

#: entries of a matrix, and multiplications of a product, below which no copy gains anything
_LEAST, _WORK = 3 << 17, 1 << 20
#: entries above which columns are not copied for the sake of single rows: 128 MiB
_MOST = 1 << 25
#: entries of a matrix at most that tell whether it was changed without a trace
_SAMPLED = 64
_HINT = 17  # rows that oneDNN chooses its order for: the same from 2 to a hundred
#: entries of a matrix below which the kernels gain nothing
_LEAST_PANELS = 1 << 14

#: see `use_kernels`
kernels: Kernels | None = None


class PackedProduct:
    """x W^T (+ b) for one W (out, in), in inference mode; what it copies is made when it is first
    needed, and anew where W's values have changed.

    packs: whether W may be packed
    parts: the tensors whose memory W is, where others change them
    always: whether kernels, if there are any, are to make it however small it is, so that a row's
        result depends on no other row
    rounds: whether the kernels' copy is of W rounded to bfloat16: half the bytes, and pairs of them
        where the CPU multiplies those
    """

    def __init__(
        self, matrix: Tensor, packs: bool = True, parts: Sequence[Tensor] = (),
        always: bool = False, rounds: bool = False,
    ):  # fmt: skip
        self.matrix, self.packs, self.parts = matrix, packs, tuple(parts or (matrix,))
        self.width, self.always, self.rounds = matrix.shape[1], always, rounds
        #: what multiplies by panels; None: torch does what it can
        self.kernels = multiplier_for(matrix) if packs else None
        #: rows from which on it packs
        self.least_rows: float = math.inf
        self.large = matrix.numel() >= _least(self.kernels is not None, always)
        if self.large and self.kernels is not None:
            self.least_rows = 1
        elif packs and self.large and _is_plain(matrix) and _available():
            self.least_rows = max(2, math.ceil(_WORK / matrix.numel()))
        #: W for the kernels, as soon as it is made and while it is what W is
        self.panels: Panels | None = None
        self._packed: Tensor | None = None
        self._columns: Tensor | None = None
        self._state: list[tuple[int, int]] | None = None
        self._plain = False
        self._seen: tuple[list[Tensor], Tensor] | None = None  # entries, and what they were

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out). bias: (out,), or to be added to every row its own, (..., out)

        x: of W's dtype; by panels of bfloat16 also float32, and so is then the result
        """
        matrix, width = self.matrix, x.shape[-1]
        if not self._multiplies(x):
            return F.linear(x, matrix.to(x.dtype), bias)  # of another width it says so
        if self.kernels is not None:
            panels = self.panels or self._lay_out()
            if x.dtype is torch.float32:
                return panels(x, bias)
            return panels(x.float(), bias if bias is None else bias.float()).to(x.dtype)
        if x.numel() >= self.least_rows * width:
            if self._packed is None:
                self._packed = _pack(matrix)
            return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, bias, "none", [], "")
        if x.numel() > width or not prefers_columns(matrix):
            return F.linear(x, matrix, bias)
        if self._columns is None:
            self._columns = _as_columns(matrix)
        row = x.reshape(1, width)
        out = (
            torch.mm(row, self._columns) if bias is None else torch.addmm(bias, row, self._columns)
        )
        return out.view(*x.shape[:-1], -1)

    def silu(self, x: Tensor, bias: Tensor, onto: Tensor | None = None) -> Tensor:
        """SiLU(x W^T + b) (+ onto), by kernels in one go. bias: (out,); onto: (..., out)"""
        if self.kernels is not None and x.dtype is torch.float32 and self._multiplies(x):
            return (self.panels or self._lay_out())(x, bias, True, onto)
        y = F.silu(self(x, bias))
        return y if onto is None else onto + y

    def _multiplies(self, x: Tensor) -> bool:
        """Whether x is multiplied by a copy, or as another order of W has it."""
        if not self._has_copies():
            return False
        known = x.dtype in (torch.float32, self.matrix.dtype)
        return x.is_cpu and known and x.shape[-1] == self.width

    def _has_copies(self) -> bool:
        """Whether there may be copies now; those of other values are dropped."""
        if not (self.large and torch.is_inference_mode_enabled()):
            return False
        state = [state_of(part) for part in self.parts]
        if self._state != state:
            self._look_anew(state)
        return self._plain

    def ready(self) -> Panels | None:
        """W for the kernels, of its values now; None where they do not multiply by it now."""
        if self.kernels is None or not self._has_copies():
            return None
        return self.panels or self._lay_out()

    def shrinks(self) -> bool:
        """Whether a copy of W rounded to bfloat16 would be smaller than the one it has."""
        panels = self.ready()
        return panels is not None and panels.kind == FLOATS

    def _lay_out(self) -> Panels:
        matrix = self.matrix.detach()
        self.panels = self.kernels.panels(matrix.bfloat16() if self.rounds else matrix)
        return self.panels

    def _look_anew(self, state: list[tuple[int, int]]) -> None:
        """What was copied is of values, or of a place or dtype, that are no more."""
        self.panels, self._packed, self._columns, self._state = None, None, None, state
        halves = self.kernels is not None and _is_plain(self.matrix, torch.bfloat16)
        self._plain, self._seen = halves or _is_plain(self.matrix), None
        if self._plain:
            entries = [_sample(part) for part in self.parts]
            self._seen = entries, torch.cat(entries)

    def renew(self, surely: bool = False) -> None:
        """Before a text begins: what was copied is made anew where W was changed without a trace,
        as adapters are merged (through `.data`); some entries of every part tell.

        surely: whether or not they do
        """
        if self._seen is None:
            return
        if surely or not torch.equal(torch.cat(self._seen[0]), self._seen[1]):
            self.panels, self._state = None, None

    @property
    def copied_bytes(self) -> int:
        """Of the packed copy that it comes to hold on a CPU, for a plan."""
        return copy_bytes(self.matrix.numel(), self.matrix.dtype, self.always)

    def is_of(self, matrix: Tensor | None) -> bool:
        """Whether it multiplies by this matrix, or a view of all of it."""
        own = self.matrix
        return (
            matrix is not None
            and own.data_ptr() == matrix.data_ptr()
            and (own.shape, own.dtype) == (matrix.shape, matrix.dtype)
        )

    def __reduce__(self) -> tuple:
        # opaque tensors have no copies, nor have kernels
        return PackedProduct, (self.matrix, self.packs, self.parts, self.always, self.rounds)


def prefers_columns(matrix: Tensor) -> bool:
    """Whether products with a matrix (out, in) are faster with (in, out) in memory."""
    return _is_plain(matrix) and matrix.shape[0] >= matrix.shape[1]


def use_kernels(device: torch.device) -> None:
    """Whoever loads a target for a device calls it: from here on products on a CPU may be made by
    `redrafter.kernels`, if this machine can; for another device none are compiled. An export, which
    runs without this library, never does."""
    global kernels
    if device.type == "cpu":
        kernels = load()


@functools.cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return has_tiles() or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def has_tiles() -> bool:
    """Whether it does so a tile at a time, which torch's own products use well. Of pairs alone they
    do not: 17 rows took SmolLM2 84 ms in bfloat16 and 53 for one, the kernels half and a third."""
    return torch.cpu._is_amx_tile_supported()


def has_kernels() -> bool:
    """Whether products are made by panels: there are kernels, for as many threads as are set."""
    return kernels is not None and (kernels.threads or torch.get_num_threads() == 1)


def kernels_for(matrix: Tensor) -> Kernels | None:
    """The kernels that products with a matrix, and what goes with them, may be made by."""
    return kernels if has_kernels() and _is_plain(matrix) else None


def multiplier_for(matrix: Tensor) -> Kernels | None:
    """The kernels that products with a matrix may be made by: what they read of it may be bfloat16,
    where the CPU has no tiles for such products."""
    halves = has_kernels() and not has_tiles() and _is_plain(matrix, torch.bfloat16)
    return kernels if halves else kernels_for(matrix)


def _least(panels: bool, always: bool = False) -> int:
    return (0 if always else _LEAST_PANELS) if panels else _LEAST


def copy_bytes(entries: int, dtype: torch.dtype, always: bool = False) -> int:
    """Of the packed copy that a `PackedProduct` makes of a matrix on a CPU, for a plan; of float32
    whose entries are all bfloat16 numbers the kernels' is half as large."""
    panels = has_kernels()
    if dtype is torch.bfloat16:
        packs = panels and not has_tiles()
    else:
        packs = dtype is torch.float32 and (panels or _available())
    return dtype.itemsize * entries if packs and entries >= _least(panels, always) else 0


def _sample(matrix: Tensor) -> Tensor:
    """A view of entries along the diagonal."""
    diagonal = matrix.detach().diagonal()
    return diagonal[:: -(-len(diagonal) // _SAMPLED)]


def _pack(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), _HINT)


def _as_columns(matrix: Tensor) -> Tensor:
    """(in, out), a copy unless W is too large for it."""
    columns = matrix.detach().t()
    return columns.contiguous() if matrix.numel() <= _MOST else columns


def gains(matrix: Tensor) -> bool:
    """Whether products with it may be anything but stock now."""
    return torch.is_inference_mode_enabled() and _is_plain(matrix)


def state_of(matrix: Tensor) -> tuple[int, int]:
    """What changes where the values do, but for what is changed without a trace."""
    return matrix.data_ptr(), 0 if matrix.is_inference() else matrix._version


def _is_plain(matrix: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Not traced, sharded or elsewhere, and of that dtype."""
    return (
        type(matrix) in (Tensor, nn.Parameter)
        and matrix.dtype == dtype
        and matrix.device.type == "cpu"
    )


@functools.cache
def _available() -> bool:
    """Whether this torch has oneDNN and the two operations, which are not of its public ones."""
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


class Linear(nn.Linear):
    """`nn.Linear` of a draft head: up to rounding the same numbers, by a `PackedProduct` while it
    drafts, where it is large.

    rounds: see there
    """

    rounds = False
    _product: PackedProduct | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self.product()
        return super().forward(x) if product is None else product(x, self.bias)

    def product(self) -> PackedProduct | None:
        """What multiplies by its weight, without the bias; None where that gains nothing."""
        entries, least = self.in_features * self.out_features, _least(has_kernels(), always=True)
        if entries < least or not gains(self.weight):
            return None
        made = self._product
        if made is None or made.matrix is not self.weight or made.rounds != self.rounds:
            self._product = PackedProduct(self.weight, always=True, rounds=self.rounds)
        return self._product

    def train(self, mode: bool = True) -> Linear:
        """Copies are made anew: fused optimisers change weights without a trace."""
        self._product = None
        return super().train(mode)


def silu_of(linear: nn.Module, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """SiLU(linear(x)) (+ onto) of any linear map; in one go where kernels multiply a `Linear`."""
    product = linear.product() if type(linear) is Linear else None
    if product is not None and linear.bias is not None:
        return product.silu(x, linear.bias, onto)
    y = F.silu(linear(x))
    return y if onto is None else onto + y


class SplitProduct:
    """W [c ; s] + b of a `Linear` in inference mode, a product for each part: that of a c that
    stays as it is over several s is made once.

    width: of c
    """

    def __init__(self, linear: Linear, width: int):
        whole = linear.weight
        self.linear, self.place = linear, whole.data_ptr()
        matrices, self.rounds = whole.detach().tensor_split([width], 1), linear.rounds
        self.of_c, self.of_s = (
            PackedProduct(m, True, [whole], always=True, rounds=linear.rounds) for m in matrices
        )
        self._last: tuple[Tensor, Tensor] | None = None

    def is_of(self, linear: Linear) -> bool:
        same = self.linear is linear and self.rounds == linear.rounds
        return same and self.place == linear.weight.data_ptr()

    def __call__(self, c: Tensor, s: Tensor, again: bool) -> Tensor:
        """c, s: (..., width of each), c broadcast against s. again: where c is the last call's, its
        product is, too. Returns (..., out)"""
        return self.of_s(s) + self.of_context(c, s.dtype, again)

    def of_context(self, c: Tensor, dtype: torch.dtype, again: bool) -> Tensor:
        """W c + b, (..., out). dtype: of s"""
        last = self._last
        if not again or last is None or last[0] is not c:
            last = self._last = c, self.of_c(c.to(dtype), self.linear.bias)
        return last[1]
