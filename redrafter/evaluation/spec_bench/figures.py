"""Figures of Spec-Bench's protocol, by task: from the journal, tokens counted alike for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from redrafter.evaluation.figures import Interval, acceptance, bootstrap, mean_of_ratios, pooled
from redrafter.evaluation.journal import Key
from redrafter.evaluation.spec_bench.answer_files import (
    Answer,
    compare,
    compat_figures,
    spread,
    tasks_of,
)
from redrafter.evaluation.spec_bench.questions import Question

#: Stands in every result, so that a number is never without its meaning.
DEFINITIONS = {
    "tokens": "generated, an EOS included, none after it; counted alike for every method",
    "seconds": "wall time of prefill and decoding, tokenising left out, summed over the turns",
    "speed": "of a question: its tokens / its seconds",
    "macro_speedup": "mean speed over questions / the baseline's mean speed; mean over runs",
    "pooled_speedup": "all tokens / all seconds, over the same of the baseline; mean over runs",
    "tokens_per_second": "macro: mean speed over questions; mean over runs",
    "mean_accepted_tokens": "tokens emitted by steps / steps, pooled over all steps of all runs, "
    "the target's own token counted; the prefill is no step",
    "tokens_per_step_mean": "the same ratio of each question, mean over questions",
    "low, high": "95 % bootstrap over questions; std: over runs, ddof 1",
}
Runs = list[list[list[dict[str, Any]]]]  # run -> question -> turns


class Tally:
    """What one method did, as arrays (R, Q) over runs and questions."""

    def __init__(self, runs: Runs):
        def count(of: Any) -> np.ndarray:
            return np.array([[sum(map(of, turns)) for turns in run] for run in runs])

        self.runs = runs
        self.tokens = count(lambda t: len(t["tokens"])).astype(float)
        self.seconds = count(lambda t: t["seconds"])
        self.steps = count(lambda t: len(t["lengths"]))
        self.emitted = count(lambda t: sum(t["lengths"]))

    @property
    def speed(self) -> np.ndarray:
        return self.tokens / self.seconds


def macro(*speeds: np.ndarray) -> np.ndarray:
    """Mean over runs of the ratio of mean speeds. speeds: (..., Q) of R runs of the method, then of
    R runs of the baseline."""
    own, base = _halves(speeds)
    return np.mean([a.mean(-1) / b.mean(-1) for a, b in zip(own, base, strict=True)], axis=0)


def pool(*columns: np.ndarray) -> np.ndarray:
    """Mean over runs of the ratio of pooled speeds. columns: (..., Q), R runs each of the method's
    tokens, its seconds, the baseline's tokens, its seconds."""
    own, base = _halves(columns)
    (tokens, seconds), (base_tokens, base_seconds) = _halves(own), _halves(base)
    return np.mean(
        [
            a.sum(-1) / b.sum(-1) / (c.sum(-1) / d.sum(-1))
            for a, b, c, d in zip(tokens, seconds, base_tokens, base_seconds, strict=True)
        ],
        axis=0,
    )


def _halves(columns: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    half = len(columns) // 2
    return columns[:half], columns[half:]


def task_figures(own: Tally, base: Tally, places: list[int]) -> dict[str, Any]:
    """The figures of one method over the questions at these places."""

    def at(rows: np.ndarray) -> list[np.ndarray]:
        return list(rows[:, places])

    def figure(interval: Interval, per_run: Sequence[float] | None = None) -> dict[str, Any]:
        value, low, high = interval
        known = {"value": value, "low": low, "high": high}
        return known if per_run is None else known | {"std": spread(per_run)["std"]}

    speeds, base_speeds = at(own.speed), at(base.speed)
    sums = [at(own.tokens), at(own.seconds), at(base.tokens), at(base.seconds)]
    each_macro = [float(macro(a, b)) for a, b in zip(speeds, base_speeds, strict=True)]
    each_pool = [float(pool(*columns)) for columns in zip(*sums, strict=True)]
    emitted, steps = own.emitted[:, places].sum(0), own.steps[:, places].sum(0)
    some = bool(steps.sum())
    turns = [t for run in own.runs for i in places for t in run[i]]
    return {
        "questions": len(places),
        "tokens": int(own.tokens[:, places].sum()),
        "seconds": float(own.seconds[:, places].sum()),
        "steps": int(steps.sum()),
        "macro_speedup": figure(bootstrap(macro, *speeds, *base_speeds), each_macro),
        "pooled_speedup": figure(bootstrap(pool, *(c for s in sums for c in s)), each_pool),
        "tokens_per_second": spread([float(s.mean()) for s in speeds]),
        "mean_accepted_tokens": figure(bootstrap(pooled, emitted, steps)) if some else None,
        "tokens_per_step_mean": figure(bootstrap(mean_of_ratios, emitted, steps)) if some else None,
        "acceptance": _acceptance(turns),
        "prefill_s_mean": _prefill(turns),
    }


def _acceptance(turns: Sequence[dict[str, Any]]) -> dict[str, list] | None:
    """By depth, pooled over steps; None of what drafts nothing, or does not say."""
    depth = max((len(t["drafted_at"]) for t in turns), default=0)
    if not depth:
        return None
    sums = [
        [sum(t[key][k] for t in turns if k < len(t[key])) for k in range(depth)]
        for key in ("drafted_at", "accepted_at")
    ]
    return acceptance(*sums)


def _prefill(turns: Sequence[dict[str, Any]]) -> float | None:
    """About the time to the first token; None of other people's loops."""
    known = [t["prefill_s"] for t in turns if t["prefill_s"] is not None]
    return float(np.mean(known)) if known else None


class Report:
    """All figures. entries: of the journal; questions: all that were asked for."""

    def __init__(
        self,
        questions: Sequence[Question],
        entries: dict[Key, dict[str, Any]],
        methods: Sequence[str],
        baseline: str,
        repeats: int,
        law_only: Sequence[str] = (),
    ):
        self.methods, self.baseline, self.repeats = list(methods), baseline, repeats
        self.law_only = set(law_only)
        # Left out in one run, left out in all: runs are compared question by question.
        self.skipped = {
            q.id: entries[run, q.id]["skipped"]
            for run in range(repeats) for q in questions if "skipped" in entries[run, q.id]
        }  # fmt: skip
        self.questions = [q for q in questions if q.id not in self.skipped]
        self.runs: dict[str, Runs] = {
            name: [
                [entries[run, q.id]["methods"][name] for q in self.questions]
                for run in range(repeats)
            ]
            for name in methods
        }
        self.tasks = tasks_of(q.category for q in self.questions)
        self.tallies = {name: Tally(runs) for name, runs in self.runs.items()}

    def figures(self) -> dict[str, Any]:
        """method -> task -> figures."""
        base = self.tallies[self.baseline]
        return {
            name: {task: task_figures(tally, base, at) for task, at in self.tasks.items()}
            for name, tally in self.tallies.items()
        }

    def compat(self, answers: dict[str, list[list[Answer]]], tokenizer: Any) -> dict[str, Any]:
        """method -> task -> Spec-Bench's own counting.

        answers: method -> run -> answers
        """
        base = answers[self.baseline]
        return {
            name: {task: compat_figures(runs, base, tokenizer, task) for task in self.tasks}
            for name, runs in answers.items()
        }

    def lossless(self) -> dict[str, Any]:
        """method -> its tokens and texts beside the baseline's, over all runs.

        compared: False where the text is another one by design (a law of its own)
        """
        base = self._said(self.baseline)
        found = {}
        for name in self.methods:
            if name == self.baseline:
                continue
            own = self._said(name)
            tokens, texts = (compare(own[key], base[key]) for key in ("tokens", "text"))
            found[name] = {
                "turns": tokens["turns"],
                "equal_tokens": tokens["equal"],
                "equal_texts": texts["equal"],
                "first_difference": tokens["first_difference"],
                "compared": name not in self.law_only,
            }
        return found

    def _said(self, name: str) -> dict[str, dict[str, list[Any]]]:
        return {
            key: {
                f"{q.id}, run {run + 1}": [turn[key] for turn in turns]
                for run, each in enumerate(self.runs[name])
                for q, turns in zip(self.questions, each, strict=True)
            }
            for key in ("tokens", "text")
        }

    def counts(self) -> dict[str, Any]:
        """How much was asked, and what did not fit into the context."""
        cut = {}
        for name, runs in self.runs.items():
            lost = [t["cut_tokens"] for turns in runs[0] for t in turns if t["cut_tokens"]]
            cut[name] = {"turns": len(lost), "tokens": sum(lost)}
        return {
            "questions": len(self.questions),
            "turns": sum(len(q.turns) for q in self.questions),
            "runs": self.repeats,
            "skipped": self.skipped,
            "cut": cut,
        }

    def per_question(self) -> dict[str, Any]:
        """What the figures are made of: of every run, by question."""
        return {
            "question_id": [q.id for q in self.questions],
            "category": [q.category for q in self.questions],
            "methods": {
                name: {
                    "tokens": t.tokens.astype(int).tolist(),
                    "seconds": np.round(t.seconds, 6).tolist(),
                    "steps": t.steps.tolist(),
                    "emitted": t.emitted.tolist(),
                }
                for name, t in self.tallies.items()
            },
        }
