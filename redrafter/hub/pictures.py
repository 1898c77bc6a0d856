"""Pictures of a model card, from what was measured.

They have a white ground of their own: whatever page they stand on, light or dark, they read alike.
(Two pictures and a `<picture>` that chooses would follow the reader's system, and not the page.)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter.contracts import InputError
from redrafter.evaluation.charts import acceptance_chart, speedup_chart
from redrafter.evaluation.pictures import new_figure, save_figure
from redrafter.hub.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PANELS = 4  # wider ones cannot be read in a card


def training_curve(history: list[dict[str, Any]], published: int | None) -> Figure:
    """Tokens per step by optimiser step, a line per way of decoding. history: of provenance.json;
    published: the step whose head is exported"""
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    for name in history[0]["tokens_per_step"]:
        axes.plot(steps, [h["tokens_per_step"][name] for h in history], marker=".", label=name)
    if published is not None:
        axes.axvline(published, color="black", linestyle=":", linewidth=1, label="published")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("tokens per step, held-out prompts")
    axes.grid(color="0.9")
    axes.legend()
    return figure


def card_pictures(run: Run) -> dict[str, dict[str, bytes]]:
    """{name: {"png": content, "svg": content}} of all that there are figures for.

    Raises InputError without matplotlib.
    """
    figures = {}
    history = run.facts.get("history") or []
    if len(history) > 1:
        figures["training"] = training_curve(history, run.facts.get("step"))
    if run.speeds:
        bodies = {result.title.replace(", ", "\n", 1): result.body for result in run.speeds}
        bodies = dict(list(bodies.items())[:MAX_PANELS])
        same = len({tuple(body["methods"]) for body in bodies.values()}) == 1
        if same:  # the panels share their rows
            figures["speedup"] = speedup_chart(bodies)
        if any("acceptance" in m for body in bodies.values() for m in body["methods"].values()):
            figures["acceptance"] = acceptance_chart(bodies)
    if not figures:
        return {}
    return {name: _drawn(figure) for name, figure in figures.items()}


def _drawn(figure: Figure) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        paths = save_figure(figure, Path(folder) / "picture")
        return {path.suffix[1:]: path.read_bytes() for path in paths}


def pictures_or_none(run: Run) -> dict[str, dict[str, bytes]] | None:
    """None where there would be pictures and matplotlib is not installed."""
    try:
        return card_pictures(run)
    except InputError:
        return None
