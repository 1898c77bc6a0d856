"""`data/answers.py`: let the target answer prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import MakeAnswersConfig
from redrafter.contracts import Drafter, InputError
from redrafter.processes import say

if TYPE_CHECKING:
    from torch.nn import Module

    from redrafter.data.answers import Answerer
    from redrafter.targets.model import Target

_DESCRIPTION = """\
Second stage of the data: the target's own answers, which is what a draft head should learn from.

  python data/answers.py --target.path MODEL --prompts runs/prompts --output_dir runs/answers

  python data/answers.py --target.path MODEL --source.path CHATS.jsonl --output_dir runs/answers
      conversations: every turn, each put after the target's own earlier answers

  accelerate launch --multi_gpu --num_processes 8 data/answers.py ...
      the same answers, made by eight processes (of one or several machines that share the folder)

  python data/answers.py --answers.server http://HOST:8000/v1 --target.path MODEL ...
      answers of a server (vLLM, SGLang, TGI, llama.cpp, ...) that serves the same model; a few of
      its greedy answers are compared with the target's own first

Goes on where it stopped after an interruption. An answer depends on its prompt, the temperature
and the seed, not on the batch or on how it was drafted.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        MakeAnswersConfig, argv, "data/answers.py", _DESCRIPTION, plan="data_jobs:plan_answers"
    )
    from redrafter.data.answers import build_answers
    from redrafter.data.build_rows import report
    from redrafter.data.conversations import build_conversations, cut_turns
    from redrafter.data.store import Store
    from redrafter.evaluation.models import load_both

    check(config)
    prompts = None if config.prompts is None else Store(config.prompts, "prompts")
    target, head = load_both(config)
    if config.source is not None and target.tokenizer is None:
        raise InputError(f"target.path: {target.name} has no tokenizer, and conversations are text")
    how = {
        "seed": config.seed, "drafter": drafter_of(config, target, head),
        "answerer": server_of(config, target),
    }  # fmt: skip
    if prompts is not None:
        store = build_answers(target, prompts, config.answers, config.output_dir, **how)
    else:
        store = build_conversations(
            target, config.source, config.answers, config.output_dir, **how
        )  # fmt: skip
    say(report(store))
    if prompts is None:
        say(
            f"  turns of {store.manifest['conversations']} conversations; max_new_tokens (or the "
            f"context) cut {cut_turns(store, target)} answers short"
        )
    return 0


def check(config: MakeAnswersConfig) -> None:
    """Raises InputError for options that go together, or not."""
    if (config.drafter == "head") != (config.head is not None):
        raise InputError("drafter head goes with --head FOLDER, and only with it")
    if config.answers.server is not None and config.drafter != "none":
        raise InputError("answers.server: a server drafts by itself; leave --drafter out")
    if (config.prompts is None) == (config.source is None):
        raise InputError(
            "give either --prompts, the folder that data/prepare.py made, or --source.path, "
            "conversations of which every turn is answered"
        )


def server_of(config: MakeAnswersConfig, target: Target) -> Answerer | None:
    """The server that answers; None where the target does so here."""
    if config.answers.server is None:
        return None
    from redrafter.data.served import ServedAnswers
    from redrafter.evaluation.served_sample import compare_sample

    return ServedAnswers(target, config.answers, partial(compare_sample, target))


def drafter_of(
    config: MakeAnswersConfig, target: Target, head: Module | None
) -> Callable[[], Drafter] | None:
    """Makes the drafter; None where nothing drafts."""
    from redrafter.drafters.head import HeadDrafter
    from redrafter.drafters.lookup import PromptLookup

    makers = {
        "none": None,
        "lookup": PromptLookup,
        "head": lambda: HeadDrafter(head, target, config.tree),
    }
    return makers[config.drafter]
