"""Tokens per step of heads' trees on all questions that a Spec-Bench run has answered greedily.

    python scripts/dev/measure_walked.py --run runs/spec-bench --target smollm2 \\
        --questions spec_bench.jsonl --heads examples/smollm2-135m/head --tree 4x4 --out walked.json

Greedy texts are plain's whatever is drafted, so a tree need not be verified to be counted: one
forward over each turn gives the hidden states, and the head is walked along the text
(`redrafter/evaluation/walk.py`). A repeat goes on where it stopped. Prints one line per head.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from redrafter.config import SpecBenchConfig, TargetConfig, TreeConfig
from redrafter.drafters.head import HeadDrafter
from redrafter.evaluation.figures import bootstrap, pooled
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.spec_bench.answer_files import tasks_of
from redrafter.evaluation.spec_bench.questions import Question, open_questions
from redrafter.evaluation.walk import walk
from redrafter.files import provenance, write_json
from redrafter.heads.load import load_head
from redrafter.targets.load import load_target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("run", "target", "questions", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--heads", nargs="+", required=True)
    parser.add_argument("--tree", default="4x4", help="width x depth")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    width, depth = map(int, given.tree.split("x"))
    journal = Path(given.run) / "journal.jsonl"
    begun = Journal.begun(journal)
    kept = Journal(journal, begun).entries
    target = load_target(TargetConfig(path=given.target, dtype=given.dtype))
    limit = begun["max_new_tokens"]
    config = SpecBenchConfig(
        target=TargetConfig(path=given.target), questions=given.questions, out=given.run,
        max_new_tokens=limit,
    )  # fmt: skip
    chat, questions, _ = open_questions(target, config, begun)
    drafters = {
        name: HeadDrafter(load_head(name, target, True), target, TreeConfig(width, depth))
        for name in given.heads
    }
    out = Path(given.out)
    counts = json.loads(out.read_text())["counts"] if out.exists() else {}
    for question in questions:
        entry = kept.get((0, question.id))
        if entry is None or all(str(question.id) in counts.get(name, {}) for name in drafters):
            continue
        prompts, answers, states, history = [], [], [], []
        for said, turn in zip(question.turns, entry["methods"]["plain"], strict=True):
            history += said
            prompts.append(chat.prompt(history, question.where, question.tools)[0])
            assert len(prompts[-1]) == turn["prompt_tokens"], "another template, or other questions"
            answers.append(turn["tokens"])
            states.append(target.states(torch.tensor([[*prompts[-1], *turn["tokens"]][:-1]]))[0])
            history.append({"role": "assistant", "content": turn["text"]})
        for name, drafter in drafters.items():
            made = walk(drafter, prompts, answers, limit, states=states)
            counts.setdefault(name, {})[str(question.id)] = {
                "emitted": sum(made.emitted), "steps": sum(made.steps),
                "drafted_at": made.drafted_at, "accepted_at": made.accepted_at,
            }  # fmt: skip
        write_json(out, {"tree": given.tree, "counts": counts})
    figures = summary(counts, questions)
    about = provenance(dtype=given.dtype, target=given.target)
    content = {"tree": given.tree, "figures": figures, "counts": counts, "provenance": about}
    write_json(out, content)
    for name, of_tasks in figures.items():
        said = [f"{task} {v:.2f} [{a:.2f}, {b:.2f}]" for task, (v, a, b) in of_tasks.items()]
        print(f"{name}: {', '.join(said)}")
    return 0


def summary(counts: dict, questions: list[Question]) -> dict:
    """Tokens per step, pooled over the questions of a task and over all, with 95 % bootstraps."""
    found = {}
    for name, of_questions in counts.items():
        there = [q for q in questions if str(q.id) in of_questions]
        rows = [of_questions[str(q.id)] for q in there]
        tasks = tasks_of(q.category for q in there)
        found[name] = {
            task: bootstrap(
                pooled, [rows[i]["emitted"] for i in places], [rows[i]["steps"] for i in places]
            )
            for task, places in tasks.items()
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
