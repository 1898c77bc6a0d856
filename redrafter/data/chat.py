"""From the content of a row to token ids, and to the tokens that are to be learned from.

What a row may hold stands in `formats.py`. The tokenizer's own chat template is used; without one
the messages stand one below the other, behind the tokens that the tokenizer puts first (BOS). Which
tokens are the assistant's is always found in the rendered *text* and carried over to tokens by
their offsets: never by comparing token ids, which fails where a tokenizer joins characters across
the border.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.formats import (
    Messages,
    field,
    format_of,
    messages_of,
    shortened,
    turns_of,
)
from redrafter.data.show import marked

Span = tuple[int, int]

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """Makes token ids of rows. `auto` is decided by the first row that it is given.

    Every InputError begins with the `where` of the row and names the remedy.
    """

    def __init__(self, tokenizer: Any, config: SourceConfig) -> None:
        """tokenizer: of the target. Raises InputError for settings that do not go together."""
        if tokenizer is None:
            raise InputError(
                f"{config.path}: the target has no tokenizer, so nothing can be read from text"
            )
        named = config.prompt_column is not None
        if named != (config.format == "columns") and not (named and config.format == "auto"):
            raise InputError(
                f"{config.path}: format {config.format} with prompt_column "
                f"{config.prompt_column!r}; set both for named columns, or neither"
            )
        if config.answer_column is not None and not named:
            raise InputError(f"{config.path}: answer_column needs prompt_column and format columns")
        self.tokenizer, self.config = tokenizer, config
        self._columns = (config.prompt_column, config.answer_column)
        self._format = "columns" if named else config.format
        self._detected = False
        self._template = None
        if getattr(tokenizer, "chat_template", None):
            self._template = tokenizer.get_chat_template()
        # What a BOS (and an EOS) of the tokenizer's own adds to any text.
        self._n_special = len(tokenizer("").input_ids)

    # ------------------------------------------------------------ what callers want

    def prompt(self, content: dict[str, Any], where: str) -> tuple[int, ...]:
        """What stands before the answer that is to be generated.

        Of messages all before the last assistant message, of turns the first one, of a text its
        first `text_prompt_tokens` tokens.
        """
        if self._format_for(content, where) == "text":
            ids = self._ids(field(content, "text", str, where))[: self._n_text_prompt()]
        else:
            messages = self._messages(content, where, answered=False)
            last = _last_answer(messages)
            messages = messages if last is None else messages[:last]
            if not messages:
                raise InputError(f"{where}: nothing stands before the last assistant message")
            ids = self._ids(self._render(messages, True, where))
        if not ids:
            raise InputError(f"{where}: the prompt is empty; remove the row")
        return tuple(ids)

    def text(self, content: dict[str, Any], where: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """(token ids, supervised): the row up to the end of its last assistant message.

        supervised: True for tokens that lie wholly in an assistant's turn, from the first
            character after the generation prompt to its end-of-turn token, included; of a `text`
            for the tokens behind the prompt
        Raises InputError that shows the row where all tokens or none would be supervised.
        """
        form = self._format_for(content, where)
        if form == "text":
            ids = self._ids(field(content, "text", str, where))
            n_prompt = self._n_text_prompt()
            supervised = [i >= n_prompt for i in range(len(ids))]
        else:
            messages = self._messages(content, where, answered=True)
            last = _last_answer(messages)
            if last is None:
                raise InputError(
                    f"{where}: no assistant message to learn from (format {form}, keys "
                    f"{sorted(content)}); let the target answer the prompts, or name the column "
                    "of the answers"
                )
            ids, supervised = self._learned(messages[: last + 1], where)
        if all(supervised) or not any(supervised):
            raise self._one_sided(ids, supervised, form, where)
        return tuple(ids), tuple(supervised)

    def turns(self, content: dict[str, Any], where: str) -> list[Messages]:
        """What is said before each of the assistant's answers, in order; not of a `text`."""
        form = self._format_for(content, where)
        if form == "text":
            raise InputError(f"{where}: a text asks nothing; give rows of another format")
        return self._telling(turns_of, content, form, where, self._columns)

    def conversation(self, messages: Messages, where: str) -> tuple[int, ...]:
        """A chat up to where the assistant would begin."""
        return tuple(self._ids(self._render(messages, True, where)))

    # ------------------------------------------------------------ what a row says

    def _format_for(self, content: dict[str, Any], where: str) -> str:
        if self._format == "auto":
            self._format, self._detected = format_of(content, where), True
        return self._format

    def _messages(self, content: dict[str, Any], where: str, answered: bool) -> Messages:
        """answered: look for an answer beside the question, too."""
        form = self._format_for(content, where)
        return self._telling(messages_of, content, form, where, self._columns, answered)

    def _telling(self, read: Callable, content: dict, form: str, where: str, *more: Any) -> Any:
        """read(...), whose errors say so where the format was guessed."""
        try:
            return read(content, form, where, *more)
        except InputError as error:
            if self._detected:
                raise InputError(f"{error} (format auto saw {form} in the first row)") from None
            raise

    # ------------------------------------------------------------ text to tokens

    def _ids(self, text: str) -> list[int]:
        return self._encode(text).input_ids

    def _encode(self, text: str, **options: Any) -> Any:
        # A template writes the special tokens itself; what it leaves out is left out.
        special = self._template is None or self._format == "text"
        return self.tokenizer(text, add_special_tokens=special, verbose=False, **options)

    def _n_text_prompt(self) -> int:
        return self._n_special + self.config.text_prompt_tokens

    def _render(self, messages: Messages, generate: bool, where: str) -> str:
        """Messages as text; with generate, up to where the assistant would begin."""
        if self._template is None:
            return "\n".join(message.get("content", "") for message in messages)
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program of somebody else's
            raise self._refused(error, where) from error

    @staticmethod
    def _refused(error: Exception, where: str) -> InputError:
        return InputError(
            f"{where}: the chat template refuses these messages ({type(error).__name__}: {error}); "
            "mend the row, or give the tokenizer another chat template"
        )

    # ------------------------------------------------------------ which tokens are learned

    def _learned(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        """Ids and mask of messages that end with an assistant's."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{where}: this tokenizer does not say which characters a token covers, so that "
                "answers cannot be told from prompts; load a fast one (a tokenizer.json)"
            )
        if self._template is not None and _TAG.search(self._template):
            text, spans = self._tagged(messages, where)
            if self.config.supervise == "last":
                # Tags are not tied to messages; those of the earlier ones come first.
                spans = spans[len(self._tagged(messages[:-1], where)[1]) :]
        else:
            text, spans = self._by_prefixes(messages, where)
        encoded = self._encode(text, return_offsets_mapping=True)
        ids = encoded.input_ids
        return ids, self._inside(ids, encoded.offset_mapping, text, spans)

    def _tagged(self, messages: Messages, where: str) -> tuple[str, list[Span]]:
        """The rendered text, and the characters between `{% generation %}` tags.

        transformers' own token mask is made from the same spans, but counts a token in that only
        begins or ends there.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages], chat_template=self._template,
                return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:  # as above
            raise self._refused(error, where) from error
        return texts[0], [(start, end) for start, end in spans[0]]

    def _by_prefixes(self, messages: Messages, where: str) -> tuple[str, list[Span]]:
        """The rendered text, and what each assistant message adds to the text before it."""
        text = self._render(messages, False, where)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for i in answers if self.config.supervise == "all" else answers[-1:]:
            before = self._render(messages[:i], True, where) if i else ""
            after = self._render(messages[: i + 1], False, where)
            if not (after.startswith(before) and text.startswith(after)):
                wrong = after if after.startswith(before) else before
                raise self._not_a_prefix(wrong, text, i, where)
            spans.append((len(before), len(before) + self._turn_chars(after[len(before) :])))
        return text, spans

    def _turn_chars(self, turn: str) -> int:
        """Characters of a turn without the blanks that a template puts behind its end-of-turn
        token (ChatML's newline): nobody generates them."""
        stripped = turn.rstrip()
        added = self.tokenizer.added_tokens_decoder.values()
        ended = any(token.content.strip() and stripped.endswith(token.content) for token in added)
        return len(stripped) if ended else len(turn)

    def _inside(
        self, ids: list[int], offsets: list[Span], text: str, spans: list[Span]
    ) -> list[bool]:
        """Which tokens lie in one of the spans with every character they stand for.

        offsets: (first, end) characters of every token. Some tokenizers leave the blanks of a
            token out of them (`trim_offsets`), down to (n, n) for a token of blanks only: such a
            token begins where the one before it ended.
        """
        supervised, end_before, at = [], 0, 0
        starts_after = [start for start, _ in offsets[1:]] + [len(text)]
        for token, (start, end), after in zip(ids, offsets, starts_after, strict=True):
            while at < len(spans) and spans[at][1] < end:
                at += 1
            first, last = spans[at] if at < len(spans) else (len(text), len(text))
            start = min(start, end_before) if start == end else start
            # A BOS that the tokenizer adds covers no characters at all.
            inside = first <= start < end <= last
            if inside and (end_before < first or last < after):  # next to a border, behind a gap
                piece = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
                leading = min(len(piece) - len(piece.lstrip()), start - end_before)
                trailing = min(len(piece) - len(piece.rstrip()), after - end)
                inside = first <= start - max(0, leading) and end + max(0, trailing) <= last
            supervised.append(inside)
            end_before = max(end_before, end)
        return supervised

    # ------------------------------------------------------------ what can go wrong

    def _not_a_prefix(self, part: str, text: str, index: int, where: str) -> InputError:
        same = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), None)
        same = min(len(part), len(text)) if same is None else same
        return InputError(
            f"{where}: the chat template has no {{% generation %}} tags and renders message "
            f"{index + 1} differently once more messages follow: {part[same : same + 60]!r} "
            f"becomes {text[same : same + 60]!r} after {text[max(0, same - 40) : same]!r}. Put "
            "{% generation %}...{% endgeneration %} around the assistant's part of the template, "
            "or set supervise: last"
        )

    def _one_sided(
        self, ids: list[int], supervised: list[bool], form: str, where: str
    ) -> InputError:
        if form == "text":
            remedy = (
                f"the first {self.config.text_prompt_tokens} tokens are the prompt: change "
                "text_prompt_tokens, or remove the row"
            )
        else:
            remedy = (
                "look at what the chat template puts between its {% generation %} tags, and at "
                "the roles of the row"
            )
        return InputError(
            f"{where}: {'all' if any(supervised) else 'none'} of the {len(ids)} tokens would be "
            f"learned from; {remedy}. The row, learned tokens in brackets:\n"
            f"{shortened(marked(ids, supervised, self.tokenizer, color=False))}"
        )


def _last_answer(messages: Messages) -> int | None:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return answers[-1] if answers else None
