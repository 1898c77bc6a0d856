"""The parts of a head's report, from the files beside it. Where one is missing, the command that
makes it stands in its place."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from redrafter.evaluation.report import (
    described_prompts,
    measured_by,
    measured_on,
    milliseconds,
    n_rows,
    with_interval,
)
from redrafter.hub.card import METRICS, compared, verdict
from redrafter.hub.run import Result, Run
from redrafter.report.curves import measured, read_logs
from redrafter.report.page import charts, facts, missing, paragraph, table
from redrafter.report.svg import bars, lines

_GIVEN = "--target.path MODEL --head {run} --prompts PROMPTS.jsonl"


def _filled(command: str, run: Run) -> str:
    return command.format(run=shlex.quote(str(run.folder)))


def about(run: Run) -> str:
    """What stands above everything: what the head is, and what was measured in a line each."""
    config, made = run.head.config, run.facts
    weights = sum(p.numel() for p in run.head.parameters())
    dtype = str(run.head.dtype).removeprefix("torch.")
    rows = [
        ("target", run.target.name),
        ("head", f"{run.head.kind}, {weights:,} weights in {dtype}, "
         + run.head.described().replace("`", "")),
        ("trained for", f"drafts of {config.trained_depth} tokens" if config.trained_depth else
         "a depth that was not recorded"),
        ("fingerprints", f"target {config.target_fingerprint or 'not recorded'}, head "
         f"{run.head.fingerprint()}"),
    ]  # fmt: skip
    if versions := made.get("versions"):
        rows.append(("trained with", ", ".join(f"{k} {v}" for k, v in versions.items())))
    if commit := made.get("git_commit"):
        rows.append(("commit", commit))
    found = [
        f"<li><strong>{with_interval(m['tokens_per_step'], None, None)} tokens per step</strong>, "
        f"{with_interval(m['speedup_plain'], None, None)} x the best plain loop: "
        f"<code>{escape(name)}</code> on {escape(result.title)} "
        f"({escape(_measured(result))})</li>"
        for result in run.speeds for name, m in result.of_head().items()
    ]  # fmt: skip
    return facts(rows) + (f"<ul>{''.join(found)}</ul>" if found else "")


def _measured(result: Result) -> str:
    made = result.body["provenance"]
    return f"{measured_on(made)}, {measured_by(made)}"


# ----------------------------------------------------------------------------------- speed


def speed(run: Run) -> str:
    if not run.speeds:
        command = f"redrafter speed {_GIVEN} --out {{run}}/speed.json"
        return missing("No speed was measured on this head.", _filled(command, run))
    return "".join(_speed_of(result) for result in run.speeds)


def _speed_of(result: Result) -> str:
    body = result.body
    rows, bounds = [], {}
    for name, m in body["methods"].items():
        tau, stock, plain = (
            with_interval(m[key], m["low"].get(key), m["high"].get(key)) for key in METRICS
        )
        equal = f"{m['equal_rows']}/{n_rows(body)}"
        rows.append([name, tau, stock, plain, f"({equal})" if m["law_only"] else equal])
        if m.get("bound") is not None:
            bounds[name] = m["bound"]
    pictures = charts(
        bars("tokens per step", _barred(body, "tokens_per_step")),
        bars("decoding speed / best plain loop (red: what the costs allow)",
             _barred(body, "decode_speedup_plain"), line=1.0, marks=bounds),
    )  # fmt: skip
    columns = ["method", "tokens/step", "x model.generate", "x best plain loop", "= plain"]
    caption = (
        f"{described_prompts(body)} of up to {result.config['max_new_tokens']} new tokens; "
        f"{_measured(result)}; best plain loop "
        f"{body['best_plain']}; intervals: 95 % bootstrap over prompts; = plain: rows whose text "
        "is plain decoding's (in brackets: plain's law, another text); share of the plain text "
        f"that repeats itself: {with_interval(body['loop_share'], None, None)}."
    )
    warned = "".join(paragraph(text, "warning") for text in body["warnings"])
    name = f"{result.title} ({result.name})"
    return f"<h3>{escape(name)}</h3>{pictures}{table(columns, rows, name)}" + (
        paragraph(caption, "note") + warned
    )


def _barred(body: Mapping[str, Any], key: str) -> list[tuple[str, float, Any, Any]]:
    return [
        (name, m[key], m["low"].get(key), m["high"].get(key))
        for name, m in body["methods"].items() if m.get(key) is not None
    ]  # fmt: skip


# ------------------------------------------------------------------------------ acceptance


def acceptance(run: Run, judged: Sequence[Result]) -> str:
    """judged: what eval/acceptance.py measured"""
    pictures, rows = [], []
    for result in run.speeds:
        found = {
            name: m["acceptance"]["unconditional"]
            for name, m in result.body["methods"].items() if "acceptance" in m
        }  # fmt: skip
        curves = {
            name: [(k, rate) for k, rate in enumerate(rates, 1) if rate is not None]
            for name, rates in found.items()
        }
        pictures.append(lines(f"accepted to depth k, {result.title}", "depth k", curves))
        rows += [
            [name, result.title, " ".join("-" if r is None else f"{r:.3f}" for r in rates)]
            for name, rates in found.items()
        ]
    parts = [charts(*pictures)]
    if rows:
        parts.append(table(["method", "prompts", "accepted to depth 1, 2, ..."], rows, "by depth"))
        parts.append(paragraph("Share of the steps that drafted at least k levels whose first k "
                               "were all accepted.", "note"))  # fmt: skip
    command = f"redrafter acceptance {_GIVEN} --methods head --out {{run}}/acceptance.json"
    if judged:
        parts += [_judged(result) for result in judged]
    else:
        parts.append(missing("What is accepted beside what any rule could accept was not measured.",
                             _filled(command, run)))  # fmt: skip
    return "".join(parts)


def _judged(result: Result) -> str:
    keys = ("tokens_per_step", "accepted", "overlap", "optimum")
    rows = [
        [name, *(with_interval(*(m[key] or (None, None, None)), 3) for key in keys)]
        for name, m in result.body["methods"].items()
    ]
    columns = ["method", "tokens/step", "accepted", "1 - TV", "optimum"]
    note = (
        f"{result.name}, {result.prompts}, {measured_on(result.body['provenance'])}. accepted: of "
        "the levels that were tested; 1 - TV, optimum: what one draw is accepted with, and the "
        "most that any rule accepts."
    )
    return table(columns, rows, result.name) + paragraph(note, "note")


# ----------------------------------------------------------------------------------- costs


def costs(run: Run, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """tables: name of a file -> what eval/costs.py wrote, or the costs of a measured speed"""
    pictures, rows = [], []
    for name, body in tables.items():
        pictures.append(_grows(name, body))
    for result in run.speeds:
        for name, m in result.body["methods"].items():
            if (part := m.get("bound_parts")) is None:
                continue
            rows.append([
                name, result.title, f"{part['nodes']:.0f}", milliseconds(part["t_1_s"]),
                milliseconds(part["t_n_s"]), milliseconds(part["draft_s"]),
                with_interval(m["bound"], None, None), with_interval(m["efficiency"], None, None),
            ])  # fmt: skip
    parts = [charts(*pictures)]
    if rows:
        columns = ["method", "prompts", "nodes N", "t(1) ms", "t(N) ms", "draft ms", "bound",
                   "efficiency"]  # fmt: skip
        note = (
            "t(n): a forward of the target with n new tokens; bound: tokens per step x t(1) / "
            "(draft + t(N)), the most that these costs allow; efficiency: speed after the prefill "
            "/ bound."
        )
        parts += [table(columns, rows, "costs and bounds"), paragraph(note, "note")]
    if not any(name.startswith("costs") for name in tables):
        command = "redrafter costs --target.path MODEL --head {run} --out {run}/costs.json"
        parts.append(missing("The cost table was not measured at length.",
                             _filled(command, run)))  # fmt: skip
    return "".join(parts)


def _grows(name: str, body: Mapping[str, Any]) -> str:
    """t(n) in milliseconds, a line per context and batch."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in body["target"]:
        key = f"context {entry['context']}, batch {entry['batch']}"
        curves.setdefault(key, []).append((entry["n"], 1e3 * entry["cost"]["median_s"]))
    return lines(f"forward of n new tokens, ms ({name})", "n", curves)


# ------------------------------------------------------------------- exactness, training


def exactness(run: Run) -> str:
    if not run.proofs:
        command = f"redrafter lossless {_GIVEN} --out {{run}}/lossless.json"
        said = "Whether drafting changes a token was not checked on this head."
        return missing(said, _filled(command, run))
    rows = [[str(cell).strip("`") for cell in row] for row in compared(run)]
    columns = ["method", "mode", "prompts", "batches", "tokens compared", "near-ties",
               "unexplained"]  # fmt: skip
    kind = "warning" if any(row[-1] != "0" for row in rows) else ""
    return paragraph(verdict(run).strip("*"), kind) + table(columns, rows, "tokens compared")


def training(run: Run) -> str:
    logs = read_logs(run.folder, ("train/loss", "train/top_1"))
    history, step = run.facts.get("history") or [], run.facts.get("step")
    tau = measured(history, "tokens_per_step")
    pictures = charts(
        lines("tokens per step, held-out prompts", "optimiser steps", tau, False, step),
        lines("loss", "optimiser steps", {"loss": logs.get("train/loss", [])}, False, step),
        lines("first choice right, while training", "optimiser steps",
              {"top 1": logs.get("train/top_1", [])}, False, step),
    )  # fmt: skip
    if not pictures:
        command = "redrafter train --target.path MODEL --data.source.path PROMPTS.jsonl"
        said = "The folder tells nothing of a training: no provenance.json with a history, no logs."
        return missing(said, f"{command} --output_dir RUN")
    note = f"Dotted: step {step}, whose head this is." if step is not None else ""
    return pictures + (paragraph(note, "note") if note else "")
