"""The protocol of Spec-Bench: chats of several turns, every method with its own history.

As evaluation/eval.py of hemingkx/Spec-Bench: one question at a time in the order of the file, batch
1, wall time from before the prefill to the last token, tokenising left out, the device synchronised
before and after. Other than there, methods take turns within a question, so that a machine that
slows down slows all of them down, and tokens are counted alike for all: those that were generated,
an EOS included, none after it. Figures: `figures.py`; files: `answer_files.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from redrafter.bars import Bar
from redrafter.config import SpecBenchConfig
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.methods import Method, PromptBatch, TimedCall, needed, plain_answers
from redrafter.evaluation.spec_bench.questions import Chat, PromptTooLong, Question
from redrafter.targets.model import Target

#: of a turn, by method, in the journal
Turn = dict[str, Any]


def run_questions(
    target: Target,
    methods: Sequence[Method],
    questions: Sequence[Question],
    chat: Chat,
    config: SpecBenchConfig,
    journal: Journal,
) -> None:
    """Have every question that is not in the journal yet answered by every method, run by run."""
    wanted = [(run, i) for run in range(config.repeats) for i in range(len(questions))]
    todo = [(run, i) for run, i in wanted if (run, questions[i].id) not in journal.entries]
    bar = Bar(
        total=len(wanted), initial=len(wanted) - len(todo), desc="questions", unit="question",
        leave=False,
    )  # fmt: skip
    asker = Asker(target, chat, config)
    with bar:
        for _ in range(config.warmups if todo else 0):
            bar.set_postfix_str("warm-up")
            asker.all(methods, questions[0])
        for run, i in todo:
            bar.set_postfix_str(questions[i].category)
            first = (run + i) % len(methods)
            order = [*methods[first:], *methods[:first]]
            journal.add((run, questions[i].id), asker.all(order, questions[i]))
            bar.update()


class Asker:
    """Puts questions to methods."""

    def __init__(self, target: Target, chat: Chat, config: SpecBenchConfig):
        self.target, self.chat, self.config = target, chat, config

    def all(self, methods: Sequence[Method], question: Question) -> dict[str, Any]:
        """{"methods": {name: turns}}, or {"skipped": why} where any method's prompt is too long and
        such questions are to be left out."""
        made: dict[str, list[Turn]] = {}
        try:
            for method in methods:
                made[method.name] = self.one(method, question)
        except PromptTooLong as error:
            if self.config.long_prompts != "skip":
                raise
            return {"skipped": str(error)}
        return {"methods": made}

    def one(self, method: Method, question: Question) -> list[Turn]:
        """All turns of a question by one method: its answers are its history."""
        history: list[dict[str, Any]] = []
        turns = []
        for i, said in enumerate(question.turns):
            where = question.where if i == 0 else f"{question.where}, turn {i + 1}"
            history += said
            prompt, n_cut = self.chat.prompt(history, where, question.tools)
            batch = PromptBatch([prompt], [self.config.seed + question.row])
            if "texts" in needed([method.name]):
                batch.texts.append(prompt + self._plain(method.config, batch))
            method.prepare(batch)
            run = method.run(batch)
            text = self.chat.text(run.tokens[0])
            history.append({"role": "assistant", "content": text})
            turns.append(_turn(run, text, len(prompt), n_cut))
        return turns

    def _plain(self, generation: GenerationConfig, batch: PromptBatch) -> list[int]:
        """For a drafter that knows the answer beforehand."""
        return plain_answers(self.target, batch.prompts, generation, batch.seeds)[0]


def _turn(run: TimedCall, text: str, prompt_tokens: int, cut_tokens: int) -> Turn:
    """What is kept of an answer.

    lengths: tokens that each step emitted, its own one included; the prefill is no step, and what
        it emitted stands in none of them. Where one forward makes one token: a 1 for each other
    drafted_at, accepted_at: as in StepStats
    """
    tokens, stats = run.tokens[0], run.stats
    drafts = stats is not None and stats.lengths
    prefill = run.seconds.get("prefill")
    return {
        "text": text,
        "tokens": tokens,
        "seconds": round(run.seconds["total"], 6),
        "prefill_s": None if prefill is None else round(prefill, 6),
        "lengths": stats.lengths[0] if drafts else [1] * (len(tokens) - 1),
        "drafted_at": [] if stats is None else stats.drafted_at,
        "accepted_at": [] if stats is None else stats.accepted_at,
        "prompt_tokens": prompt_tokens,
        "cut_tokens": cut_tokens,
        "written": round(time.time(), 3),
    }
