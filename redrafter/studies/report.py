"""A study's table: every row's figures over its seeds, beside those of plain decoding, floor and
ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redrafter.evaluation.figures import bootstrap, median, pooled
from redrafter.evaluation.pictures import new_figure, save_pictures
from redrafter.evaluation.report import markdown_table, measured_on, milliseconds, with_interval
from redrafter.files import plain_values, write_json, write_text
from redrafter.heads.base import DraftHead
from redrafter.planning.speed import context_bytes_read, level_bytes_read
from redrafter.studies.measure import method_name
from redrafter.studies.train import Row, Run, chosen
from redrafter.targets.model import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bodies = Mapping[float, dict[str, Any]]  # temperature -> what `measure_heads` returned


def study(
    rows: Sequence[Row],
    runs: Mapping[str, list[Run]],
    heads: Mapping[str, DraftHead],
    target: Target,
    bodies: Bodies,
    depth: int,
    against: Sequence[str] = (),
) -> dict[str, Any]:
    """By row what it is and what it measured, ready for JSON. depth: levels that are drafted;
    against: rows that all are compared with, () for the first"""
    names = {row.name: [method_name(row.name, s) for s in row.seeds] for row in rows}
    others = {name: names[name] for name in against or (rows[0].name,)}
    found = {}
    for row in rows:
        head = heads[names[row.name][0]]
        found[row.name] = {
            "kind": head.kind,
            "options": row.config.head.options,
            "parameters": row.parameters,
            "bytes_per_level": level_bytes_read(head, target, depth),
            "bytes_per_step": context_bytes_read(head),
            "steps": row.config.optim.steps,
            "learning_rate": chosen(runs[row.name])[0].lr,
            "seeds": list(row.seeds),
            "validation": [
                {"lr": run.lr, "seed": run.seed, "tokens_per_step": run.validation}
                for run in runs[row.name]
            ],
            "measured": {
                f"{t:g}": figures_of(body, names[row.name], others) for t, body in bodies.items()
            },
        }
    beside = [n for n in next(iter(bodies.values()))["methods"] if n not in heads]
    return {
        "rows": found,
        "against": list(others),
        "beside": {
            n: {f"{t:g}": figures_of(body, [n], {}) for t, body in bodies.items()} for n in beside
        },
        "n_prompts": {f"{t:g}": body["n_prompts"] for t, body in bodies.items()},
        "warnings": {f"{t:g}": body["warnings"] for t, body in bodies.items()},
    }


def figures_of(
    body: dict[str, Any], names: Sequence[str], against: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Of one row at one temperature; [value, low, high] by a bootstrap over prompts, seeds pooled
    within each prompt. names: of its seeds; against: row that it is compared with -> of its seeds
    """
    methods = [body["methods"][name] for name in names]
    out: dict[str, Any] = {"per_seed": [m["tokens_per_step"] for m in methods]}
    if methods[0]["steps"] is None:  # stock: a token a step
        return out | {"tokens_per_step": None, "speedup_plain": _speedup(body, names)}
    own = _counts(body, names)
    out["tokens_per_step"] = bootstrap(pooled, *own)
    out["over"] = {
        row: bootstrap(_ratio, *own, *_counts(body, theirs)) for row, theirs in against.items()
    }
    out["speedup_plain"] = _speedup(body, names)
    bounds = [m["bound"] for m in methods]
    out["bound"] = None if None in bounds else float(np.mean(bounds))
    out["equal_share"] = float(np.mean([m["equal_share"] for m in methods]))
    if "acceptance" in methods[0]:
        rates = [m["acceptance"]["unconditional"] for m in methods]
        out["acceptance"] = [float(np.mean(of_depth)) for of_depth in zip(*rates, strict=True)]
        costs = [entry for entry in body["costs"]["drafters"] if entry["name"] in names]
        levels = [[level["q1_s"] for level in entry["levels"]] for entry in costs]
        out["level_s"] = float(np.mean(levels)) if levels and levels[0] else None
        once = [entry["rest"]["q1_s"] for entry in costs if entry.get("rest")]
        out["once_s"] = float(np.mean(once)) if once else None
    return out


def _counts(body: dict[str, Any], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens after the prefill's own, steps) by prompt, over all seeds."""
    each = [body["per_prompt"][name] for name in names]
    tokens = sum(np.array(e["tokens"]) - 1 for e in each)
    return tokens, sum(np.array(e["steps"]) for e in each)


def _ratio(tokens, steps, first_tokens, first_steps):
    return pooled(tokens, steps) / pooled(first_tokens, first_steps)


def _speedup(body: dict[str, Any], names: Sequence[str]) -> tuple[float, float, float] | None:
    """Median over prompts of the speed over the best plain loop's, seeds averaged in each."""
    if (base := body["best_plain"]) is None:
        return None
    rates = [_rate(body["per_prompt"][name]) for name in names]
    return bootstrap(median, np.mean(rates, axis=0) / _rate(body["per_prompt"][base]))


def _rate(of_method: dict[str, Any]) -> np.ndarray:
    return np.array(of_method["tokens"]) / np.array(of_method["seconds"])


# ------------------------------------------------------------------------------------ the table


def markdown(title: str, found: dict[str, Any], facts: dict[str, Any]) -> str:
    """A table for each temperature. found: of `study`; facts: a result's provenance"""
    texts = [f"# {title}", "", _heads(found)]
    for t, n in found["n_prompts"].items():
        texts += ["", f"## Temperature {t}", "", _measured(found, t), "", f"{n} prompts."]
        texts += [f"Warning: {warning}" for warning in found["warnings"][t]]
    against, temperatures = found["against"], len(found["n_prompts"])
    pairs = {frozenset((row, other)) for row in found["rows"] for other in against if row != other}
    n = len(pairs) * temperatures
    texts += [
        "",
        "Intervals: 95 % bootstrap over prompts, seeds pooled within each; `/ row`: tokens per "
        "step over that row's on the same prompts; of each seed: lowest and highest. With "
        f"{n} comparisons (each row with {' and with '.join(against)}, at {temperatures} "
        f"temperature{'s' * (temperatures > 1)}) at 95 % each, {n * 0.05:.1f} would "
        "miss their interval by chance alone: a lone interval that just leaves out 1 says little. "
        "Intervals know of prompts, not of the few seeds. "
        f"{measured_on(facts)}, commit {str(facts.get('git_commit'))[:10]}.",
    ]
    return "\n".join(texts) + "\n"


def _heads(found: dict[str, Any]) -> str:
    columns = ["row", "kind", "parameters", "KiB read per level", "once a step", "steps",
               "learning rate (tried)", "seeds", "validation"]  # fmt: skip
    rows = []
    for name, row in found["rows"].items():
        tried = list(dict.fromkeys(run["lr"] for run in row["validation"]))
        own = [run["tokens_per_step"] for run in row["validation"]
               if run["seed"] == row["seeds"][0]]  # fmt: skip
        rows.append([
            f"`{name}`", row["kind"], f"{row['parameters']:,}",
            f"{row['bytes_per_level'] / 1024:,.0f}", f"{row['bytes_per_step'] / 1024:,.0f}",
            row["steps"],
            f"{row['learning_rate']:g} ({', '.join(f'{lr:g}' for lr in tried)})",
            len(row["seeds"]), ", ".join(f"{v:.2f}" for v in own),
        ])  # fmt: skip
    return markdown_table(columns, rows)


def _measured(found: dict[str, Any], t: str) -> str:
    against = found["against"]
    columns = ["row", "tokens/step", "of each seed", *(f"/ {name}" for name in against),
               "accepted to depth 1, 2, ...", "level ms", "once a step", "x best plain", "bound",
               "= plain"]  # fmt: skip
    every = {f"`{name}`": row["measured"][t] for name, row in found["rows"].items()}
    every |= {f"`{name}`": measured[t] for name, measured in found["beside"].items()}
    rows = []
    for name, m in every.items():
        low, high = min(m["per_seed"]), max(m["per_seed"])
        rows.append([
            name,
            with_interval(*(m["tokens_per_step"] or (1.0, None, None))),
            f"{low:.2f}-{high:.2f}" if len(m["per_seed"]) > 1 else "-",
            *(with_interval(*m.get("over", {}).get(n, (None, None, None))) for n in against),
            " ".join(f"{rate:.2f}" for rate in m.get("acceptance", [])) or "-",
            milliseconds(m.get("level_s")),
            milliseconds(m.get("once_s")),
            with_interval(*(m["speedup_plain"] or (None, None, None))),
            f"{m['bound']:.2f}" if m.get("bound") else "-",
            f"{m['equal_share']:.0%}" if "equal_share" in m else "-",
        ])  # fmt: skip
    return markdown_table(columns, rows)


def chart(found: dict[str, Any]) -> Figure:
    """Tokens per step of every row with its interval, its seeds, and floor and ceiling."""
    names, temperatures = list(found["rows"]), list(found["n_prompts"])
    figure = new_figure(1.8 + 3.4 * len(temperatures), 1.2 + 0.32 * len(names))
    panels = figure.subplots(1, len(temperatures), squeeze=False, sharey=True)[0]
    for axes, t in zip(panels, temperatures, strict=True):
        axes.set_title(f"T = {t}")
        for y, name in enumerate(names):
            m = found["rows"][name]["measured"][t]
            value, low, high = m["tokens_per_step"]
            axes.barh(y, value, color="tab:blue" if y else "tab:cyan")
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            axes.plot(m["per_seed"], [y] * len(m["per_seed"]), "o", color="tab:red", markersize=3)
        for name, measured in found["beside"].items():
            if measured[t].get("acceptance") and measured[t]["tokens_per_step"]:
                axes.axvline(measured[t]["tokens_per_step"][0], color="gray", linestyle=":")
                axes.text(measured[t]["tokens_per_step"][0], -0.55, name, fontsize=6, ha="center")
        axes.set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.8)
    figure.supxlabel("tokens per step (bars: 95 % over prompts; dots: seeds)", fontsize="medium")
    return figure


def write(out: Path, found: dict[str, Any], bodies: Bodies, target: Target) -> None:
    """OUT/table.md, OUT/rows.json and the picture; prints the table."""
    facts = next(iter(bodies.values()))["provenance"]
    text = markdown(f"Heads for {target.name.rstrip('/').split('/')[-1]}", found, facts)
    write_text(out / "table.md", text)
    write_json(out / "rows.json", plain_values({**found, "provenance": facts}))
    print(text)
    save_pictures({out / "tokens": partial(chart, found)})
