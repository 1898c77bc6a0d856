"""From the content of a row to token ids, and to the tokens that are to be learned from.

What a row may hold stands in `formats.py`. The tokenizer's own chat template is used
(`template.py`); without one the messages stand one below the other, behind the tokens that the
tokenizer puts first (BOS). Which characters are learned stands in `borders.py`, and that nothing of
a row is left out in `lost.py`. Characters become tokens by their offsets: never by comparing token
ids, which fails where a tokenizer joins characters across the border.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.borders import Learned, learned_texts
from redrafter.data.formats import (
    Messages,
    field,
    format_of,
    is_learned,
    messages_of,
    shortened,
    tools_of,
    turns_of,
)
from redrafter.data.lost import check_rendered
from redrafter.data.show import marked
from redrafter.data.template import Span, Template, Tools
from redrafter.targets.text import added, encode, encode_whole

#: token ids, and which of them are learned
Text = tuple[tuple[int, ...], tuple[bool, ...]]


class Renderer:
    """Makes token ids of rows. `auto` is decided by the first row that it is given.

    Every InputError begins with the `where` of the row and names the remedy.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: SourceConfig,
        day: str | None = None,
        eos: Collection[int] | None = None,
    ) -> None:
        """tokenizer: of the target; day: the date that a template may print, YYYY-MM-DD (None:
        today's); eos: token ids that end the target's texts (None: not known; only `texts` asks).
        Raises InputError for settings that do not go together."""
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
        self._template = Template(tokenizer, day, eos)
        # What the tokenizer adds of its own to any text: a BOS before it, an EOS behind it.
        self._n_before, self._n_behind = map(len, added(tokenizer))

    # ------------------------------------------------------------ what callers want

    def prompt(self, content: dict[str, Any], where: str) -> tuple[int, ...]:
        """What stands before the answer that is to be generated.

        Of messages all, up to an answer that they may end with; of turns the first one, of a text
        its first `text_prompt_tokens` tokens.
        """
        if self._format_for(content, where) == "text":
            ids = self._prompt_ids(field(content, "text", str, where))
            ids = ids[: self._n_before + self.config.text_prompt_tokens]
        else:
            messages = self._messages(content, where, answered=False)
            if messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if not messages:
                raise InputError(f"{where}: nothing stands before the last assistant message")
            tools = tools_of(content, where)
            text = self._template.render(messages, True, where, tools)
            check_rendered(messages, tools, text, where)
            ids = self._prompt_ids(text)
        if not ids:
            raise InputError(f"{where}: the prompt is empty; remove the row")
        return tuple(ids)

    def texts(self, content: dict[str, Any], where: str) -> list[Text]:
        """(token ids, supervised) of each text of the row, up to the end of its last answer.

        It is one text, but where the chat template rewrites what was said before: there each
        answer is rendered as the server saw it. None where the row excludes all of its answers.

        supervised: True for tokens that lie wholly in an assistant's turn, from the first
            character after the generation prompt to its end-of-turn token, included; of a `text`
            for the tokens behind the prompt
        Raises InputError that shows the row where all tokens or none would be supervised.
        """
        form = self._format_for(content, where)
        if form == "text":
            ids = self._encode(field(content, "text", str, where))["input_ids"]
            n_prompt = self._n_before + self.config.text_prompt_tokens
            return [self._told_apart(ids, [i >= n_prompt for i in range(len(ids))], form, where)]
        messages = self._messages(content, where, answered=True)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise InputError(
                f"{where}: no assistant message to learn from (format {form}, keys "
                f"{sorted(content)}); let the target answer the prompts, or name the column "
                "of the answers"
            )
        tools = tools_of(content, where)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{where}: this tokenizer does not say which characters a token covers, so that "
                "answers cannot be told from prompts; load a fast one (a tokenizer.json)"
            )
        found = learned_texts(self._template, messages, self.config.supervise, where, tools)
        wanted = answers if self.config.supervise == "all" else answers[-1:]
        if not found and all(map(is_learned, wanted)):
            self._template.render(messages, False, where, tools)  # if it is refused, that is why
            raise InputError(f"{where}: nothing stands before its answer; remove the row")
        for text in found:
            turns = {i: text.text[start:end] for i, (start, end) in text.turns.items()}
            check_rendered(messages[: max(turns) + 1], tools, text.text, where, turns)
        return [self._told_apart(*self._masked(text), form, where) for text in found]

    def turns(self, content: dict[str, Any], where: str) -> list[Messages]:
        """What is said before each of the assistant's answers, in order; not of a `text`."""
        form = self._format_for(content, where)
        if form == "text":
            raise InputError(f"{where}: a text asks nothing; give rows of another format")
        return self._telling(turns_of, content, form, where, self._columns)

    def conversation(
        self, messages: Messages, where: str, tools: Tools | None = None
    ) -> tuple[int, ...]:
        """A chat up to where the assistant would begin. Its answers may be the target's own, of
        which a template keeps what it likes."""
        text = self._template.render(messages, True, where, tools)
        others = {message["role"] for message in messages} - {"assistant"}
        check_rendered(messages, tools, text, where, roles=others)
        return tuple(self._prompt_ids(text))

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

    def _prompt_ids(self, text: str) -> list[int]:
        """Without an EOS of the tokenizer's own: the text goes on."""
        if self._completed():
            return encode(self.tokenizer, text)
        return self._encode(text)["input_ids"]

    def _completed(self) -> bool:
        """Whether the tokenizer puts tokens of its own around a text. A template writes the special
        tokens itself; what it leaves out is left out."""
        return not self._template.exists or self._format == "text"

    def _encode(self, text: str, **options: Any) -> Any:
        if self._completed():
            return encode_whole(self.tokenizer, text, **options)
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)

    # ------------------------------------------------------------ which tokens are learned

    def _masked(self, learned: Learned) -> tuple[list[int], list[bool]]:
        """Ids and mask of a text whose characters to learn are known."""
        text = learned.text
        encoded = self._encode(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        mask = self._inside(ids, encoded["offset_mapping"], text, learned.spans)
        if self._completed() and self._n_behind and learned.end == len(text):
            mask[-self._n_behind :] = [True] * self._n_behind  # it ends the last answer
        return ids, mask

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

    def _told_apart(self, ids: list[int], supervised: list[bool], form: str, where: str) -> Text:
        """Raises InputError where all or none is learned."""
        if all(supervised) or not any(supervised):
            raise self._one_sided(ids, supervised, form, where)
        return tuple(ids), tuple(supervised)

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
