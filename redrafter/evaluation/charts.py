"""Pictures of `eval/table.py`: a panel per prompt set and temperature, a line per method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from redrafter.evaluation.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bodies = Mapping[str, Mapping[str, Any]]  # setting -> what `measure_speed` returned


def _bars(bodies: Bodies, key: str, label: str, mark: Callable[[dict], Any] | None) -> Figure:
    """A bar per method with its interval. mark: of a method's figures, where a tick stands."""
    names = list(next(iter(bodies.values()))["methods"])
    figure = new_figure(1.2 + 3.4 * len(bodies), 1.2 + 0.28 * len(names))
    panels = figure.subplots(1, len(bodies), squeeze=False, sharey=True)[0]
    for axes, (setting, body) in zip(panels, bodies.items(), strict=True):
        axes.set_title(setting)
        for y, name in enumerate(names):
            m = body["methods"][name]
            value = m.get(key)
            if value is None:
                continue
            low, high = m["low"].get(key, value), m["high"].get(key, value)
            axes.barh(y, value, color="tab:blue" if name not in ("stock", "plain") else "tab:gray")
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            if mark is not None and (place := mark(m)) is not None:
                axes.plot([place], [y], marker="|", color="tab:red", markersize=9)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(label, fontsize="medium")
    return figure


def tokens_chart(bodies: Bodies) -> Figure:
    """Tokens per step."""
    return _bars(bodies, "tokens_per_step", "tokens per step", None)


def speedup_chart(bodies: Bodies) -> Figure:
    """Speed of the decoding phase over the best plain loop; the tick is the bound."""
    label = "decoding speed / best plain loop (red: bound)"
    return _bars(bodies, "decode_speedup_plain", label, lambda m: m.get("bound"))


def acceptance_chart(bodies: Bodies) -> Figure:
    """Share of the steps that drafted at least k levels whose first k were all accepted."""
    figure = new_figure(2.6 + 3.4 * len(bodies), 4.2)
    panels = figure.subplots(1, len(bodies), squeeze=False, sharey=True)[0]
    for axes, (setting, body) in zip(panels, bodies.items(), strict=True):
        axes.set_title(setting)
        drafting = {n: m["acceptance"] for n, m in body["methods"].items() if "acceptance" in m}
        for i, (name, rates) in enumerate(drafting.items()):
            points = [(k, r) for k, r in enumerate(rates["unconditional"], 1) if r is not None]
            style = ("-", "--", ":", "-.")[i // 10 % 4]  # ten colours are told apart
            axes.plot(*zip(*points, strict=True), style, marker=".", label=name) if points else None
        axes.set_xlabel("depth k")
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("accepted up to depth k")
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
