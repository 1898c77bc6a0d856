"""Results on the terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from redrafter.files import plain_values, provenance, write_json
from redrafter.target.model import Target, device_name


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    cells = [list(columns)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.2f}"
    return str(value)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """ "1.42 [1.35, 1.50]"."""
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def write_result(path: str | None, config: Any, target: Target, body: dict[str, Any]) -> None:
    """Write a result beside everything that it depends on; nothing where `path` is None."""
    if path is None:
        return
    facts = provenance(
        config=plain_values(config),
        target={
            "name": target.name,
            "fingerprint": target.fingerprint(),
            "dtype": str(target.dtype).removeprefix("torch."),
            "attention": getattr(target.config, "_attn_implementation", None),
        },
        device=device_name(target.device),
        threads=torch.get_num_threads(),
    )
    write_json(path, _finite(plain_values({**body, "provenance": facts})))


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no nan: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
