"""A tokenizer's chat template: messages as text, as a server would render them, on one day.

A template may print the day's date (`strftime_now`). transformers gives it the clock, and a render
argument of that name cannot take its place: arguments are made plain data first. So the name is
set in the compiled template for as long as a text is rendered: the same row is then the same
tokens tomorrow, where a run goes on.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from typing import Any, TypeVar

from redrafter.contracts import InputError
from redrafter.data.day import CLOCK, prints_date
from redrafter.data.formats import Messages, calls_of, with_calls
from redrafter.data.lost import thought_of

Span = tuple[int, int]
Tools = list[dict[str, Any]]
Made = TypeVar("Made")

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: what a user says where the text matters only up to there
_PROBE = "0123456789"


class Template:
    """Renders messages. Without a chat template they stand one below the other.

    exists: whether there is a chat template
    """

    def __init__(
        self, tokenizer: Any, day: str | None = None, eos: Collection[int] | None = None
    ) -> None:
        """day: the date that the template may print, YYYY-MM-DD; None takes today's, once.
        eos: token ids that end the target's texts; None where nobody knows"""
        self.tokenizer = tokenizer
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        # Noon: a template that prints the hour has no better one.
        given = date.today() if day is None else date.fromisoformat(day)
        self._moment = datetime.combine(given, time(12))
        self._dated = prints_date(tokenizer)
        self._eos = getattr(tokenizer, "eos_token", None) or "\0"
        self._ends: dict[str, int] = {}
        self._said_endless = False
        tokens = [t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        self._stops = eos
        self._tokens = tuple(sorted((t for t in tokens if t.strip()), key=len, reverse=True))

    def render(
        self, messages: Messages, generate: bool, where: str, tools: Tools | None, **switches: Any
    ) -> str:
        """Messages as text; with generate, up to where the assistant would begin.

        switches: more that the template may ask for. Raises InputError where it refuses them.
        """
        if not self.exists:
            return "\n".join(message.get("content", "") for message in messages)

        def apply(given: Messages) -> str:
            with self._day(tools):
                return self.tokenizer.apply_chat_template(
                    given, tools=tools, tokenize=False, add_generation_prompt=generate, **switches
                )

        return self._in_some_form(messages, where, apply, lambda text: text)

    def spans(
        self, messages: Messages, where: str, tools: Tools | None, **switches: Any
    ) -> tuple[str, list[Span] | None]:
        """The text of `render`, and the characters between its `{% generation %}` tags (None of a
        template without).

        transformers' own token mask is made from the same spans, but counts a token in that only
        begins or ends there.
        """
        if not self.exists or not _TAG.search(self._source(tools)):
            return self.render(messages, False, where, tools, **switches), None
        from transformers.utils.chat_template_utils import render_jinja_template

        def apply(given: Messages) -> tuple[str, list[Span]]:
            with self._day(tools):
                texts, spans = render_jinja_template(
                    conversations=[given], tools=tools, chat_template=self._source(tools),
                    return_assistant_tokens_mask=True,
                    **{**self.tokenizer.special_tokens_map, **switches},
                )  # fmt: skip
            return texts[0], [(start, end) for start, end in spans[0]]

        return self._in_some_form(messages, where, apply, lambda made: made[0])

    def knows(self, switch: str) -> bool:
        """Whether the template asks for a variable of this name."""
        return self.exists and re.search(rf"\b{switch}\b", self._source(None)) is not None

    def run_at_end(self, text: str) -> tuple[int, list[int]]:
        """Where the special tokens begin that a text ends with, and where each of them ends.

        Blanks may stand between them; without any it is the text's length, and none.
        """
        begin, ends, left = len(text), [], text.rstrip()
        while left.endswith(self._tokens):
            ends.append(len(left))
            begin = len(left) - len(next(t for t in self._tokens if left.endswith(t)))
            left = text[:begin].rstrip()
        return begin, ends[::-1]

    def end_of_turn(
        self, text: str, start: int, messages: Messages, where: str, tools: Tools | None
    ) -> int:
        """Where the last message of a rendered text ends, its end-of-turn token included.

        start: where it begins. Nobody generates the blanks behind that token (ChatML's newline),
        nor an EOS that stands only at the end of a text (Phi's): of several tokens the turn's are
        those that stay once a user goes on. Where none stays (a last answer's token may be
        another than an earlier one's) it is the first. Behind an EOS nothing is generated.
        """
        ends = [end for end in self.run_at_end(text)[1] if end > start]
        stops = [n for n, end in enumerate(ends, 1) if text.endswith(self._eos, start, end)]
        ends = ends[: stops[0]] if stops else ends
        if len(ends) < 2:
            return ends[0] if ends else len(text)
        begin = max(start, self.run_at_end(text)[0])
        run = text[begin:]
        if run not in self._ends:
            later = self._once_answered(messages, where, tools)
            if later is None:
                return ends[-1]
            lengths = [end - begin for end in ends]
            kept = [n for n in lengths if run[:n] in later]
            self._ends[run] = kept[-1] if kept else lengths[0]
        return begin + self._ends[run]

    def stop_behind(
        self, whole: str, messages: Messages, role: str | None, where: str, tools: Tools | None
    ) -> str:
        """What a server would have generated behind a last message that ends with no token: as far
        as the one that begins the next turn, where the target's texts end with that (GLM's do).
        Nothing where they do not, or nobody knows; the first time that is said.

        whole: the rendered messages; role: who speaks next (None: a user, or the tool called)
        """
        if self._stops is None or not self.exists or self.run_at_end(whole)[1]:
            return ""
        role = role or ("tool" if calls_of(messages[-1]) else "user")
        later = self._once_answered(messages, where, tools, role) or ""
        said = whole.rstrip()
        answer = thought_of(messages[-1])[1].strip()
        behind = ""
        if later.startswith(said):
            behind = later[len(said) :]
        elif answer and answer in later:  # its thought is dropped once a user goes on
            behind = later.rpartition(answer)[2]
        token = next((t for t in self._tokens if behind.lstrip().startswith(t)), None)
        if token is not None and self.tokenizer.convert_tokens_to_ids(token) in self._stops:
            blanks = behind[: len(behind) - len(behind.lstrip())]
            return blanks.removeprefix(whole[len(whole.rstrip()) :]) + token
        if not self._said_endless:
            self._said_endless = True
            warnings.warn(_endless(token), stacklevel=2)
        return ""

    def _once_answered(
        self, messages: Messages, where: str, tools: Tools | None, role: str = "user"
    ) -> str | None:
        """Messages as they are rendered once a user goes on, up to what that one says. None where
        the template takes no such messages."""
        try:
            later = [*messages, {"role": role, "content": _PROBE}]
            return self.render(later, False, where, tools).rpartition(_PROBE)[0]
        except InputError:
            return None

    # ------------------------------------------------------------ how

    def _source(self, tools: Tools | None) -> str:
        """The template that a server takes: some tokenizers have another one for tools."""
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several, and none of them the default one
            raise InputError(f"the tokenizer names no chat template to take ({error})") from None

    @contextmanager
    def _day(self, tools: Tools | None) -> Iterator[None]:
        if not self._dated:
            yield
            return
        from transformers.utils import chat_template_utils

        names = chat_template_utils._compile_jinja_template(self._source(tools)).globals
        names[CLOCK] = self._moment.strftime
        try:
            yield
        finally:
            del names[CLOCK]  # the clock's own shows again: it stands in a map below

    def _in_some_form(
        self,
        messages: Messages,
        where: str,
        apply: Callable[[Messages], Made],
        text_of: Callable[[Made], str],
    ) -> Made:
        """apply(messages), with the arguments of tool calls as the template takes them: most print
        an object as JSON, some put a text as it is, and a few want a content beside the calls."""
        refusal: Exception | None = None
        for given in _forms(messages):
            try:
                made = apply(given)
            except Exception as error:  # a template is a program of somebody else's
                refusal = refusal or error
                continue
            if not _printed_by_python(given, text_of(made)):
                return made
        why = "it writes the arguments of a tool call as Python does"
        why = why if refusal is None else f"{type(refusal).__name__}: {refusal}"
        raise InputError(
            f"{where}: the chat template refuses these messages ({why}); "
            "mend the row, or give the tokenizer another chat template"
        ) from refusal


def _endless(token: str | None) -> str:
    behind = "no special token follows it"
    if token is not None:
        behind = f"{token!r}, which follows it, is not among the target's eos_token_id"
    return (
        f"the chat template ends an answer with no token of its own, and {behind}: nothing is "
        "learned of when to stop. If the model ends its answers with a token, name it under "
        "eos_token_id in generation_config.json, or give the tokenizer a template that writes it"
    )


def _forms(messages: Messages) -> Iterator[Messages]:
    yield messages
    if not any(calls_of(message) for message in messages):
        return
    as_text = [with_calls(message, json.dumps) for message in messages]
    yield as_text
    for given in (messages, as_text):
        yield [{"content": "", **message} if calls_of(message) else message for message in given]


def _printed_by_python(messages: Messages, text: str) -> bool:
    """Whether arguments stand in a text as Python writes a dictionary, which no model is taught."""
    given = [call.get("arguments") for message in messages for call in calls_of(message)]
    return any(a and isinstance(a, dict) and str(a) in text and "'" in str(a) for a in given)
