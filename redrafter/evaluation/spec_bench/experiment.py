"""What `eval/spec_bench.py` asks of whom, what answers belong together, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from redrafter.config import SpecBenchConfig
from redrafter.contracts import InputError
from redrafter.data.answers import generation_config
from redrafter.data.day import dated
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.methods import Method, build_method, check_resources, parse_methods
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.prompts import holdout_warning
from redrafter.evaluation.spec_bench.answer_files import (
    Answer,
    answer_of,
    file_names,
    write_answers,
)
from redrafter.evaluation.spec_bench.figures import DEFINITIONS, Report
from redrafter.evaluation.spec_bench.questions import Chat, open_questions
from redrafter.evaluation.spec_bench.run import run_questions
from redrafter.files import plain_values
from redrafter.targets.devices import device_name
from redrafter.targets.identity import text_identity
from redrafter.targets.model import Target

# What changes no answer and no figure of a question, so that a run may go on under another one.
_FREE = (
    "out", "question_begin", "n_questions", "question_step",
    "repeats", "warmups", "compat", "model_id",
)  # fmt: skip


def methods_of(config: SpecBenchConfig) -> list[str]:
    """Names of the methods. Raises InputError for one that is none, or lacks an option."""
    names = parse_methods(config.methods)
    check_resources(names, config)
    if config.baseline not in names:
        raise InputError(
            f"baseline: {config.baseline!r} is not among the methods {', '.join(names)}; add it"
        )
    if prompts_to_count(names, config):
        raise InputError(
            "methods: give --bigrams, a table made by data/bigrams.py: there are no other rows "
            "here to count on"
        )
    file_names(names)  # no two may share one
    return names


def build(
    names: Sequence[str], config: SpecBenchConfig, target: Target, head: Module | None
) -> list[Method]:
    wanted = generation_config(config.temperature, config.max_new_tokens)
    resources, _ = load_resources(names, config, target, head, [], wanted)
    return [build_method(name, target, wanted, resources) for name in names]


def identity(
    config: SpecBenchConfig, target: Target, head: Module | None, chat: Chat, digest: str
) -> dict[str, Any]:
    """What must be the same for answers to belong together, times included."""
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


def measure(
    config: SpecBenchConfig, names: Sequence[str], target: Target, head: Module | None
) -> dict[str, Any]:
    """Answer what is not answered yet; writes OUT/journal.jsonl as it goes, then the answer files.

    names: from `methods_of`
    """
    path = Path(config.out) / "journal.jsonl"
    chat, questions, digest = open_questions(target, config, Journal.begun(path))
    methods = build(names, config, target, head)
    journal = Journal(path, identity(config, target, head, chat, digest))
    run_questions(target, methods, questions, chat, config, journal)
    law_only = [method.name for method in methods if method.law_only]
    figures = Report(
        questions, journal.entries, names, config.baseline, config.repeats, law_only
    )  # fmt: skip
    body = report(config, figures, chat.tokenizer)
    first = questions[0].row
    if head is not None and (told := holdout_warning(config.head, config.questions, first)):
        body["warnings"].append(told)
    return body


def report(
    config: SpecBenchConfig, figures: Report, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """All figures; writes the answer files."""
    if not figures.questions:
        raise InputError(
            f"{config.questions}: every question was left out ({len(figures.skipped)}), the first "
            f"for this: {next(iter(figures.skipped.values()))}"
        )
    answers, lossless = write_runs(config, figures), figures.lossless()
    wrong = [
        f"{name} differs from {config.baseline} in {same['turns'] - same['equal_tokens']} of "
        f"{same['turns']} turns, first in question {same['first_difference']['question_id']}; "
        "`redrafter lossless` says whether rounding explains it"
        for name, same in lossless.items()
        if same["compared"] and same["equal_tokens"] < same["turns"]
    ]
    return {
        "baseline": config.baseline,
        "definitions": DEFINITIONS,
        "figures": figures.figures(),
        "compat": figures.compat(answers, tokenizer) if config.compat else None,
        "lossless": lossless,
        "exact": not wrong,
        "counts": figures.counts(),
        "answer_files": file_names(figures.methods),
        "per_question": figures.per_question(),
        "warnings": wrong,
    }


def write_runs(config: SpecBenchConfig, figures: Report) -> dict[str, list[list[Answer]]]:
    """OUT/answers/run-R/METHOD.jsonl. Returns method -> run -> its answers."""
    model_id = config.model_id or Path(config.target.path).name
    files = file_names(figures.methods)
    answers = {
        name: [
            [
                answer_of(question, f"{model_id}-{name}", turns)
                for question, turns in zip(figures.questions, run, strict=True)
            ]
            for run in runs
        ]
        for name, runs in figures.runs.items()
    }
    for name, runs in answers.items():
        for run, each in enumerate(runs, 1):
            write_answers(Path(config.out) / "answers" / f"run-{run}" / files[name], each)
    return answers
