"""Figures of results. matplotlib is optional and only imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redrafter.contracts import InputError
from redrafter.files import write_bytes
from redrafter.targets.devices import device_name
from redrafter.targets.inflation import said
from redrafter.targets.model import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from redrafter.evaluation.slowdown import Slowdown


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that belongs to no window. Raises InputError without matplotlib: call it
    before long work."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "figures need matplotlib: pip install matplotlib, or leave the plot out"
        ) from None
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def title_of(target: Target, *what: str) -> str:
    """Of a picture: the target, what else there is to say, and the device."""
    name = target.name.rstrip("/").split("/")[-1]
    name += " (inflated)" if said(target.config) else ""
    return f"{', '.join([name, *what])} on {device_name(target.device)}"


def save_figure(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write PATH.png and PATH.svg, each whole or not at all. The same figure gives the same bytes.

    Returns the two paths.
    """
    import matplotlib

    written = []
    for suffix, without in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "redrafter"}):
            figure.savefig(content, format=suffix, dpi=150, metadata=without)
        written.append(Path(f"{path_without_suffix}.{suffix}"))
        write_bytes(written[-1], content.getvalue())
    return written


def save_pictures(drawings: Mapping[Path, Callable[[], Figure | None]]) -> None:
    """Pictures that go beside a table: without matplotlib it stands alone, and that is said.

    drawings: path without suffix -> what draws it; None where there is nothing to draw
    """
    try:
        new_figure(1, 1)
    except InputError:
        print("no pictures: they need matplotlib (pip install matplotlib)")
        return
    for path, draw in drawings.items():
        if (figure := draw()) is not None:
            save_figure(figure, path)


def slowdown_map(cells: Sequence[Slowdown], title: str) -> Figure:
    """Heat maps of s(k, w): a line of them per context, k rows to the left, the tree to the right.
    All have one scale, from 1."""
    contexts = list(dict.fromkeys(cell.context for cell in cells))
    ks, ws = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in "kw")
    figure = new_figure(2 * (1.8 + 0.6 * len(ws)), 0.8 + len(contexts) * (1.2 + 0.35 * len(ks)))
    figure.suptitle(title)
    grid = figure.subplots(len(contexts), 2, squeeze=False)
    highest = max(max(cell.rows, cell.tree) for cell in cells)
    image = None
    for context, pair in zip(contexts, grid, strict=True):
        here = {(cell.k, cell.w): cell for cell in cells if cell.context == context}
        for axes, kind, name in zip(pair, ("rows", "tree"), ("k rows", "one tree"), strict=True):
            values = [[getattr(here[k, w], kind) for w in ws] for k in ks]
            image = axes.imshow(values, cmap="viridis", vmin=1.0, vmax=max(highest, 1.01))
            axes.set_aspect("auto")
            axes.set_title(f"{name}, context {context}")
            axes.set_xticks(range(len(ws)), [str(w) for w in ws])
            axes.set_yticks(range(len(ks)), [str(k) for k in ks])
            axes.set_xlabel("w, guesses per row")
            axes.set_ylabel("k, rows")
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    dark = image.norm(value) < 0.6
                    color = "white" if dark else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=grid, label="time of a forward / time of one new token")
    return figure
