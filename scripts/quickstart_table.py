#!/usr/bin/env python
"""What eval/speed.py measured, one file a temperature, in one small table with a legend.

python scripts/quickstart_table.py quickstart/head/speed.json quickstart/head/speed-t1.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WHAT = {
    "stock": "transformers' own generate",
    "plain": "our loop, one token a step",
    "lookup": "copies what followed last time",
    "head": "the head that was trained",
}
_LOOPS = 0.3  # of a text that repeats itself; a reader should be told
_LEGEND = """\
tokens/step: tokens per forward of the target; 1 is no gain. speed: over the best plain loop, whole
generations by the clock, with a 95 % interval. T 0 is greedy, T 1 samples; the text is plain's in
both. loops: the share of plain's text whose last four tokens had occurred in this order before."""
_LOOPING = """\
At T {temperatures} the target, which is very small, repeats itself: there copying is hard to beat,
and a head gains less than on text that says something new (docs/drafters.md)."""


def show(bodies: Sequence[dict[str, Any]]) -> str:
    """The table. bodies: of `measure_speed`, by the same methods."""
    names = list(bodies[0]["methods"])
    rows = [["", *(part for b in bodies for part in (f"T {b['temperature']:g}", ""))]]
    rows.append(["method", *["tokens/step", "speed"] * len(bodies), ""])
    for name in names:
        cells = [name]
        for body in bodies:
            m = body["methods"][name]
            low, high = (m[end].get("speedup_plain") for end in ("low", "high"))
            interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
            rate = "1.00" if m["steps"] is None else f"{m['tokens_per_step']:.2f}"
            cells += [rate, f"{m['speedup_plain']:.2f}x{interval}"]
        rows.append([*cells, _WHAT.get(name, "")])
    shares = [body["loop_share"] or 0.0 for body in bodies]
    rows.append(["loops", *(part for share in shares for part in (f"{share:.2f}", "")), ""])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[1]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
    lines.insert(2, "  ".join("-" * w for w in widths[:-1]))
    lines += ["", _LEGEND]
    looping = [f"{b['temperature']:g}" for b, s in zip(bodies, shares, strict=True) if s > _LOOPS]
    if looping:
        lines.append(_LOOPING.format(temperatures=" and ".join(looping)))
    return "\n".join(lines)


def main(paths: Sequence[str]) -> int:
    print(show([json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
