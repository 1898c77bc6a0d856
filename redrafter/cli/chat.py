"""`redrafter chat`: a conversation, streamed, with what drafting saved below every answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import ChatConfig
from redrafter.contracts import Generation, InputError

_DESCRIPTION = """\
Talk to a model; its answers are streamed, and are those of plain decoding whatever drafts.

  redrafter chat --target.path MODEL --head HEAD
  redrafter chat --target.path MODEL --drafter "mix(head:6x5,suffix:16x1):nodes=17" --head HEAD
  redrafter chat --target.path MODEL --head HEAD --learn runs/learned   # HEAD learns what is said

One line is one message. /reset forgets the conversation, Ctrl-D ends it; Ctrl-C ends an answer.
"""
_RESET = "/reset"
_NOTHING_LEARNS = "learn: it is a head that learns: give --head, and a drafter that drafts by it"


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        ChatConfig, argv, "redrafter chat", _DESCRIPTION, names="describe_drafting", alone=True
    )
    from redrafter.evaluation.models import load_both, load_draft
    from redrafter.targets.text import tokenizer_of

    wanted = check_drafter(config)
    target, head = load_both(config)
    tokenizer = tokenizer_of(target, "a conversation")
    if not getattr(tokenizer, "chat_template", None):
        note = "has no chat template: messages stand one below the other"
        print(f"warning: the tokenizer of {target.name} {note}", file=sys.stderr)
    from redrafter.generation import load_strategy

    strategy = load_strategy(
        target, config.drafter, head=head, tree=config.tree,
        draft_model=load_draft(config) if "draft" in wanted else None,
        bigrams=config.bigrams, probed=config.probed, reference=config.reference,
    )  # fmt: skip
    try:
        if config.learn is None:
            converse(target, strategy, config, lines_of_user(), _write)
        else:
            _converse_learning(target, head, strategy, config)
    except KeyboardInterrupt:  # between answers
        print()
    return 0


def _converse_learning(target: Any, head: Any, strategy: Any, config: ChatConfig) -> None:
    """The head learns meanwhile, and is kept however the conversation ends."""
    from transformers.utils import logging

    from redrafter.learning.drift import watched
    from redrafter.learning.learner import Learner

    logging.disable_progress_bar()  # of writing checkpoints, amid an answer
    alarm = watched(config, config.drafter, strategy.drafter, head)  # of the head as it was
    if isinstance(alarm, str):
        _note(alarm)
        alarm = None
    with Learner(head, target, config.learn, config.learning) as learner:
        converse(target, learner.watching(strategy), config, lines_of_user(), _write, alarm)


def check_drafter(config: ChatConfig) -> dict[str, int]:
    """The resources that the drafter needs. Raises InputError, before anything is loaded, for a
    name that is none, a resource that is not given, and where nothing can learn."""
    from redrafter.drafters.build import MISSING, needs
    from redrafter.drafting import parse_strategy

    if config.drafter in (None, "plain"):
        if config.learn is not None and (config.drafter or config.head is None):
            raise InputError(_NOTHING_LEARNS)
        return {}
    try:
        wanted = needs(parse_strategy(config.drafter).drafter)
        for name in wanted:
            if name != "price" and getattr(config, name, None) is None:
                raise InputError(f"{config.drafter!r} needs {MISSING[name]}")
    except InputError as error:
        raise InputError(f"drafter: {error}") from None
    if config.learn is not None and "head" not in wanted:
        raise InputError(_NOTHING_LEARNS)
    return wanted


def converse(
    target: Any,
    strategy: Any,
    config: ChatConfig,
    lines: Iterator[str],
    write: Callable[[str], Any],
    alarm: Any = None,
) -> None:
    """Answer every line; what cannot be answered is said, and forgotten. alarm: a DriftAlarm"""
    from redrafter.generation import generate
    from redrafter.targets.text import TextStream

    first = [] if config.system is None else [{"role": "system", "content": config.system}]
    history, seed = list(first), config.seed
    for line in lines:
        said = line.strip()
        if said == _RESET:
            history = list(first)
        elif re.fullmatch(r"/\w+", said):
            _complain(f"no command {said}; {_RESET} forgets the conversation, Ctrl-D ends it")
        elif said:
            asked = [*history, {"role": "user", "content": said}]
            stream = TextStream(target.tokenizer, write)
            try:
                made = generate(
                    target, messages=asked, draft=strategy, max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature, seeds=seed, streamer=stream,
                )  # fmt: skip
            except KeyboardInterrupt:
                write("\n[interrupted: as if it had not been asked]\n")
                continue
            except InputError as error:
                _complain(f"{error} ({_RESET} forgets the conversation)")
                continue
            write(f"\n[{shown(made)}]\n")
            if alarm and (drifted := alarm.observe(made.stats, config.max_new_tokens)):
                _note(drifted)
            history = [*asked, {"role": "assistant", "content": made.extra["texts"][0]}]
            seed += 1


def shown(made: Generation) -> str:
    """What an answer took, in one line."""
    stats, n = made.stats, len(made.tokens[0])
    parts = [f"{n} token{'s' * (n != 1)}"]
    if stats.tokens_per_step is not None:
        parts.append(f"{stats.tokens_per_step:.2f} per step")
    if drafted := sum(stats.drafted_at):
        accepted = sum(stats.accepted_at)
        parts.append(f"{accepted} of {drafted} drafted levels accepted")
    if made.finish[0] == "length":
        parts.append("cut at max_new_tokens or the context's end")
    return ", ".join(parts)


def lines_of_user() -> Iterator[str]:
    """Lines of the terminal, with its editing, or of whatever stdin is; to their end."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - input() then edits lines and remembers them

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
