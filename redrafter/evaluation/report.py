"""Results on the terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from redrafter.contracts import InputError
from redrafter.evaluation.votes import told
from redrafter.files import plain_values, provenance, read_packed, write_json
from redrafter.targets.devices import device_name
from redrafter.targets.identity import computed_in
from redrafter.targets.inflation import said
from redrafter.targets.model import Target

_DEPTHS = 4  # of acceptance in a table


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    cells = [list(columns)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.2f}"
    return str(value)


def engine_table(body: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the methods that draft, in the engines' names and counting."""
    columns = ["as engines count", "drafts", "mean_acceptance_length", "draft_acceptance_rate",
               "per position"]  # fmt: skip
    rows = []
    for name, figures in body["methods"].items():
        if (found := figures.get("engine")) is not None:
            rates = " ".join(_cell(rate) for rate in found["per_position_acceptance_rate"])
            rows.append([name, found["num_drafts"], found["mean_acceptance_length"],
                         found["draft_acceptance_rate"], rates])  # fmt: skip
    return columns, rows


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def with_interval(
    value: float | None, low: float | None, high: float | None, digits: int = 2
) -> str:
    """ "1.42 [1.35, 1.50]"."""
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def n_rows(body: dict[str, Any]) -> int:
    """Of `measure_speed`'s figures: the rows that were decoded, every sample one."""
    return body["n_prompts"] * body.get("samples_per_prompt", 1)


def described_prompts(body: dict[str, Any]) -> str:
    """ "40 prompts", or "6 prompts, 4 samples of each"."""
    samples = body.get("samples_per_prompt", 1)
    return f"{body['n_prompts']} prompts" + (f", {samples} samples of each" * (samples > 1))


def markdown(title: str, body: dict[str, Any]) -> str:
    """The figures of `measure_speed` as a table in Markdown."""
    depth = min(_DEPTHS, max((len(a["unconditional"]) for m in body["methods"].values()
                              if (a := m.get("acceptance"))), default=0))  # fmt: skip
    columns = ["method", "tokens/step", *(f"depth {k}" for k in range(1, depth + 1)), "nodes",
               "draft ms", "verify ms", "bound", "x stock", "x best plain", "in CPU time",
               "efficiency", "= plain"]  # fmt: skip
    rows = []
    for name, m in body["methods"].items():
        rates = m.get("acceptance", {}).get("unconditional", [])[:depth]
        parts = m.get("bound_parts") or {}
        equal = f"{m['equal_rows']}/{n_rows(body)}"
        rows.append([
            f"`{name}`",
            with_interval(m["tokens_per_step"], m["low"].get("tokens_per_step"),
                          m["high"].get("tokens_per_step")),
            *(_cell(rate) for rate in rates + [None] * (depth - len(rates))),
            _cell(parts.get("nodes")),
            milliseconds(parts.get("draft_s")),
            milliseconds(parts.get("t_n_s")),
            _cell(m["bound"]),
            with_interval(m["speedup_stock"], m["low"].get("speedup_stock"),
                          m["high"].get("speedup_stock")),
            with_interval(m["speedup_plain"], m["low"].get("speedup_plain"),
                          m["high"].get("speedup_plain")),
            with_interval(m.get("cpu_speedup_plain"), m["low"].get("cpu_speedup_plain"),
                          m["high"].get("cpu_speedup_plain")),
            _cell(m["efficiency"]),
            f"({equal})" if m["law_only"] else equal,
        ])  # fmt: skip
    engines = engine_table(body)
    tables = [markdown_table(columns, rows)]
    if engines[1]:
        named = [[f"`{row[0]}`", *map(_cell, row[1:])] for row in engines[1]]
        tables.append(markdown_table(engines[0], named))
    share, facts = body["loop_share"], body["provenance"]
    return "\n".join([
        f"## {title}", "", "\n\n".join(tables), "",
        f"{described_prompts(body)}, temperature {body['temperature']:g}; loop share of plain "
        f"text {_cell(share)}; best plain loop `{body['best_plain']}`; depth k: steps whose first "
        "k levels were all accepted, of those that drafted as many; intervals: 95 % bootstrap over "
        "prompts; in brackets: plain's law by a rule of its own, another text. "
        f"{measured_on(facts)}, {measured_by(facts)}.",
        *(line[0].upper() + line[1:] + "." for line in told(body)),
        *(f"Warning: {warning}" for warning in body["warnings"]),
    ])  # fmt: skip


def measured_by(facts: dict[str, Any]) -> str:
    """The code that measured: its commit; of an installed wheel, which knows none, the version."""
    if facts.get("git_commit"):
        return f"commit {facts['git_commit'][:10]}"
    return f"redrafter {facts.get('versions', {}).get('redrafter', 'of an unknown version')}"


def measured_on(facts: dict[str, Any]) -> str:
    """Device, threads, dtype, and of an inflated target what it is. facts: a result's provenance"""
    about = f"{facts['device']}, {facts['threads']} thread(s), {facts['target']['dtype']}"
    inflated = facts["target"].get("inflated")
    return f"{about}, {inflated}" if inflated else about


def write_result(
    path: str | None, config: Any, target: Target, body: dict[str, Any], head: Any = None
) -> None:
    """Write a result beside all that it depends on, and say so; nothing where `path` is None.

    head: the `DraftHead` that was measured, if one was
    """
    if path is None:
        return
    facts = provenance(
        config=plain_values(config),
        target={
            "name": target.name,
            "fingerprint": target.fingerprint(),
            "dtype": str(target.dtype).removeprefix("torch."),
            "computed_in": computed_in(target),
            "attention": getattr(target.config, "_attn_implementation", None),
            "inflated": said(target.config),
        },
        head=None if head is None else {"fingerprint": head.fingerprint()},
        device=device_name(target.device),
    )
    write_json(path, _finite(plain_values({**body, "provenance": facts})))
    print(f"{path}: written", flush=True)


def read_result(file: Path, config: Any, fingerprint: str, command: str) -> dict[str, Any] | None:
    """What an earlier run of a command wrote by `write_result`, None where it did not.

    config, fingerprint: what it is asked for now, and the target's. Raises InputError where the
    file was made for something else.
    """
    if (text := read_packed(file)) is None:
        return None
    try:
        body = json.loads(text)
        made, target = body["provenance"]["config"], body["provenance"]["target"]["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is no result of {command}: remove it") from None
    # What older files lack was what is now its default.
    then = {f.name: plain_values(f.default) for f in fields(config)} | made
    # A threads or out that differs changes no figure's meaning.
    differ = [
        key
        for key, value in plain_values(config).items()
        if key not in ("out", "threads") and then.get(key) != value
    ]
    differ += [] if target == fingerprint else ["target (its weights)"]
    if differ:
        raise InputError(
            f"{file} was measured with another {', '.join(differ)}: remove it, or give another out"
        )
    return body


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no nan: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
