"""A head's report: every part of it, in the order in which they are asked for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from redrafter.config import ReportConfig
from redrafter.contracts import InputError
from redrafter.heads.base import DraftHead
from redrafter.hub.run import Run, read_file, read_run, results_of
from redrafter.report import sections
from redrafter.report.page import missing, page, paragraph
from redrafter.report.texts import show, trace
from redrafter.targets.model import Target


def check(config: ReportConfig, folder: Path) -> Run:
    """What is known of the head. Raises InputError, before anything heavy is done, for a folder or
    a file in it that is damaged or another head's, and for a place that cannot be written to."""
    run = read_run(folder)
    if Path(place(config)).is_dir():
        raise InputError(f"out: {place(config)} is a folder; name an HTML file")
    if config.prompts is None and config.target.path:
        raise InputError(
            "prompts: a target is given, and nothing for it to answer: give --prompts FILE.jsonl"
        )
    return run


def place(config: ReportConfig) -> str:
    """Of the file that is written."""
    return config.out or str(Path(config.head) / "report.html")


def build(config: ReportConfig, run: Run, target: Target | None, head: DraftHead | None) -> str:
    """The page. target, head: to decode the prompts with; None where none are given"""
    texts = _decoded(config, target, head)
    judged = results_of(run.folder, run.head, ("acceptance*.json",))
    title = f"{run.folder.resolve().name}, a draft head for {run.target.name}"
    return page(title, sections.about(run), {
        "Text, token by token": texts,
        "Speed": sections.speed(run),
        "Acceptance": sections.acceptance(run, judged),
        "Costs and bound": sections.costs(run, cost_tables(run)),
        "Exactness": sections.exactness(run),
        "Training": sections.training(run),
    })  # fmt: skip


def _decoded(config: ReportConfig, target: Target | None, head: DraftHead | None) -> str:
    if target is None:
        command = f"redrafter report {shlex.quote(config.head)} --target.path MODEL"
        command += " --prompts PROMPTS.jsonl"
        return missing("No prompts were given: no text is shown.", command)
    texts, warnings = trace(config, target, head)
    warned = "".join(paragraph(text, "warning") for text in warnings)
    return warned + show(texts, config, target.tokenizer)


def cost_tables(run: Run) -> dict[str, dict[str, Any]]:
    """What eval/costs.py left in the folder; where nothing, the costs that the bounds of measured
    speeds were taken from. Raises InputError for another target's."""
    trained_for, found = run.head.config.target_fingerprint, {}
    for file in sorted(run.folder.glob("costs*.json")):
        body = read_file(file)
        try:
            fingerprint = body["provenance"]["target"]["fingerprint"]
            body["target"][0]["cost"]["median_s"]
        except (KeyError, TypeError, IndexError):
            raise InputError(f"{file} is no result of eval/costs.py: move it elsewhere") from None
        any_target = body["provenance"]["config"].get("allow_other_target")
        if trained_for and fingerprint != trained_for and not any_target:
            raise InputError(
                f"{file} was measured on another target ({fingerprint}): measure again, or move "
                "it elsewhere"
            )
        found[file.name] = body
    return found or {result.name: result.body["costs"] for result in run.speeds}
