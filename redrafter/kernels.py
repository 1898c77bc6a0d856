"""What a forward of few rows is made of, and a draft, by kernels of our own in float32 on a CPU
(csrc/).

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
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from redrafter.files import cache_folder, digest_file, write_bytes, write_text
from redrafter.kernel_trial import is_right

#: environment variable that leaves the kernels out where it is `off`
SWITCH = "REDRAFTER_KERNELS"
#: one unit, kernels.c, which includes the others
SOURCES = Path(__file__).with_name("csrc")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC")
#: for this processor; the second is how some compilers want it said
_TUNED = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_S = 60
_CHECKED = 1 << 10  # rows of a matrix that are looked at together: it may be as large as memory
#: kinds of entries, as products.c has them
PAIRS, HALVES, FLOATS = 1, 2, 4
_NO_MEMORY = 2
_DIGEST = ".sha256"
#: multiplications below which one thread is enough
_SMALL = 1 << 18


class Sizes(ctypes.Structure):
    """Of one attention, as attention.c has it (strides in entries, those of k and v of `bytes`)."""

    _fields_ = [
        *((name, ctypes.c_long) for name in (
            "rows", "queries", "heads", "key_heads", "dim", "keys", "q_stride", "k_row", "k_head",
            "k_key", "v_row", "v_head", "v_key", "mask_row", "mask_query",
        )), ("scale", ctypes.c_float), ("bytes", ctypes.c_int),
    ]  # fmt: skip


class Step(ctypes.Structure):
    """One of several maps in one call, as products.c has it; see `Kernels.take`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "add", "onto", "at", "y")),
        *((name, ctypes.c_long) for name in (
            "inputs", "out", "x_stride", "y_stride", "known", "each",
        )), *((name, ctypes.c_int) for name in ("kind", "silu", "threads")),
    ]  # fmt: skip


class Kernels:
    """The compiled functions, for contiguous float32 tensors on the CPU where nothing else is said.

    panel: outputs of a product that lie together; threads: whether they can use several; pairs:
    whether the processor multiplies bfloat16 in pairs
    """

    sizes, small = Sizes, _SMALL

    def __init__(self, library: ctypes.CDLL):
        place, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        takes = {
            "product": [
                place, place, number, place, size, place, number, place, size, size, size, number,
            ],
            "take_steps": [place, size, size],
            "pass_layers": [place, place, place],
            "attention": [place, place, place, place, place, place, number],
            "rms_norm": [place, place, ctypes.c_float, place, size, size, number],
            "silu_gated": [place, place, size, size, number],
            "rotate": [place, size, place, size, place, place, place, size, size, size],
            "best_children": [place, place, place, place, place, size, size, size, size, number],
        }
        for name, arguments in takes.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
            setattr(self, f"_{name}", function)
        failing = "product", "take_steps", "pass_layers", "attention", "rotate"
        for name in failing:
            getattr(library, name).restype = number
        library.panel_width.restype = size
        self.panel, self.threads = library.panel_width(), bool(library.has_threads())
        self.pairs = bool(library.has_pairs())

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

        q: (B * N, q_stride); keys, values: (B, key heads, S, dim), by strides, float32 or bfloat16;
        mask: (B or 1, 1, N or 1, S), the dtype's minimum where nothing may be seen. Returns (B * N,
        heads * dim)
        """
        n, s = sizes.rows * sizes.queries, sizes
        s.bytes = keys.itemsize
        out = q.new_empty((n, s.heads * s.dim))
        failed = self._attention(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), mask.data_ptr(), out.data_ptr(),
            ctypes.addressof(sizes), self.threads_for(2 * n * s.heads * s.dim * s.keys),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the scores of {s.queries} queries and {s.keys} keys")
        return out

    def step(
        self, rows: int, y: int, panels: Panels | None = None, x: int = 0, *, out: int = 0,
        add: int | None = None, onto: int | None = None, silu: bool = False, each: int = 0,
        at: int | None = None, known: int = 0, x_stride: int = 0, y_stride: int = 0,
    ) -> Step:  # fmt: skip
        """For `take`: y = onto + silu(x W^T + add), or without `silu`; those are addresses.

        panels: W; None: there is no product, of `out` columns
        each: rows of x that one of add is for, 0: all; at: of int64, which of the `known` rows of
            add is for each of x; x_stride, y_stride: floats from row to row, 0: they lie together
        """
        inputs, place, kind, threads = 0, y, FLOATS, 1
        if panels is not None:
            inputs, out, place, kind = panels.width, panels.out, panels.place, panels.kind
            threads = panels.threads_for(rows)
        return Step(
            x or y, place, add, onto, at, y, inputs, out, x_stride or inputs, y_stride or out,
            known, each or rows, kind, silu, threads,
        )  # fmt: skip

    def steps(self, steps: list[Step]) -> ctypes.Array:
        """For `take`; each may be changed there."""
        return (Step * len(steps))(*steps)

    def take(self, steps: ctypes.Array, rows: int) -> None:
        """Steps one after the other, each for as many rows. Whoever lays them out answers for what
        they read and write. Raises IndexError where a row is to be added that is not known."""
        failed = self._take_steps(ctypes.addressof(steps), len(steps), rows)
        if failed == _NO_MEMORY:
            raise MemoryError(f"no memory for {rows} rows in bfloat16")
        if failed:
            raise IndexError(f"a token is none of {max(step.known for step in steps)}")

    def pass_layers(self, decoder: ctypes.Structure, layers: ctypes.Array, x: Tensor) -> None:
        """See layers.c; whoever lays them out answers for what they read and write. Raises
        IndexError where a position has no rotation."""
        failed = self._pass_layers(
            ctypes.addressof(decoder), ctypes.addressof(layers), x.data_ptr()
        )
        if failed == _NO_MEMORY:
            raise MemoryError(f"no memory for {len(x)} rows of {len(layers)} layers")
        if failed:
            raise IndexError(f"positions are not all among {decoder.known}")

    def best_children(
        self, scores: Tensor, log_q: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best W children of each of B frontiers, in order: columns and parents (B, W) int64,
        and log-probabilities along the paths (B, W).

        scores: (B, w, V), of what follows each node, in any scale; log_q: (B, w), of the paths to
        them. Of equal ones the first parent's first column comes first; what is not a number, and
        whatever follows a node with such a score (or inf, or -inf alone), counts as -inf
        """
        batch, parents, columns = scores.shape
        scores, log_q = scores.contiguous(), log_q.contiguous()
        if log_q.numel() != batch * parents or not 1 <= width <= parents * columns:
            raise ValueError(f"{width} children of {parents} x {columns}, paths {log_q.shape}")
        tokens = torch.empty((batch, width), dtype=torch.int64, device=scores.device)
        places, values = torch.empty_like(tokens), scores.new_empty((batch, width))
        self._best_children(
            scores.data_ptr(), log_q.data_ptr(), tokens.data_ptr(), places.data_ptr(),
            values.data_ptr(), batch, parents, columns, width, self.threads_for(scores.numel()),
        )  # fmt: skip
        return tokens, places, values


class Panels:
    """A matrix W (out, in) of float32 or bfloat16 on the CPU, as `product` reads it: a copy, of two
    bytes an entry where all of them are bfloat16 numbers, as those of most checkpoints are.

    One of bfloat16 is in pairs where the processor multiplies those: x is then rounded to bfloat16,
    as it is wherever such matrices are multiplied, and sums are in float32.
    """

    def __init__(self, kernels: Kernels, matrix: Tensor):
        out, width = matrix.shape
        missing = -out % kernels.panel
        matrix = matrix.detach()
        half = matrix.dtype is torch.bfloat16
        self.kind = PAIRS if half and kernels.pairs else HALVES
        if not half and all(part.equal(part.bfloat16().float()) for part in matrix.split(_CHECKED)):
            matrix, half = matrix.bfloat16(), True
        if not half:
            self.kind = FLOATS
        odd = width % 2 if self.kind == PAIRS else 0
        padded = F.pad(matrix, (0, odd, 0, missing)) if missing or odd else matrix
        if self.kind == PAIRS:  # (panels, in / 2, panel, 2)
            panels = padded.view(-1, kernels.panel, (width + odd) // 2, 2).transpose(1, 2)
        else:
            # (panels, in, 2, panel / 2), or (panels, in, panel / 2, 2): see `load` in products.c
            order = (0, 3, 2, 1) if half else (0, 3, 1, 2)
            panels = padded.view(-1, 2, kernels.panel // 2, width).permute(order)
        self.values = panels.contiguous()
        self.place, self.bytes = self.values.data_ptr(), self.values.itemsize
        self.out, self.width = out, width
        self.product = kernels._product
        #: rows from which on several threads are worth waking, if there are any
        self.shared = _SMALL / (out * width) if kernels.threads else math.inf

    def __call__(
        self,
        x: Tensor,
        add: Tensor | None = None,
        silu: bool = False,
        onto: Tensor | None = None,
    ) -> Tensor:
        """x W^T (+ add), its SiLU if wanted (+ onto); x (..., in) -> (..., out), all float32 on the
        CPU.

        add: (..., out), one row for as many of x in turn: for all, for some, or for its own
        onto: of the result's size
        Raises ValueError where a kernel would read what is not there.
        """
        x, out, width = x.contiguous(), self.out, self.width
        rows = x.numel() // width
        result = x.new_empty((rows, out) if x.dim() == 2 else (*x.shape[:-1], out))
        place, each, onto_place = None, 1, None
        if add is not None:
            add, wanted, given = add.contiguous(), rows * out, add.numel()
            place, each = add.data_ptr(), wanted // (given or 1)
            if each * given != wanted or given % out:
                raise ValueError(f"{tuple(add.shape)} to be added to {rows} rows of {out}")
        if onto is not None:
            onto = onto.contiguous()
            onto_place = onto.data_ptr()
            if onto.numel() != rows * out:
                raise ValueError(f"{tuple(onto.shape)} to be added to {rows} rows of {out}")
        failed = self.product(
            x.data_ptr(), self.place, self.kind, place, each, onto_place, silu, result.data_ptr(),
            rows, width, out, self.threads_for(rows),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {rows} rows of {width} in bfloat16")
        return result

    def threads_for(self, rows: int) -> int:
        return torch.get_num_threads() if rows > self.shared else 1


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
    files = sorted(SOURCES.glob("*.[ch]"))
    source = [text for file in files for text in (file.name, file.read_text(encoding="utf-8"))]
    parts = (*source, platform.machine(), torch.__version__, *how, *told)
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
    source, part = str(SOURCES / "kernels.c"), str(folder / "part.o")
    ways = ([["-fopenmp"], libraries], [[], []])[not libraries :]
    for i, tuned in enumerate(_TUNED):
        for openmp in ways:
            made = folder / f"{i}{len(openmp[0])}.so"  # what is loaded once is not loaded anew
            compiling = [*compiler, *_FLAGS, *tuned, *openmp[0], "-c", source, "-o", part]
            linking = [*compiler, "-shared", part, *map(str, openmp[1]), "-lm", "-o", str(made)]
            yield made, [compiling, linking]


def _tried(path: Path) -> Kernels | None:
    """The kernels in a file, None where it does not load or they compute something else."""
    try:
        kernels = Kernels(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None
    return kernels if is_right(kernels) else None
