"""What a selector loses against the best arm, prompt by prompt.

All texts are equal, so losses are seconds: of the selector minus those of the arm that was fastest
over the whole stream (the best fixed arm in hindsight). The fastest arm of every part of the stream
is beside it: a selector that follows a change of domain can beat the best fixed one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn import Module

from redrafter.config import RegretConfig, SpeedConfig
from redrafter.evaluation.methods import build_method, check_resources, parse_methods
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.pictures import new_figure
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.evaluation.report import table
from redrafter.evaluation.runs import Timing
from redrafter.evaluation.speed import decoding, make_batches, run_interleaved
from redrafter.targets.model import Target

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


# ------------------------------------------------------------------------------- the experiment


def methods_of(config: RegretConfig) -> tuple[list[str], dict[str, str]]:
    """(the arms, policy -> the selector of that policy over all arms). Raises InputError for a name
    that is none, and for an option that one lacks."""
    arms = parse_methods(",".join(config.arms))
    members = ",".join(arms)
    selectors = {policy: _selector(members, policy) for policy in config.policies}
    check_resources(parse_methods(",".join([*arms, *selectors.values()])), config)
    return arms, selectors


def _selector(members: str, policy: str) -> str:
    """`ucb:exploration=0.2` -> `select(...):policy=ucb:exploration=0.2`."""
    return f"select({members}):policy={policy}"


def _speed_config(config: RegretConfig, file: str) -> SpeedConfig:
    """What eval/speed.py would be asked for, on one file of the stream."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(RegretConfig)}
    values = {name: getattr(config, name) for name in shared - {"out"}}
    return replace(SpeedConfig(prompts=file, **values), methods="plain")


def measure(
    config: RegretConfig,
    arms: Sequence[str],
    selectors: Mapping[str, str],
    target: Target,
    head: Module | None,
) -> dict[str, Any]:
    """Decode the stream with every arm and selector, interleaved. arms, selectors: `methods_of`"""
    names = list(dict.fromkeys([*arms, *selectors.values()]))
    files = [_speed_config(config, file) for file in config.stream]
    rows, others, warnings = [], [], []
    for file in files:
        used, more, left_out = evaluation_prompts(target, file, prompts_to_count(names, file))
        rows.append([p.ids for p in used])
        others += more
        warnings += left_out
    wanted = decoding(files[0])
    resources, _ = load_resources(names, files[0], target, head, others, wanted)
    methods = [build_method(name, target, wanted, resources) for name in names]
    batches, answers = make_batches(target, [ids for of_file in rows for ids in of_file], files[0])
    for method in methods[: len(arms)]:  # warm, without teaching the selectors anything
        method.prepare(batches[0])
        method.run(batches[0])
    runs = run_interleaved(methods, batches)
    seconds = {name: Timing(run).total_s.tolist() for name, run in runs.items()}
    return {
        **regret(seconds, arms, [len(of_file) for of_file in rows]),
        "arms": arms,
        "warnings": warnings,
        "n_prompts": len(answers),
        "equal": {
            name: sum(r[0].tokens[0] == a for r, a in zip(run, answers, strict=True))
            for name, run in runs.items()
        },
        "choices": {
            policy: [r[0].report for r in runs[name]] for policy, name in selectors.items()
        },
    }


def show(body: dict[str, Any]) -> str:
    """One line per method, then the best arms."""
    columns = ["method", "seconds", *(f"part {i}" for i in range(1, 1 + len(body["parts"]))),
               "regret", "= plain"]  # fmt: skip
    rows = [
        [name, m["total_s"], *(part["seconds"][name] for part in body["parts"]),
         f"{100 * m['regret_share']:+.1f} %", f"{body['equal'][name]}/{body['n_prompts']}"]
        for name, m in body["methods"].items()
    ]  # fmt: skip
    best = ", ".join(part["best_arm"] for part in body["parts"])
    return "\n".join([
        table(columns, rows), "",
        f"best fixed arm in hindsight: {body['best_arm']}; of each part: {best} "
        f"({body['best_per_part_s']:.2f} s together)",
        *(f"warning: {said}" for said in body["warnings"]),
    ])  # fmt: skip
