"""Which draft of fixed size pays best on a device, predicted: W nodes on each of K levels, and so
N = 1 + W K nodes to verify.

The first K levels of a tree are the tree of depth K. So one walk of a width over known texts, at
full depth, says at every position how many levels would be accepted; from that every depth is
simulated exactly. What a step costs is measured part by part. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import GenerationConfig

from redrafter.contracts import Drafter
from redrafter.drafters.profile import StepCosts
from redrafter.evaluation.figures import bootstrap
from redrafter.evaluation.pictures import new_figure
from redrafter.evaluation.report import table, with_interval
from redrafter.records.make import walk_texts
from redrafter.targets.model import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """One configuration. width, depth 0: plain decoding.

    nodes: N; tokens_per_step: simulated; step_s: seconds by the costs
    tokens_per_s: predicted, of the phase after the prefill; measured: the same, by the clock
    """

    width: int
    depth: int
    nodes: int
    tokens_per_step: float
    step_s: float
    tokens_per_s: float
    measured: float | None = None

    @property
    def name(self) -> str:
        return f"{self.width}x{self.depth}" if self.depth else "plain"


# -------------------------------------------------------------------------------- acceptance


def accepted_depths(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    batch_size: int = 8,
) -> list[list[int]]:
    """Per text, for each position where a step may begin (behind the first token of the answer, the
    second, ..., the last but one), how many levels of the drafter's tree the text goes along.

    config, seeds: as for `plain`, whose texts these are
    """
    found: list[list[int]] = []
    for i in range(0, len(prompts), batch_size):
        end = i + batch_size
        texts = walk_texts(target, drafter, prompts[i:end], config, seeds[i:end])
        found += [text.accepted.tolist() for text in texts]
    return found


def n_steps(accepted: Sequence[int], depth: int) -> int:
    """Steps that decoding a text takes with drafts of `depth` levels. accepted: of its positions"""
    at = steps = 0
    while at < len(accepted):
        at += min(depth, accepted[at]) + 1
        steps += 1
    return steps


# -------------------------------------------------------------------------------- prediction


def predict(
    accepted: dict[int, list[list[int]]],
    costs: dict[int, StepCosts],
    max_depth: int,
    measured: dict[str, float] | None = None,
) -> list[Cell]:
    """Plain decoding, then every width and depth.

    accepted, costs: per width, of trees of depth `max_depth`; costs: of one row at a time
    measured: tokens per second of each configuration by its name, to be put beside
    """
    first = next(iter(costs.values()))
    cells = [Cell(0, 0, 1, 1.0, first.plain_s, 1.0 / first.plain_s)]
    for width, texts in accepted.items():
        tokens = sum(map(len, texts))
        for depth in range(1, max_depth + 1):
            tau = tokens / sum(n_steps(text, depth) for text in texts)
            nodes = 1 + width * depth
            step_s = costs[width].step_s(depth, nodes)
            cells.append(Cell(width, depth, nodes, tau, step_s, tau / step_s))
    return [replace(c, measured=measured[c.name]) for c in cells] if measured else cells


def best(cells: Sequence[Cell]) -> Cell:
    """The fastest that drafts; the fewer nodes where two are equal."""
    drafting = sorted((c for c in cells if c.depth), key=lambda c: (c.nodes, c.depth))
    return max(drafting, key=lambda c: c.tokens_per_s)


# ------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Clocked:
    """Of one configuration, per prompt: tokens and seconds of the phase after the prefill."""

    tokens: list[float]
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(self.tokens) / sum(self.seconds)


def compare(cells: Sequence[Cell], clocked: dict[str, Clocked]) -> dict[str, Any]:
    """The prediction beside the clock. cells: with `measured`; clocked: by their names.

    Returns the names of the predicted and the measured best; what the first loses against the
    second as a share, [value, low, high] (95 %, bootstrap over prompts); the median, lowest and
    highest error of a prediction, predicted / measured - 1; whether the measured best beats plain
    decoding.
    """
    drafting = [c for c in cells if c.depth]
    chosen, fastest = best(cells), max(drafting, key=lambda c: c.measured)
    own, other = clocked[chosen.name], clocked[fastest.name]

    def loss(tokens, seconds, best_tokens, best_seconds):
        rate, best_rate = (
            t.sum(-1) / s.sum(-1) for t, s in ((tokens, seconds), (best_tokens, best_seconds))
        )
        return 1.0 - rate / best_rate

    error = [c.tokens_per_s / c.measured - 1.0 for c in drafting]
    return {
        "predicted_best": chosen.name,
        "measured_best": fastest.name,
        "loss": list(bootstrap(loss, own.tokens, own.seconds, other.tokens, other.seconds)),
        "error": {"median": float(np.median(error)), "low": min(error), "high": max(error)},
        "speculation_pays": fastest.measured > cells[0].measured,
    }


# ------------------------------------------------------------------------------------ report


def show(cells: Sequence[Cell], what: str, comparison: dict[str, Any] | None = None) -> str:
    """A table of all configurations, then what to use. what: the drafter's kind"""
    plain, chosen = cells[0], best(cells)
    columns = ["W x K", "N", "tokens/step", "step ms", "tokens/s", "x plain"]
    if comparison:
        columns += ["measured", "x plain", "error"]
    lines = []
    for cell in cells:
        line = [cell.name, cell.nodes, cell.tokens_per_step, 1e3 * cell.step_s,
                f"{cell.tokens_per_s:.1f}", cell.tokens_per_s / plain.tokens_per_s]  # fmt: skip
        if comparison:
            error = 100 * (cell.tokens_per_s / cell.measured - 1)
            line += [f"{cell.measured:.1f}", cell.measured / plain.measured, f"{error:+.1f} %"]
        lines.append(line)
    said = [table(columns, lines), ""]
    gain = chosen.tokens_per_s / plain.tokens_per_s
    size = f"{what}:{chosen.name} (W = {chosen.width}, K = {chosen.depth}, N = {chosen.nodes})"
    if gain > 1:
        said.append(f"predicted best: {size}, {gain:.2f} x plain decoding")
    else:
        said.append(
            f"do not speculate here: the best that drafts, {size}, is predicted at {gain:.2f} x "
            "plain decoding"
        )
    if comparison:
        value, low, high = (100 * x for x in comparison["loss"])
        said.append(
            f"measured best: {what}:{comparison['measured_best']}; the predicted best is slower by "
            f"{with_interval(value, low, high, 1)} %"
        )
        if not comparison["speculation_pays"]:
            said.append("measured: no configuration beats plain decoding")
    return "\n".join(said)


def static_map(cells: Sequence[Cell], title: str) -> Figure:
    """Heat maps of tokens per second over plain decoding's, predicted and, where there are such,
    measured; the best of each in a frame."""
    widths, depths = (
        list(dict.fromkeys(getattr(c, key) for c in cells if c.depth)) for key in ("width", "depth")
    )
    kinds = {"predicted": "tokens_per_s", "measured": "measured"}
    if cells[0].measured is None:
        del kinds["measured"]
    figure = new_figure(1.2 + len(kinds) * (0.9 + 0.55 * len(depths)), 1.3 + 0.45 * len(widths))
    figure.suptitle(title)
    values = {
        kind: np.array([
            [getattr(_at(cells, w, k), field) / getattr(cells[0], field) for k in depths]
            for w in widths
        ])
        for kind, field in kinds.items()
    }  # fmt: skip
    low, high = (f(v for map_ in values.values() for v in map_.flat) for f in (min, max))
    grid, image = figure.subplots(1, len(kinds), squeeze=False)[0], None
    for axes, (kind, ratio) in zip(grid, values.items(), strict=True):
        image = axes.imshow(ratio, cmap="viridis", vmin=low, vmax=max(high, low + 0.01))
        axes.set_aspect("auto")
        axes.set_title(kind)
        axes.set_xticks(range(len(depths)), [str(k) for k in depths])
        axes.set_yticks(range(len(widths)), [str(w) for w in widths])
        axes.set_xlabel("K, levels")
        axes.set_ylabel("W, nodes per level")
        top = np.unravel_index(ratio.argmax(), ratio.shape)
        for (y, x), value in np.ndenumerate(ratio):
            color = "white" if image.norm(value) < 0.6 else "black"
            weight = "bold" if (y, x) == top else "normal"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, weight=weight)
        frame = {"fill": False, "edgecolor": "red", "linewidth": 2.0}
        axes.add_patch(_rectangle(top[1] - 0.5, top[0] - 0.5, **frame))
    figure.colorbar(image, ax=list(grid), label="tokens/s over plain decoding")
    return figure


def _at(cells: Sequence[Cell], width: int, depth: int) -> Cell:
    return next(c for c in cells if (c.width, c.depth) == (width, depth))


def _rectangle(x: float, y: float, **style: Any):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, **style)
