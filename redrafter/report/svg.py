"""Charts as SVG that stands in a page: its colours are the page's, light or dark.

They are as wide as a telephone, so that their letters can be read there; a wider page shows
several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_W, _H = 360, 230  # of a chart of lines, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 34
_ROW = 36  # of a bar with its name
N_COLOURS = 6


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About n round numbers (1, 2 or 5 times a power of ten apart) between the two."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if raw <= k * power * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    label: str,
    x_label: str,
    series: Mapping[str, Points],
    from_zero: bool = True,
    mark: float | None = None,
) -> str:
    """A line per name, points marked. label: what y is, also the picture's name for those who do
    not see it; from_zero: y begins there; mark: an x to draw a line at. Empty without points."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    left, right = min(xs), max(xs)
    bottom, top = (0.0 if from_zero else min(ys)), max(ys)
    top = bottom + 1.0 if top <= bottom else top + 0.05 * (top - bottom)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - bottom) / (top - bottom)
        return (_LEFT + across * (_W - _LEFT - _RIGHT), _H - _BOTTOM - up * (_H - _TOP - _BOTTOM))

    parts = [*_axes(at, ticks(left, right), ticks(bottom, top), (left, right), x_label)]
    if mark is not None and left <= mark <= right:
        x = at(mark, bottom)[0]
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_H - _BOTTOM}"/>'
        )
    for i, points in enumerate(series.values()):
        placed = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed[:60])
        dots = dots if len(placed) <= 60 else ""
        parts.append(f'<g class="line c{i % N_COLOURS}"><polyline points="{path}"/>{dots}</g>')
    return _figure(label, parts, _H, list(series))


def _axes(at, x_ticks, y_ticks, ends: tuple[float, float], x_label: str) -> list[str]:
    found = []
    for y in y_ticks:
        height = at(ends[0], y)[1]
        found.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{height:.1f}" '
                     f'y2="{height:.1f}"/><text x="{_LEFT - 6}" y="{height + 4:.1f}" '
                     f'text-anchor="end">{y:.6g}</text>')  # fmt: skip
    for x in x_ticks:
        place = at(x, y_ticks[0])[0]
        found.append(f'<text x="{place:.1f}" y="{_H - _BOTTOM + 15}" text-anchor="middle">'
                     f'{short(x)}</text>')  # fmt: skip
    middle = (_LEFT + _W - _RIGHT) / 2
    found.append(f'<text x="{middle}" y="{_H - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return found


def short(x: float) -> str:
    """ "20k" of 20000."""
    return f"{x / 1000:g}k" if x >= 10_000 and x % 100 == 0 else f"{x:g}"


def bars(
    label: str,
    rows: Sequence[tuple[str, float, float | None, float | None]],
    line: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """A bar per row, its name above it. rows: (name, value, low, high), the interval's ends or
    None; line: a value to draw a line at; marks: of a name, a value to mark. Empty without rows."""
    if not rows:
        return ""
    marks = marks or {}
    ends = [v for _, value, _, high in rows for v in (value, high) if v is not None]
    most = 1.05 * max([*ends, *marks.values(), line or 0.0, 1e-9])

    def across(value: float) -> float:
        return 4 + value / most * (_W - 60)

    parts, height = [], _ROW * len(rows) + 6
    for i, (name, value, low, high) in enumerate(rows):
        y = _ROW * i + 4
        own = f"{value:.2f}"
        parts.append(f'<text x="4" y="{y + 11}">{escape(name)}</text>')
        width = across(value) - 4
        parts.append(f'<rect class="bar" x="4" y="{y + 15}" width="{width:.1f}" height="12"/>')
        end = across(value)
        if low is not None and high is not None:
            end = max(end, across(high))
            parts.append(f'<line class="interval" x1="{across(low):.1f}" x2="{across(high):.1f}" '
                         f'y1="{y + 21}" y2="{y + 21}"/>')  # fmt: skip
        if name in marks:
            x = across(marks[name])
            end = max(end, x)
            parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 13}" '
                         f'y2="{y + 29}"/>')  # fmt: skip
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 25}">{own}</text>')
    if line is not None:
        x = across(line)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return _figure(label, parts, height, [])


def _figure(label: str, parts: Sequence[str], height: int, names: Sequence[str]) -> str:
    legend = ""
    if len(names) > 1:
        items = "".join(
            f'<li><i class="c{i % N_COLOURS}"></i>{escape(name)}</li>'
            for i, name in enumerate(names)
        )
        legend = f'<ul class="legend">{items}</ul>'
    said = escape(label, quote=True)
    return (
        f"<figure><figcaption>{escape(label)}</figcaption>"
        f'<svg viewBox="0 0 {_W} {height}" role="img" aria-label="{said}">{"".join(parts)}</svg>'
        f"{legend}</figure>"
    )
