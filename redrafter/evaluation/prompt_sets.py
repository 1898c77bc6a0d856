"""Ways of decoding on one set of prompts at one temperature, and on several of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module

from redrafter.config import SpeedConfig, TableConfig
from redrafter.contracts import InputError
from redrafter.evaluation import charts
from redrafter.evaluation.methods import build_method, rows_at_a_time
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.pictures import save_pictures
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
from redrafter.evaluation.report import (
    described_prompts,
    engine_table,
    markdown,
    n_rows,
    read_result,
    table,
    with_interval,
    write_result,
)
from redrafter.evaluation.speed import decoding, make_batches, measure_speed
from redrafter.evaluation.votes import told
from redrafter.files import write_text
from redrafter.targets.model import Target

# ---------------------------------------------------------------------------------------- one set


def check(config: SpeedConfig) -> None:
    """Raises InputError naming a number that makes no sense."""
    counts = ("batch_size", "samples_per_prompt", "repeats", "cost_rounds", "bigram_prompts")
    for name in counts:
        if getattr(config, name) < 1:
            raise InputError(f"{name}: {getattr(config, name)} must be at least 1")
    if config.temperature < 0:
        raise InputError(f"temperature: {config.temperature} is negative")


def measure(
    config: SpeedConfig, names: Sequence[str], target: Target, head: Module | None
) -> dict[str, Any]:
    """All figures of one prompt set and temperature. names: from `parse_methods`"""
    more = prompts_to_count(names, config)
    prompts, others, left_out = evaluation_prompts(target, config, more)
    resources, counted_on = load_resources(names, config, target, head, others, decoding(config))
    methods = [build_method(name, target, decoding(config), resources) for name in names]
    batches, answers = make_batches(target, [p.ids for p in prompts], config)
    body = measure_speed(target, methods, batches, answers, config)
    body["warnings"] += left_out
    if counted_on is not None:
        body["bigram_counted_on"] = counted_on
    warning = head and holdout_warning(head.name_or_path, config.prompts, prompts[0].row)
    if warning:
        body["warnings"].append(warning)
    return body


_LEGEND = """\
tokens/step: per forward of the target. x: speed of whole generations, over model.generate (stock)
and over the best plain loop. bound: the latter as the measured costs allow it with these tokens per
step; efficiency: the part of it that was reached. = plain: texts equal to plain's. The last column:
where the time after the prefill went."""


def show(body: dict[str, Any]) -> str:
    """One line per method, then what they have in common."""
    columns = ["method", "tokens/step", "x stock", "x best plain", "in CPU time", "bound",
               "efficiency", "= plain", "draft/verify/other"]  # fmt: skip
    rows = []
    for name, m in body["methods"].items():

        def shown(key: str, m: dict[str, Any] = m) -> str:
            return with_interval(m.get(key), m["low"].get(key), m["high"].get(key))

        equal = f"{m['equal_rows']}/{n_rows(body)}"
        seconds = m["seconds"]
        parts = [seconds.get(part) for part in ("draft", "verify", "other")]
        decode = seconds["total"] - seconds.get("prefill", 0.0)
        shares = "-" if None in parts else "/".join(f"{100 * p / decode:.0f}" for p in parts) + " %"
        rows.append(
            [name, shown("tokens_per_step") if m["steps"] is not None else 1.0,
             shown("speedup_stock"), shown("speedup_plain"), shown("cpu_speedup_plain"),
             m["bound"], m["efficiency"], f"({equal})" if m["law_only"] else equal, shares]
        )  # fmt: skip
    lines = [table(columns, rows), ""]
    columns, rows = engine_table(body)
    lines += [table(columns, rows), ""] if rows else []
    exact = {True: "yes", False: "NO: `redrafter lossless` says why", None: "nothing drafted"}
    share = body["loop_share"]
    lines.append(
        f"exact: {exact[body['exact']]}; loop share of plain text: "
        f"{'-' if share is None else f'{share:.2f}'}; best plain loop: {body['best_plain']}; "
        f"temperature {body['temperature']:g}, batch {body['batch_size']}, "
        f"{described_prompts(body)}; intervals: 95 % bootstrap over prompts"
    )
    overhead = body["methods"].get("plain", {}).get("plain_overhead")
    if overhead is not None:
        lines.append(f"plain takes {overhead:.3f} x its bare target forwards")
    if any(m["law_only"] for m in body["methods"].values()):
        lines.append("(in brackets): sampled by a rule of its own: plain's law, but another text")
    if "bigram_counted_on" in body:
        lines.append(f"bigrams counted on: {body['bigram_counted_on']}")
    lines += told(body)
    return "\n".join([*lines, "", _LEGEND, *(f"warning: {w}" for w in body["warnings"])])


# ----------------------------------------------------------------------------------- several sets


def settings(config: TableConfig) -> dict[str, SpeedConfig]:
    """What eval/speed.py would be asked for, per prompt set, number of samples and temperature."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(TableConfig)}
    own = {"methods", "out", "samples_per_prompt"}
    values = {name: getattr(config, name) for name in shared - own}
    found = {}
    for name in config.sets:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"sets: {name!r} must be letters, digits, - and _: files bear it")
    parts = itertools.product(config.sets.items(), config.samples_per_prompt, config.temperatures)
    for (name, prompts), samples, temperature in parts:
        many = samples > 1
        found[f"{name}{f', N = {samples}' * many}, T = {temperature:g}"] = SpeedConfig(
            **values,
            prompts=prompts,
            samples_per_prompt=samples,
            temperature=temperature,
            methods=",".join(config.methods),
            out=str(Path(config.out) / f"{name}{f'-n{samples}' * many}-t{temperature:g}.json"),
        )
    return found


def largest(sets: Mapping[str, SpeedConfig]) -> SpeedConfig:
    """The part that decodes the most rows at a time."""
    return max(sets.values(), key=rows_at_a_time)


def measure_all(
    sets: Mapping[str, SpeedConfig], names: Sequence[str], target: Target, head: Module | None
) -> dict[str, dict[str, Any]]:
    """{title: result} of what `settings` found; what is not there yet is measured and written."""
    bodies = {}
    for title, config in sets.items():
        file = Path(config.out)
        body = read_result(file, config, target.fingerprint(), "eval/table.py")
        if body is None:
            print(f"{title}: {len(names)} methods, {config.n_prompts} prompts", flush=True)
            write_result(config.out, config, target, measure(config, names, target, head), head)
            body = json.loads(file.read_text(encoding="utf-8"))
        bodies[title] = body
    return bodies


def write_table(out: Path, bodies: Mapping[str, dict[str, Any]]) -> None:
    """OUT/table.md and the pictures; prints the table."""
    text = "\n\n".join(markdown(title, body) for title, body in bodies.items()) + "\n"
    write_text(out / "table.md", text)
    print(text)
    drawn = {
        "speedup": charts.speedup_chart,
        "tokens": charts.tokens_chart,
        "acceptance": charts.acceptance_chart,
    }
    save_pictures({out / name: partial(draw, bodies) for name, draw in drawn.items()})
