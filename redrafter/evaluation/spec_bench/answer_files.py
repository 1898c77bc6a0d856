"""Answer files in Spec-Bench's own format, its own counting on them, and their comparison.

One JSON line per question, as evaluation/eval.py of hemingkx/Spec-Bench writes them:

    question_id, category, answer_id, model_id, tstamp,
    choices: [{index, turns, decoding_steps, new_tokens, wall_time, accept_lengths}]

turns, decoding_steps, new_tokens and wall_time have one entry per turn, accept_lengths one per step
of all turns. Its evaluation/speed.py and evaluation/equal.py read these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redrafter.contracts import InputError
from redrafter.evaluation.spec_bench.questions import Question
from redrafter.files import digest_json, write_text

#: What Spec-Bench reports as one task, mt_bench.
MT_BENCH = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
#: In Spec-Bench's order; other categories follow in that of the file, `overall` ends.
TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")

Answer = dict[str, Any]


def task_of(category: str) -> str:
    return "mt_bench" if category in MT_BENCH else category


def tasks_of(categories: Iterable[str]) -> dict[str, list[int]]:
    """Task -> places of its questions; `overall` has all."""
    found: dict[str, list[int]] = {task: [] for task in TASKS}
    everything = []
    for place, category in enumerate(categories):
        found.setdefault(task_of(category), []).append(place)
        everything.append(place)
    return {task: places for task, places in found.items() if places} | {"overall": everything}


def answer_of(question: Question, model_id: str, turns: Sequence[dict[str, Any]]) -> Answer:
    """turns: of the journal."""
    return {
        "question_id": question.id,
        "category": question.category,
        "answer_id": digest_json([model_id, question.id, [t["text"] for t in turns]])[:22],
        "model_id": model_id,
        "choices": [
            {
                "index": 0,
                "turns": [t["text"] for t in turns],
                "decoding_steps": [len(t["lengths"]) for t in turns],
                "new_tokens": [len(t["tokens"]) for t in turns],
                "wall_time": [t["seconds"] for t in turns],
                "accept_lengths": [n for t in turns for n in t["lengths"]],
            }
        ],
        "tstamp": turns[0]["written"],
    }


def file_name(method: str) -> str:
    """A method's name as that of a file: `head:4x4` -> `head-4x4.jsonl`."""
    return re.sub(r"[^\w.=]+", "-", method).strip("-") + ".jsonl"


def file_names(methods: Sequence[str]) -> dict[str, str]:
    """Raises InputError where two methods would share a file."""
    method_of: dict[str, str] = {}
    for method in methods:
        other = method_of.setdefault(file_name(method), method)
        if other != method:
            raise InputError(
                f"methods: the answers of {other!r} and {method!r} would both be in "
                f"{file_name(method)}; run them into two folders"
            )
    return {method: name for name, method in method_of.items()}


def write_answers(path: str | Path, answers: Iterable[Answer]) -> None:
    write_text(path, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))


def read_answers(path: str | Path) -> list[Answer]:
    """Raises InputError naming file and line of what is no answer in this format."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    answers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answer = json.loads(line)
            choice = answer["choices"][0]
            sizes = {len(choice[k]) for k in ("turns", "new_tokens", "wall_time")}
            good = len(sizes) == 1 and isinstance(choice["accept_lengths"], list)
            good = good and "question_id" in answer and isinstance(answer["category"], str)
        except (ValueError, KeyError, TypeError, IndexError):
            good = False
        if not good:
            raise InputError(f"{path}:{number} is no answer in Spec-Bench's format")
        answers.append(answer)
    return answers


# ---------------------------------------------------------------- Spec-Bench's own counting


def compat_figures(
    runs: Sequence[Sequence[Answer]],
    baseline: Sequence[Sequence[Answer]],
    tokenizer: Any,
    task: str,
) -> dict[str, Any]:
    """What its evaluation/speed.py says of a method's files beside the baseline's, run by run.

    The baseline's tokens are those of its texts tokenised again, less one per turn (a BOS, whether
    or not this tokenizer puts one), the method's are its own `new_tokens`. So an EOS counts for the
    method alone, and blanks stripped from a text for the method alone. Speeds are means over
    questions; accepted tokens are a mean over all steps of all runs.
    """
    speed, speed_base, lengths = [], [], []
    for own, base in zip(runs, baseline, strict=True):
        chosen = _choices(own, task)
        speed.append(np.mean([sum(c["new_tokens"]) / sum(c["wall_time"]) for c in chosen]))
        lengths += [n for c in chosen for n in c["accept_lengths"]]
        again = [
            (sum(len(tokenizer(text, verbose=False).input_ids) - 1 for text in c["turns"]), c)
            for c in _choices(base, task)
        ]
        speed_base.append(np.mean([tokens / sum(c["wall_time"]) for tokens, c in again]))
    ratios = [a / b if b else None for a, b in zip(speed, speed_base, strict=True)]
    return {
        "tokens_per_second": spread(speed),
        "tokens_per_second_baseline": spread(speed_base),
        "speedup": spread(ratios),
        "mean_accepted_tokens": float(np.mean(lengths)) if lengths else None,
    }


def _choices(answers: Sequence[Answer], task: str) -> list[dict[str, Any]]:
    return [
        a["choices"][0] for a in answers if task == "overall" or task_of(a["category"]) == task
    ]  # fmt: skip


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (ddof 1; None of one value) over runs."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return {"value": None, "std": None}
    std = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"value": float(np.mean(known)), "std": std}


# ---------------------------------------------------------------- are they the same?


def compare(one: Mapping[Any, Sequence[Any]], other: Mapping[Any, Sequence[Any]]) -> dict[str, Any]:
    """Turn by turn: {"turns", "equal", "first_difference"}.

    one, other: question id -> its turns, texts or lists of tokens
    A question or a turn that only one of them has counts as a turn that differs.
    """
    turns = equal = 0
    first: dict[str, Any] | None = None
    for name in dict.fromkeys([*one, *other]):
        a, b = one.get(name, ()), other.get(name, ())
        for turn in range(max(len(a), len(b))):
            turns += 1
            both = turn < len(a) and turn < len(b)
            if both and a[turn] == b[turn]:
                equal += 1
            elif first is None:
                first = {"question_id": name, "turn": turn + 1, "missing": not both}
    return {"turns": turns, "equal": equal, "first_difference": first}


def compare_files(one: str | Path, other: str | Path) -> dict[str, Any]:
    """`compare` of the texts of two answer files, ours or anybody's."""
    return compare(
        *({a["question_id"]: a["choices"][0]["turns"] for a in read_answers(p)}
          for p in (one, other))
    )  # fmt: skip
