"""What `target.dtype auto` computes in.

On a CPU that is float32, for most have no fast products in half precision. Those with matrix units
for bfloat16 (AMX, AVX512-BF16) are the exception that makes drafting pay: there, verifying 17
tokens costs little more than reading the weights, of which bfloat16 has half. Those with
AVX512-BF16 alone multiply it in pairs, by the library's kernels (`products.py`). Whether it is so
is measured, not believed: some such units are slower than plain float32 at these sizes, or
emulated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from redrafter.contracts import InputError
from redrafter.processes import launched
from redrafter.products import PackedProduct, has_matrix_units

ROWS = 17  # of a 4x4 tree: what drafting verifies at once
#: part of float32's time below which bfloat16 is taken: far from 1, so that a noisy clock decides
#: nothing, and the same machine decides alike every time
DECISIVE = 0.75
_MOST = 4096  # rows and columns of the measured matrix


def auto_dtype(device: torch.device, config: Callable[[], Any]) -> torch.dtype | None:
    """The dtype to compute in; None: the checkpoint's own.

    config: gives the model's configuration, asked for only where it matters
    What a measurement chose is said on stderr. Several processes, which might measure differently,
    take float32 on CPUs.
    """
    if device.type != "cpu":
        return None
    if launched() > 1 or not has_matrix_units():
        return torch.float32
    whole = config()
    shape = whole.get_text_config()
    # Weights of another dtype would be rounded, and the target would be another one.
    if (getattr(whole, "dtype", None) or getattr(shape, "dtype", None)) != torch.bfloat16:
        return torch.float32
    hidden = getattr(shape, "hidden_size", 1024)
    inner = getattr(shape, "intermediate_size", None)
    ratio = measured_ratio(hidden, inner if isinstance(inner, int) else 4 * hidden)
    chosen = torch.bfloat16 if ratio < DECISIVE else torch.float32
    print(
        f"target.dtype auto: {str(chosen).removeprefix('torch.')}, as this CPU multiplies {ROWS} "
        f"rows in bfloat16 in {ratio:.2f} of float32's time (it pays below {DECISIVE:g}); set "
        "target.dtype to have one on every machine",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return chosen


def measured_ratio(hidden: int, inner: int) -> float:
    """Time of a product of 17 rows with a layer's matrix, bfloat16 over float32; medians of
    interleaved calls, tens of milliseconds in all."""
    rows = torch.randn(ROWS, min(hidden, _MOST)).bfloat16()
    matrix = torch.randn(min(inner, _MOST), rows.shape[1]).bfloat16()
    with torch.inference_mode(False):
        pairs = [(rows, PackedProduct(matrix)), (rows.float(), PackedProduct(matrix.float()))]
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for turn in range(8):
            for found, (rows, product) in zip(times, pairs, strict=True):
                begin = time.perf_counter()
                product(rows)
                if turn:  # the first one sets up
                    found.append(time.perf_counter() - begin)
    half, full = (sorted(found)[len(found) // 2] for found in times)
    return half / full


def widen_logits(target: Any) -> None:
    """From now on its last product is computed, and its logits are kept, in float32. Does nothing
    where they are that wide already. Takes 4 x V x H bytes; none where the library's kernels
    multiply, which sum in float32 anyway."""
    if target.dtype.itemsize >= 4:
        return
    product = target.lm_product
    if product is not None and product.kernels is not None:
        target.wide_head = product
        return
    head = target.lm_head
    if type(head) is not nn.Linear:
        raise InputError(
            f"target.logits float32: {target.name} has an lm_head of class {type(head).__name__}, "
            "which is not known to be a plain product; leave it at own"
        )
    with torch.device("meta"):
        wide = nn.Linear(target.hidden_size, target.vocab_size, head.bias is not None)
    weights = {k: nn.Parameter(v.float(), False) for k, v in head.named_parameters()}
    wide.load_state_dict(weights, assign=True)
    target.wide_head = wide.requires_grad_(False)
