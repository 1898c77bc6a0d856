"""What of a chat is learned: what a server would have generated, turn by turn.

Of every assistant's turn the server was sent what stands before it, rendered with the generation
prompt. The turn is what follows that prompt up to its end-of-turn token: never the template's
head, its default system prompt, the role's header, or an EOS behind the turn. Where a template
writes none, the token that begins the next turn ends this one, if the target's texts end with it.
`{% generation %}` tags say what of that is to be learned.

    messages[:i], generation prompt   <|user|>hi<|end|><|assistant|>
    messages[: i + 1]                 <|user|>hi<|end|><|assistant|>yo<|end|><|eos|>
    learned                                                        ^^^^^^^^^

Turns share a text as long as each prompt goes on where the turn before it ended. Where a template
rewrites what was said before (it drops earlier thoughts, or writes another end of turn), the later
prompt is another text, and the turn a row of its own.

A generation prompt may open a thought (`<think>`) that the template does not write where it
renders the answer. The model says the rest of the thought, closes it and answers: so does the row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from redrafter.contracts import InputError
from redrafter.data.formats import Messages, calls_of, is_learned
from redrafter.data.lost import contains, thought_of
from redrafter.data.template import Span, Template, Tools

_WORD = r"[\w:|]*(?:think|thought|reason)\w*"
_OPENER = re.compile(rf"([<\[])({_WORD})([>\]])(\s*)\Z", re.IGNORECASE)
_SHUT = re.compile(
    rf"(?:([<\[]){_WORD}[>\]]\s*[<\[]/{_WORD}[>\]]|<\|channel>thought\s*<channel\|>)\s*\Z",
    re.IGNORECASE,
)
#: variables by which templates are told that no thought is wanted
_SWITCHES = ("enable_thinking", "thinking")
_SHOWN = 60  # characters of a difference


@dataclass
class Learned:
    """text: rendered messages, up to the last of `turns`; spans: the characters to learn; turns:
    the characters of each message that is learned from, by its number"""

    text: str
    spans: list[Span]
    turns: dict[int, Span]

    @property
    def end(self) -> int:
        """Where the last turn ends."""
        return max(end for _, end in self.turns.values())


def learned_texts(
    template: Template, messages: Messages, supervise: str, where: str, tools: Tools | None
) -> list[Learned]:
    """What of a chat is learned, as few texts as possible.

    supervise: `all` answers or the `last`. Those that a row excludes (`weight: 0`), and a greeting
    that nothing stands before, are not. Raises InputError where the template refuses the messages.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found: list[Learned] = []
    for i in answers if supervise == "all" else answers[-1:]:
        turn = None
        if is_learned(messages[i]):
            next_role = messages[i + 1]["role"] if i + 1 < len(messages) else None
            turn = _turn(template, messages[: i + 1], where, tools, next_role)
        if turn is None:
            continue
        if found and turn.text.startswith(found[-1].text[: found[-1].end]):
            before = found.pop()
            turn.spans, turn.turns = before.spans + turn.spans, before.turns | turn.turns
        found.append(turn)
    return found


@dataclass(frozen=True)
class _Turn:
    """prompt: what the server was sent; more: what it said before the part that `whole`, the
    rendered messages, has of it from `place` on (a thought); tags: as `Template.spans`"""

    prompt: str
    more: str
    place: int
    whole: str
    tags: list[Span] | None

    @property
    def said(self) -> str:
        return f"{self.more}{self.whole[self.place :]}"


def _turn(
    template: Template, messages: Messages, where: str, tools: Tools | None, next_role: str | None
) -> Learned | None:
    """The last message, behind what the server was sent. None where it could not be asked for."""
    asked = messages[:-1]
    if not asked:
        return None
    if not any(message["role"] in ("user", "tool") for message in asked):
        try:
            template.render(asked, True, where, tools)
        except InputError:
            return None  # there are templates that want a question
    turn = _thinking(template, messages, where, tools)
    text, start = turn.prompt + turn.said, len(turn.prompt)
    end = template.end_of_turn(text, start, messages, where, tools)
    if turn.tags is None:
        stop = template.stop_behind(turn.whole, messages, next_role, where, tools)
        text, end = f"{text}{stop}", end + len(stop)
        spans = [(start, end)]
    else:
        moved = len(text) - len(turn.whole)
        # What is put in before the answer belongs to a tag that holds the answer's beginning.
        spans = [
            (a + moved if a > turn.place else start, min(b + moved, end))
            for a, b in turn.tags if b > turn.place
        ]  # fmt: skip
        spans = [(a, b) for a, b in spans if a < b]
    return Learned(text, spans, {len(asked): (start, end)})


def _thinking(template: Template, messages: Messages, where: str, tools: Tools | None) -> _Turn:
    """The last message as the server said it that thinks by default; where that one does not think
    as the message does, as one that was told to, if the template can be."""
    thought, _ = thought_of(messages[-1])
    first: _Turn | None = None
    refusal: InputError | None = None
    told = [{s: thought is not None} for s in _SWITCHES if template.knows(s)]
    for switches in ({}, *told):
        try:
            turn = _behind(template, messages, where, tools, switches)
        except InputError as error:
            refusal = refusal or error
            continue
        if _thinks(turn, thought):
            return turn
        first = first or turn
    if first is None:
        assert refusal is not None
        raise refusal
    return first


def _thinks(turn: _Turn, thought: str | None) -> bool:
    """Whether a turn holds the message's thought; of a message without, that none was put in."""
    return not turn.more if thought is None else contains(turn.said, thought)


def _behind(
    template: Template,
    messages: Messages,
    where: str,
    tools: Tools | None,
    switches: dict[str, bool],
) -> _Turn:
    """The last message behind its generation prompt, which its rendering may not begin with."""
    prompt = template.render(messages[:-1], True, where, tools, **switches)
    whole, tags = template.spans(messages, where, tools, **switches)

    def turn(more: str, place: int) -> _Turn:
        return _Turn(prompt, more, place, whole, tags)

    opener = _OPENER.search(prompt)
    opened, closed = _tags(opener) if opener is not None else ("", "")
    said = whole[len(prompt) :]
    if whole.startswith(prompt) and (
        opener is None or (closed in said and not said.lstrip().startswith(opened))
    ):
        return turn("", len(prompt))
    thought, answer = thought_of(messages[-1])
    if opener is not None and whole.startswith(prompt[: opener.start()]):
        rest, line = whole[opener.start() :], "\n" if "\n" in opener[4] else ""
        opens, closes = re.escape(opened), re.escape(closed)
        kept = re.match(rf"\s*(?:{opens}(.*?))?{closes}\s*", rest, re.DOTALL)
        written = kept or re.match(rf"\s*(?:{opens}\s*)?", rest)
        if thought is None and kept is not None:
            thought = kept[1]
        more = f"{(thought or '').strip()}{line}{closed}{line * 2}"
        return turn(more, opener.start() + written.end())
    shut = _SHUT.search(prompt)  # a thought that is over before it began
    if shut is not None and whole.startswith(prompt[: shut.start()]):
        return turn("", shut.start())
    body = whole[: template.run_at_end(whole)[0]].rstrip()
    if answer.strip() and body.endswith(answer.strip()) and not calls_of(messages[-1]):
        return turn("", len(body) - len(answer.strip()))
    raise _another_beginning(prompt, whole, len(messages), where)


def _tags(opener: re.Match[str]) -> tuple[str, str]:
    """What opens a thought, and what closes it."""
    left, name, right = opener.groups()[:3]
    return f"{left}{name}{right}", f"{left}/{name}{right}"


def _another_beginning(prompt: str, whole: str, number: int, where: str) -> InputError:
    pairs = enumerate(zip(prompt, whole, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    return InputError(
        f"{where}: the chat template does not render message {number} behind its own generation "
        f"prompt: {prompt[same : same + _SHOWN]!r} there is {whole[same : same + _SHOWN]!r} here, "
        f"after {whole[max(0, same - 40) : same]!r}, so that nobody can tell what a server would "
        "have generated. Give the tokenizer a chat template that does, or remove the row"
    )
