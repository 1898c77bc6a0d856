"""What a forward of few rows is made of, by kernels of our own in float32 on a CPU (kernels.c).

Why of our own: a step verifies one to some dozens of tokens, and the libraries that torch brings
take two to three times a single row's time for four (docs/results/costs.md), although memory,
which decides, is read but once. Here six rows cost about what one does, and a row's last digits
are the same however many others there are.

They are compiled where they first run (a second, by cc, gcc or clang), kept in the cache folder,
and tried before they are used; where there is no compiler, or what it made computes something else,
torch's own operations stay. `REDRAFTER_KERNELS=off` leaves them out. Source: ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from redrafter.files import cache_folder, digest_file, write_bytes, write_text

#: environment variable that leaves the kernels out where it is `off`
SWITCH = "REDRAFTER_KERNELS"
SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC")
#: for this processor; the second is how some compilers want it said
_TUNED = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_S = 60
_CHECKED = 1 << 10  # rows of a matrix that are looked at together: it may be as large as memory
_DIGEST = ".sha256"
#: multiplications below which one thread is enough
_SMALL = 1 << 18


class Sizes(ctypes.Structure):
    """Of one attention, as kernels.c has it (strides in floats)."""

    _fields_ = [
        *((name, ctypes.c_long) for name in (
            "rows", "queries", "heads", "key_heads", "dim", "keys", "q_stride", "k_row", "k_head",
            "k_key", "v_row", "v_head", "v_key", "mask_row", "mask_query",
        )), ("scale", ctypes.c_float),
    ]  # fmt: skip


class Kernels:
    """The compiled functions, for contiguous float32 tensors on the CPU where nothing else is said.

    panel: outputs of a product that lie together; threads: whether they can use several
    """

    def __init__(self, library: ctypes.CDLL):
        place, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        takes = {
            "product": [place, place, number, place, size, place, size, size, size, number],
            "attention": [place, place, place, place, place, place, number],
            "rms_norm": [place, place, ctypes.c_float, place, size, size, number],
            "silu_gated": [place, place, size, size, number],
            "rotate": [place, size, place, size, place, place, place, size, size, size],
        }
        for name, arguments in takes.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
            setattr(self, f"_{name}", function)
        self._attention.restype = self._rotate.restype = number
        library.panel_width.restype = size
        self.panel, self.threads = library.panel_width(), bool(library.has_threads())

    def __reduce__(self) -> tuple:
        return load, ()  # a copy, in whatever process, has functions of its own

    def panels(self, matrix: Tensor) -> Panels:
        """A matrix (out, in) to be multiplied by."""
        return Panels(self, matrix)

    def threads_for(self, operations: int) -> int:
        """As many as torch has, where there is enough to do."""
        return torch.get_num_threads() if self.threads and operations > _SMALL else 1

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of the rows of x (R, W)."""
        x, (rows, width) = x.contiguous(), x.shape
        y = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), rows, width,
            self.threads_for(rows * width),
        )  # fmt: skip
        return y

    def silu_gated(self, x: Tensor) -> Tensor:
        """silu(g) u of x (R, 2 W) = [g, u]; (R, W)."""
        x, rows, width = x.contiguous(), len(x), x.shape[1] // 2
        y = x.new_empty((rows, width))
        threads = self.threads_for(4 * rows * width)
        self._silu_gated(x.data_ptr(), y.data_ptr(), rows, width, threads)
        return y

    def rotate(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: int, dim: int
    ) -> Tensor:
        """Rotary positions of the first `heads` heads of x, (R, at least heads * dim).

        positions: R, int64; cos, sin: (positions, dim), the first half of sin negated. Returns
        (R, heads * dim). Raises IndexError where a position is none of theirs
        """
        rows, known = len(x), len(cos)
        y = x.new_empty((rows, heads * dim))
        failed = self._rotate(
            x.data_ptr(), x.stride(0), positions.data_ptr(), known, cos.data_ptr(), sin.data_ptr(),
            y.data_ptr(), rows, heads, dim,
        )  # fmt: skip
        if failed:
            raise IndexError(f"positions {positions.tolist()} are not all among {known}")
        return y

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sizes: Sizes
    ) -> Tensor:
        """softmax(scale q k^T + mask) v; `sizes` has all shapes and strides.

        q: (B * N, q_stride); keys, values: (B, key heads, S, dim), by strides; mask: (B or 1, 1, N
        or 1, S), the dtype's minimum where nothing may be seen. Returns (B * N, heads * dim)
        """
        n, s = sizes.rows * sizes.queries, sizes
        out = q.new_empty((n, s.heads * s.dim))
        failed = self._attention(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), mask.data_ptr(), out.data_ptr(),
            ctypes.addressof(sizes), self.threads_for(2 * n * s.heads * s.dim * s.keys),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the scores of {s.queries} queries and {s.keys} keys")
        return out


class Panels:
    """A matrix W (out, in) of float32 on the CPU, as `product` reads it: a copy, of half the size
    where all entries are bfloat16 numbers, as those of most checkpoints are."""

    def __init__(self, kernels: Kernels, matrix: Tensor):
        out, width = matrix.shape
        missing = -out % kernels.panel
        matrix, half = matrix.detach(), False
        if all(part.equal(part.bfloat16().float()) for part in matrix.split(_CHECKED)):
            matrix, half = matrix.bfloat16(), True
        padded = F.pad(matrix, (0, 0, 0, missing)) if missing else matrix
        panels = padded.view(-1, 2, kernels.panel // 2, width)
        # (panels, in, 2, panel / 2), or (panels, in, panel / 2, 2): see `load` in kernels.c
        order = (0, 3, 2, 1) if half else (0, 3, 1, 2)
        self.values = panels.permute(order).contiguous()
        self.place, self.bytes = self.values.data_ptr(), self.values.itemsize
        self.out, self.width = out, width
        self.product = kernels._product
        #: rows from which on several threads are worth waking, if there are any
        self.shared = _SMALL / (out * width) if kernels.threads else math.inf

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x W^T (+ add): x (..., in), float32 on the CPU as add is, which is (out,), or has the
        result's size, (..., out). What has other sizes is not seen here: whoever calls it knows."""
        x, out, width = x.contiguous(), self.out, self.width
        rows = x.numel() // width
        result = x.new_empty((rows, out) if x.dim() == 2 else (*x.shape[:-1], out))
        if add is None:
            place, stride = None, 0
        else:
            add = add.contiguous()
            place, stride = add.data_ptr(), 0 if add.dim() == 1 else out
        threads = torch.get_num_threads() if rows > self.shared else 1
        self.product(
            x.data_ptr(), self.place, self.bytes, place, stride, result.data_ptr(), rows, width,
            out, threads,
        )  # fmt: skip
        return result


@functools.cache
def load() -> Kernels | None:
    """The kernels, compiled if need be; None where they are switched off or cannot be had."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return None
    kept = cache_folder() / f"kernels-{_key()}.so"
    return (_tried(kept) if _is_whole(kept) else None) or _compiled(kept)


def _key() -> str:
    """Of what decides what a compiler makes: another processor may not know its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        told = [platform.processor()]
    how = (*_FLAGS, *(word for tuned in _TUNED for word in tuned))
    source = SOURCE.read_text(encoding="utf-8")
    parts = (source, platform.machine(), torch.__version__, *how, *told)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _is_whole(kept: Path) -> bool:
    """Whether what is kept is what was (loading the half of a library ends the process), and no
    other user's, whose code it would be."""
    try:
        if hasattr(os, "getuid") and kept.stat().st_uid not in (0, os.getuid()):
            return False
        return digest_file(kept).encode() == kept.with_suffix(_DIGEST).read_bytes()
    except OSError:
        return False


def _compiled(kept: Path) -> Kernels | None:
    """By the first commands that make something right, which is kept where that is possible."""
    compiler = _compiler()
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="redrafter-"))
        except OSError:  # nowhere to make it
            return None
        for made, commands in _commands(compiler, Path(folder)) if compiler else ():
            try:
                for command in commands:
                    subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
            except (OSError, subprocess.SubprocessError):
                continue
            kernels = _tried(made)
            if kernels is not None:
                with contextlib.suppress(OSError):  # it is made anew where it cannot be kept
                    write_bytes(kept, made.read_bytes())
                    write_text(kept.with_suffix(_DIGEST), digest_file(made))
                return kernels
    return None


def _compiler() -> list[str]:
    """The words that call it: those of `CC`, which may bring arguments, else the first there is."""
    given = os.environ.get("CC", "")
    for words in ([given], given.split(), ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return []


def _commands(compiler: list[str], folder: Path) -> Iterator[tuple[Path, list[list[str]]]]:
    """Files that may be made, and the commands that compile and link each: with torch's own OpenMP,
    as a second one would bring threads of its own, else for one thread."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))[:1]
    part = str(folder / "part.o")
    ways = ([["-fopenmp"], libraries], [[], []])[not libraries :]
    for i, tuned in enumerate(_TUNED):
        for openmp in ways:
            made = folder / f"{i}{len(openmp[0])}.so"  # what is loaded once is not loaded anew
            compiling = [*compiler, *_FLAGS, *tuned, *openmp[0], "-c", str(SOURCE), "-o", part]
            linking = [*compiler, "-shared", part, *map(str, openmp[1]), "-o", str(made)]
            yield made, [compiling, linking]


def _tried(path: Path) -> Kernels | None:
    """The kernels in a file, None where it does not load or they compute something else."""
    try:
        kernels = Kernels(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None
    return kernels if _is_right(kernels) else None


def _is_right(kernels: Kernels) -> bool:
    """All of them against float64, and in products each number of rows that has code of its own
    against the rows of many."""
    drawn = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float32, device="cpu")

    products = (_multiplies(kernels, draw, small) for small in (True, False))
    return all(products) and _attends(kernels, draw) and _goes_by_rows(kernels, draw)


def _near(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-4)


def _multiplies(kernels: Kernels, draw: Callable[..., Tensor], small: bool) -> bool:
    """small: of bfloat16 numbers"""
    x, matrix, add = draw(17, 64), draw(3 * kernels.panel - 1, 64), draw(17, 3 * kernels.panel - 1)
    matrix = matrix.bfloat16().float() if small else matrix
    panels = Panels(kernels, matrix)
    every = panels(x, add)
    few = (panels(x[:n], add[:n]).equal(every[:n]) for n in range(1, 8))
    return _near(every, x.double() @ matrix.double().t() + add) and all(few)


def _attends(kernels: Kernels, draw: Callable[..., Tensor]) -> bool:
    rows, queries, heads, key_heads, dim, keys = 2, 3, 4, 2, kernels.panel + 8, kernels.panel + 3
    q, k, v = draw(rows, queries, heads, dim), *(draw(rows, key_heads, keys, dim) for _ in "kv")
    mask = draw(rows, 1, queries, keys).relu() * torch.finfo(torch.float32).min
    mask[..., 0] = 0
    sizes = Sizes(
        rows, queries, heads, key_heads, dim, keys, heads * dim, *k.stride()[:3], *v.stride()[:3],
        queries * keys, keys, dim**-0.5,
    )  # fmt: skip
    found = kernels.attention(q, k, v, mask, sizes).view(q.shape)
    k, v = (x.double().repeat_interleave(heads // key_heads, 1) for x in (k, v))
    scores = q.double().transpose(1, 2) @ k.transpose(2, 3) * sizes.scale + mask
    return _near(found, (scores.softmax(-1) @ v).transpose(1, 2))


def _goes_by_rows(kernels: Kernels, draw: Callable[..., Tensor]) -> bool:
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
