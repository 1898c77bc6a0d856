"""`eval/spec_bench.py`: the protocol of Spec-Bench, for any benchmark of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners, prompts_to_count
from redrafter.config import SpecBenchConfig
from redrafter.contracts import InputError

# What changes no answer and no figure of a question, so that a run may go on under another one.
_FREE = ("out", "question_begin", "n_questions", "repeats", "warmups", "compat", "model_id")


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Answers what is not answered yet; writes OUT/journal.jsonl as it goes, then
    OUT/answers/run-R/METHOD.jsonl, OUT/spec-bench.json, table.md and config.yaml. Returns the exit
    status."""
    config = parse(
        SpecBenchConfig,
        argv,
        "eval/spec_bench.py",
        "Spec-Bench's protocol: chats with each method's own history, speedups by task, answer "
        "files that Spec-Bench reads. A run that was stopped goes on.",
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation.journal import Journal
    from redrafter.evaluation.prompts import holdout_warning
    from redrafter.evaluation.report import write_result
    from redrafter.evaluation.spec_bench.answer_files import file_names
    from redrafter.evaluation.spec_bench.questions import open_questions
    from redrafter.evaluation.spec_bench.run import run_questions
    from redrafter.evaluation.spec_bench.table import markdown
    from redrafter.files import write_config, write_text

    names = _methods(config)
    files = file_names(names)
    target, head = load_both(config)
    out = Path(config.out)
    begun = Journal.begun(out / "journal.jsonl")
    chat, questions, digest = open_questions(target, config, begun)
    methods = _build(names, config, target, head)
    journal = Journal(out / "journal.jsonl", _identity(config, target, head, chat, digest))
    run_questions(target, methods, questions, chat, config, journal)
    first, law_only = questions[0].row, [method.name for method in methods if method.law_only]
    body = _report(config, questions, journal, names, files, law_only, chat)
    if head is not None and (told := holdout_warning(config.head, config.questions, first)):
        body["warnings"].append(told)
    write_config(out / "config.yaml", config)
    write_result(str(out / "spec-bench.json"), config, target, body)
    whole = json.loads((out / "spec-bench.json").read_text(encoding="utf-8"))
    write_text(out / "table.md", markdown(whole) + "\n")
    print((out / "table.md").read_text(encoding="utf-8"))
    return 0


def _methods(config: SpecBenchConfig) -> list[str]:
    from redrafter.evaluation.methods import check_partners, parse_methods

    names = parse_methods(config.methods)
    check_partners(names, config)
    if config.baseline not in names:
        raise InputError(
            f"baseline: {config.baseline!r} is not among the methods {', '.join(names)}; add it"
        )
    if prompts_to_count(names, config):
        raise InputError(
            "methods: give --bigrams, a table made by data/bigrams.py: there are no other rows "
            "here to count on"
        )
    return names


def _build(names: Sequence[str], config: SpecBenchConfig, target: Any, head: Any) -> list[Any]:
    from redrafter.data.answers import generation_config
    from redrafter.evaluation.methods import build_method

    wanted = generation_config(config.temperature, config.max_new_tokens)
    partners, _ = load_partners(names, config, target, head, [], wanted)
    return [build_method(name, target, wanted, partners) for name in names]


def _identity(
    config: SpecBenchConfig, target: Any, head: Any, chat: Any, digest: str
) -> dict[str, Any]:
    """What must be the same for answers to belong together, times included."""
    import torch

    from redrafter.data.day import dated
    from redrafter.files import plain_values
    from redrafter.targets.devices import device_name
    from redrafter.targets.identity import text_identity

    given = {k: v for k, v in plain_values(config).items() if k not in (*_FREE, "threads")}
    return {
        **dated(given, chat.day),
        "content of questions": digest,
        "weights of target": target.fingerprint(),
        "weights of head": None if head is None else head.fingerprint(),
        **{f"text: {part}": of for part, of in text_identity(chat.tokenizer).items()},
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
    }


def _report(
    config: SpecBenchConfig,
    questions: Sequence[Any],
    journal: Any,
    names: Sequence[str],
    files: dict[str, str],
    law_only: Sequence[str],
    chat: Any,
) -> dict[str, Any]:
    """All figures; writes the answer files."""
    from redrafter.evaluation.spec_bench.answer_files import answer_of, write_answers
    from redrafter.evaluation.spec_bench.figures import DEFINITIONS, Report

    report = Report(
        questions, journal.entries, names, config.baseline, config.repeats, law_only
    )  # fmt: skip
    if not report.questions:
        raise InputError(
            f"{config.questions}: every question was left out ({len(report.skipped)}), the first "
            f"for this: {next(iter(report.skipped.values()))}"
        )
    model_id = config.model_id or Path(config.target.path).name
    answers = {
        name: [
            [
                answer_of(question, f"{model_id}-{name}", turns)
                for question, turns in zip(report.questions, run, strict=True)
            ]
            for run in report.runs[name]
        ]
        for name in names
    }
    for name, runs in answers.items():
        for run, each in enumerate(runs, 1):
            write_answers(Path(config.out) / "answers" / f"run-{run}" / files[name], each)
    lossless = report.lossless()
    wrong = [
        f"{name} differs from {config.baseline} in {same['turns'] - same['equal_tokens']} of "
        f"{same['turns']} turns, first in question {same['first_difference']['question_id']}; "
        "eval/lossless.py says whether rounding explains it"
        for name, same in lossless.items()
        if same["compared"] and same["equal_tokens"] < same["turns"]
    ]
    return {
        "baseline": config.baseline,
        "definitions": DEFINITIONS,
        "figures": report.figures(),
        "compat": report.compat(answers, chat.tokenizer) if config.compat else None,
        "lossless": lossless,
        "exact": not wrong,
        "counts": report.counts(),
        "answer_files": files,
        "per_question": report.per_question(),
        "warnings": wrong,
    }
