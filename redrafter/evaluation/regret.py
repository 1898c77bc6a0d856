"""What a selector loses against the best arm, prompt by prompt.

All texts are equal, so losses are seconds: of the selector minus those of the arm that was fastest
over the whole stream (the best fixed arm in hindsight). The fastest arm of every part of the stream
is beside it: a selector that follows a change of domain can beat the best fixed one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from redrafter.evaluation.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def regret(
    seconds: Mapping[str, Sequence[float]], arms: Sequence[str], parts: Sequence[int]
) -> dict[str, Any]:
    """seconds: per method, of every prompt in the order of the stream; arms: those that are not
    selectors; parts: prompts of each part of the stream, in order.

    Returns per method `total_s` and `regret_s` (cumulative, per prompt, against the best arm), and
    per part its fastest arm and the seconds of all.
    """
    times = {name: np.asarray(row, dtype=float) for name, row in seconds.items()}
    best = min(arms, key=lambda name: times[name].sum())
    ends = np.cumsum([0, *parts])
    by_part = []
    for start, end in itertools.pairwise(ends):
        spent = {name: float(row[start:end].sum()) for name, row in times.items()}
        by_part.append({"prompts": int(end - start), "seconds": spent,
                        "best_arm": min(arms, key=spent.__getitem__)})  # fmt: skip
    oracle = sum(part["seconds"][part["best_arm"]] for part in by_part)
    return {
        "best_arm": best,
        "best_per_part_s": oracle,
        "parts": by_part,
        "methods": {
            name: {
                "total_s": float(row.sum()),
                "regret_s": np.cumsum(row - times[best]).round(4).tolist(),
                "regret_share": float((row.sum() - times[best].sum()) / times[best].sum()),
            }
            for name, row in times.items()
        },
    }


def regret_chart(body: Mapping[str, Any]) -> Figure:
    """Cumulative seconds lost against the best fixed arm; a line where the domain changes."""
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for name, m in body["methods"].items():
        arm = name in body["arms"]
        axes.plot(range(1, 1 + len(m["regret_s"])), m["regret_s"], label=name,
                  linestyle="--" if arm else "-", linewidth=1.0 if arm else 2.0)  # fmt: skip
    end = 0
    for part in body["parts"][:-1]:
        end += part["prompts"]
        axes.axvline(end + 0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("prompts")
    axes.set_ylabel(f"seconds lost against {body['best_arm']}")
    axes.legend(fontsize=7)
    return figure
