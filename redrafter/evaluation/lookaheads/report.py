"""Tables and pictures of `eval/lookahead.py`. A case is one drafter on one set of prompts at one
temperature: what `lookaheads.summary` made of it, and where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter.evaluation.lookaheads.cases import Case
from redrafter.evaluation.pictures import new_figure, save_pictures
from redrafter.evaluation.report import markdown_table, measured_by, measured_on, with_interval
from redrafter.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Bodies = Mapping[str, Mapping[str, Any]]  # title -> body

# -------------------------------------------------------------------------------------- tables

COLUMNS = (
    "lookahead", "tokens/step", "levels/step", "drafted tokens", "target forwards",
    "draft forwards", "tokens/s, clock", "tokens/s, forward costs", "x best static, clock",
    "x best static, forward costs", "of the oracle's gain", "lookahead's time", "= plain",
)  # fmt: skip


def markdown(title: str, body: Mapping[str, Any]) -> str:
    """One case as a table with what has to be said of it."""
    rows = []
    for label, m in body["methods"].items():
        mark = " (best static)" if label == body["best_static"] else ""
        share = m["lookahead_share"]
        rows.append([
            label + mark,
            _interval(m, "tokens_per_step"),
            f"{m['levels_per_step']:.2f}",
            str(m["drafted_tokens"]),
            str(m["target_forwards"]),
            str(m["draft_forwards"]),
            _interval(m, "clock_tokens_per_second", 1),
            _interval(m, "cost_tokens_per_second", 1),
            _interval(m, "clock_ratio", 3),
            _interval(m, "cost_ratio", 3),
            _interval(m, "cost_share") if "cost_share" in m else "-",
            "-" if share is None else f"{100 * share:.1f} %",
            "-" if m["equal_rows"] is None else f"{m['equal_rows']}/{body['n_prompts']}",
        ])  # fmt: skip
    facts, file = body["provenance"], body.get("priced_by")
    measured = f"as measured in {file}" if file else "as measured in the same run"
    return "\n".join([
        f"## {title}", "", markdown_table(COLUMNS, rows), "",
        f"`{body['drafter']}`, {body['n_prompts']} prompts. {says_best(body)} Intervals: 95 % "
        "bootstrap over prompts, of ratios and shares on the same prompts for both sides. "
        "Forward costs: of every step, the forward over the tree that was verified, the start of "
        f"the draft and the levels drafted, {measured}, without the lookahead's "
        "own time; share of the oracle's gain by them. Clock: after the prefill. "
        f"{measured_on(facts)}, {measured_by(facts)}.",
        *(f"\nWarning: {warning}" for warning in body["warnings"]),
    ])  # fmt: skip


def _interval(m: Mapping[str, Any], key: str, digits: int = 2) -> str:
    return with_interval(m[key], m["low"].get(key), m["high"].get(key), digits)


def says_best(body: Mapping[str, Any]) -> str:
    """Which static length was best, and plainly where it is none at all."""
    methods, best = body["methods"], body["best_static"]
    by_clock = body["best_static_by_clock"]
    if methods[best]["static"] == 0:
        said = "Do not speculate here: no static length is faster than plain decoding"
        if (drafting := body["best_drafting"]) is not None:
            loses = 100 * (1 - methods[drafting]["cost_ratio"])
            said += f" by forward costs; the best, {drafting}, is {loses:.1f} % slower"
        return said + "." + ("" if by_clock == best else f" By the clock, {by_clock} is best.")
    said = f"Best static length in hindsight, by forward costs: {methods[best]['static']}"
    if methods[by_clock]["static"] == 0:
        return said + "; by the clock plain decoding is faster: do not speculate here."
    return said + (". By the clock too." if by_clock == best else f"; by the clock: {by_clock}.")


def overview(bodies: Bodies) -> str:
    """All cases in one table: the ratios to the best static length, by forward costs."""
    labels = list(dict.fromkeys(
        label for body in bodies.values() for label, m in body["methods"].items()
        if m["static"] is None
    ))  # fmt: skip
    rows = []
    for title, body in bodies.items():
        cells = [title, body["best_static"]]
        for label in labels:
            m = body["methods"].get(label)
            share = None if m is None else m.get("cost_share")
            gained = "" if share is None else f", {100 * share:.0f} %"
            cells.append("-" if m is None else _interval(m, "cost_ratio", 3) + gained)
        rows.append(cells)
    return markdown_table(["", "best static", *labels], rows) + (
        "\n\nTokens per second by forward costs, over the best static length in hindsight, 95 % "
        "paired bootstrap over prompts; and the share of the oracle's gain."
    )


# ------------------------------------------------------------------------------------ pictures


def steps_chart(title: str, body: Mapping[str, Any]) -> Figure:
    """Levels verified along one answer: the oracle's in grey, others over them. At the positions
    of the answer, since lookaheads that accept differently step at different places."""
    others = [name for name in body["shown"] if name != body["oracle"]]
    figure = new_figure(9.0, 0.8 + 1.7 * max(1, len(others)))
    panels = figure.subplots(max(1, len(others)), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    figure.suptitle(title, fontsize="medium")
    for axes, name in zip(panels, others or [None], strict=True):
        if body["oracle"] is not None:
            known = body["shown"][body["oracle"]]
            axes.bar([s["position"] for s in known], [s["drafted"] for s in known],
                     color="lightgray", label=body["oracle"])  # fmt: skip
        if name is not None:
            steps = body["shown"][name]
            at = [s["position"] for s in steps]
            axes.step(at, [s["drafted"] for s in steps], where="post", linewidth=0.8,
                      marker=".", label=f"{name}: drafted")  # fmt: skip
            axes.plot(at, [s["accepted"] for s in steps], "x", markersize=4, label="accepted")
        axes.set_ylabel("levels")
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1].set_xlabel("tokens of the answer before the step")
    return figure


def lengths_chart(bodies: Bodies) -> Figure | None:
    """Distribution of the oracle's lengths, a panel per case; None where no case has an oracle."""
    known = {title: body for title, body in bodies.items() if body["oracle"] is not None}
    if not known:
        return None

    def draw(axes: Axes, body: Mapping[str, Any]) -> None:
        counts = body["verified"][body["oracle"]]
        total = max(1, sum(counts))
        axes.bar(range(len(counts)), [count / total for count in counts])
        axes.set_xticks(range(0, len(counts), 1 + len(counts) // 10))
        mean = sum(k * count for k, count in enumerate(counts)) / total
        axes.axvline(mean, color="black", linewidth=0.8, linestyle=":")

    return _grid(known, draw, "levels that the oracle drafts (dotted: mean)", "share of steps")


def reliability_chart(bodies: Bodies) -> Figure | None:
    """Predicted against observed, of every lookahead that predicts; None where none does."""
    known = {title: body for title, body in bodies.items() if body["reliability"]}
    if not known:
        return None

    def draw(axes: Axes, body: Mapping[str, Any]) -> None:
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        for name, found in body["reliability"].items():
            bins = found["bins"]
            label = name if found["ece"] is None else f"{name}, ECE {found['ece']:.3f}"
            axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins],
                      marker=".", linewidth=1.0, label=label)  # fmt: skip
        axes.legend(fontsize=6)

    return _grid(known, draw, "predicted chance of acceptance", "observed")


def ratio_chart(bodies: Bodies) -> Figure:
    """A bar per lookahead and case: speed over the best static length, by forward costs; the
    circle is the clock's."""
    labels = list(dict.fromkeys(
        label for body in bodies.values() for label, m in body["methods"].items()
        if m["static"] is None
    ))  # fmt: skip
    figure = new_figure(7.5, 1.0 + len(bodies) * (0.25 + 0.14 * len(labels)))
    axes = figure.subplots()
    height = 0.8 / max(1, len(labels))
    for i, label in enumerate(labels):
        for y, body in enumerate(bodies.values()):
            m = body["methods"].get(label)
            if m is None or m["cost_ratio"] is None:
                continue
            place, value = y - 0.4 + (i + 0.5) * height, m["cost_ratio"]
            ends = [m[side].get("cost_ratio", value) for side in ("low", "high")]
            first = label not in axes.get_legend_handles_labels()[1]
            axes.barh(place, value - 1, left=1, height=0.9 * height, color=f"C{i % 10}",
                      label=label if first else None)  # fmt: skip
            axes.plot(ends, [place, place], color="black", linewidth=0.8)
            if m["clock_ratio"] is not None:
                axes.plot([m["clock_ratio"]], [place], "o", color="black", fillstyle="none",
                          markersize=3)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bodies)), list(bodies))
    axes.set_ylim(len(bodies) - 0.5, -0.5)
    axes.set_xlabel("tokens per second / best static length (bars: forward costs; circles: clock)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _grid(bodies: Bodies, draw, x: str, y: str) -> Figure:
    """A panel per case, at most four in a line."""
    across = min(4, len(bodies))
    down = -(-len(bodies) // across)
    figure = new_figure(0.6 + 2.8 * across, 0.6 + 2.4 * down)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axes in panels[len(bodies) :]:
        axes.set_visible(False)
    for axes, (title, body) in zip(panels, bodies.items(), strict=False):
        axes.set_title(title, fontsize="small")
        draw(axes, body)
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")
    return figure


# ------------------------------------------------------------------------------------- the report


def write_report(out: Path, cases: Sequence[Case], bodies: Bodies) -> None:
    """OUT/table.md and the pictures of all cases; prints the table."""
    tables = [overview(bodies), *(markdown(title, body) for title, body in bodies.items())]
    text = "\n\n".join(tables) + "\n"
    write_text(out / "table.md", text)
    print(text)
    pictures = {
        out / "ratio": partial(ratio_chart, bodies),
        out / "lengths": partial(lengths_chart, bodies),
        out / "reliability": partial(reliability_chart, bodies),
    }
    for case in cases:
        draw = partial(steps_chart, case.title, bodies[case.title])
        pictures[out / f"steps-{case.file.stem}"] = draw
    save_pictures(pictures)
