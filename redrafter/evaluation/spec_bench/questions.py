"""Questions of a benchmark, and the chats that they become: any chat template, own history.

A benchmark's questions have turns. A way of decoding answers the first, its own answer becomes part
of what the second is asked after, and so on: histories are not shared between methods.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter.config import SourceConfig, SpecBenchConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer
from redrafter.data.day import day_of
from redrafter.data.formats import Messages, category_of, format_of, tools_of
from redrafter.data.sources import Source, read_source
from redrafter.data.template import Tools
from redrafter.targets.model import Target
from redrafter.targets.text import tokenizer_of

#: For models that were never given a template; `--chat_template question`.
QUESTION_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] | trim }}\nAnswer:"
    "{% else %}{{ m['content'] | trim }}\n\n"
    "{% endif %}{% endfor %}"
)
# Where the benchmarks keep the names of their questions.
_ID_KEYS = ("question_id", "task_id", "prompt_id", "id")


@dataclass(frozen=True)
class Question:
    """turns: what is said before each answer; row: 0-based, in the source; where: `file:line`, for
    messages; tools: schemas that the chat template is given."""

    id: int | str
    row: int
    category: str
    turns: list[Messages]
    where: str
    tools: Tools | None = None


class PromptTooLong(InputError):
    """A prompt that leaves no room for an answer, where the rule is not to cut it."""


class Chat:
    """Renders messages for a target, and keeps prompts within its context.

    rule: for prompts longer than `room` tokens (None: any length), see SpecBenchConfig.long_prompts
    day: that the template prints, None where it prints none
    """

    def __init__(self, renderer: Renderer, room: int | None, rule: str, day: str | None = None):
        self.renderer, self.room, self.rule, self.day = renderer, room, rule, day
        self.tokenizer = renderer.tokenizer

    def prompt(
        self, messages: Messages, where: str, tools: Tools | None = None
    ) -> tuple[list[int], int]:
        """(token ids up to where the assistant begins, how many were cut away).

        tools: that the question offers
        Cut are the first ones behind a BOS: the question's end and the generation prompt stay.
        Raises PromptTooLong, InputError where the template refuses the messages.
        """
        ids = list(self.renderer.conversation(messages, where, tools))
        if self.room is None or len(ids) <= self.room:
            return ids, 0
        n_cut = len(ids) - self.room
        if self.rule != "cut":
            raise PromptTooLong(
                f"{where}: a prompt of {len(ids)} tokens, only {self.room} leave room for "
                "max_new_tokens in the target's context; set long_prompts cut or skip, or lower "
                "max_new_tokens"
            )
        kept = int(ids[0] == self.tokenizer.bos_token_id and self.room > 1)
        return ids[:kept] + ids[kept + n_cut :], n_cut

    def text(self, tokens: list[int]) -> str:
        """An answer as it stands in answer files and in the history: no special tokens, stripped
        (Spec-Bench, evaluation/eval.py)."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def open_questions(
    target: Target, config: SpecBenchConfig, begun: dict[str, Any] | None = None
) -> tuple[Chat, list[Question], str]:
    """(chat, questions in the order of the source, digest of the source).

    begun: what identifies the run that this one goes on with, if any (see `data/day.py`)

    Raises InputError, naming file and line, for a row that is no question, and for ids that occur
    twice; naming the option where there is no chat template or no room in the context.
    """
    given = SourceConfig(
        path=config.questions, format=config.format, prompt_column=config.prompt_column,
        split=config.split, subset=config.subset, revision=config.revision,
        n_rows=_rows_needed(config),
    )  # fmt: skip
    tokenizer = tokenizer_of(target, config.questions)
    source = read_source(given)
    form = "columns" if config.prompt_column is not None else str(config.format)
    if form == "auto":
        row, content = source.first()
        form = format_of(content, source.where(row))
    tokenizer = with_template(tokenizer, config.chat_template, target.name)
    room = None if target.max_positions is None else target.max_positions - config.max_new_tokens
    if room is not None and room < 1:
        raise InputError(
            f"max_new_tokens: {config.max_new_tokens} leaves no room for a prompt in the context "
            f"of {target.max_positions} tokens of {target.name}"
        )
    day = day_of(tokenizer, begun)
    renderer = Renderer(tokenizer, given, day)
    every = list(_questions(source, renderer, config.category or form))
    if not (kept := every[config.question_begin :: config.question_step]):
        raise InputError(
            f"question_begin: {config.question_begin} leaves out all {len(every)} rows of "
            f"{config.questions}; lower it"
        )
    return Chat(renderer, room, config.long_prompts, day), kept, source.digest


def _rows_needed(config: SpecBenchConfig) -> int | None:
    """Rows of the source up to the last one that is taken; None: all."""
    if config.n_questions is None:
        return None
    return config.question_begin + (config.n_questions - 1) * config.question_step + 1


def _questions(source: Source, renderer: Renderer, default: str) -> Iterable[Question]:
    seen: dict[int | str, str] = {}
    for row, content in source:
        where = source.where(row)
        name = next((content[key] for key in _ID_KEYS if key in content), row + 1)
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise InputError(f"{where}: the question's id {name!r} is neither a number nor a text")
        if name in seen:
            raise InputError(
                f"{where}: question id {name!r} stands in {seen[name]} already; rename one of them"
            )
        seen[name] = where
        turns = renderer.turns(content, where)
        category, tools = category_of(content) or default, tools_of(content, where)
        yield Question(name, row, category, turns, where, tools)


def with_template(tokenizer: Any, choice: str | None, name: str) -> Any:
    """A copy of a tokenizer with the chat template of `--chat_template`.

    choice: as SpecBenchConfig.chat_template. Raises InputError where there is none.
    """
    if choice is None:
        if getattr(tokenizer, "chat_template", None):
            return tokenizer
        raise InputError(
            f"chat_template: the tokenizer of {name} has none; give the file of its Jinja "
            "template, or `--chat_template question` for a plain `Question: ... Answer:`"
        )
    if choice == "question":
        template = QUESTION_TEMPLATE
    else:
        try:
            template = Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"chat_template: {choice!r} cannot be read ({error}); give the file of a Jinja "
                "template, or `question`"
            ) from None
        if not template.strip():
            raise InputError(f"chat_template: {choice} is empty")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer
