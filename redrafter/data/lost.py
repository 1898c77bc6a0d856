"""What a row says and its rendered text does not: a template drops what it does not know of.

A template without tools renders a call as an empty answer, one without a system role leaves the
system prompt out, and what would be learned is then not what the row says. So every message's
content, the name and the arguments of every call and the name of every tool must occur in the
text, blanks aside, as they are or as JSON writes them. Not counted as lost are thoughts of answers
that are history (most templates drop those by design); the thought of an answer that is learned
must be there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from redrafter.contracts import InputError
from redrafter.data.formats import Messages, calls_of, shortened

#: names that a message's thought is given under
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_WORD = r"[\w:|]*(?:think|thought|reason)\w*"
#: words by which a user switches thoughts on and off: some templates take them out
_SWITCH = re.compile(r"/(?:no_?)?think\b")
_OPENED = re.compile(rf"\A\s*(?:[<\[]{_WORD}[>\]]|<\|channel>(?:thought\b)?)", re.IGNORECASE)
_CLOSED = re.compile(rf"[<\[]/{_WORD}[>\]]|<channel\|>", re.IGNORECASE)


def thought_of(message: dict[str, Any]) -> tuple[str | None, str]:
    """(thought, what is said after it): of a key of its own, or closed in the content."""
    content = message.get("content", "")
    thought = next((message[key] for key in _THOUGHTS if isinstance(message.get(key), str)), None)
    *_, closed = [None, *_CLOSED.finditer(content)]
    if closed is None:
        return thought, content
    inner = _OPENED.sub("", content[: closed.start()])
    return inner if thought is None else thought, content[closed.end() :]


def check_rendered(
    messages: Messages,
    tools: list[dict[str, Any]] | None,
    text: str,
    where: str,
    learned: Mapping[int, str] | None = None,
    roles: Collection[str] | None = None,
) -> None:
    """Raises InputError naming the message, and what of it is not in the rendered text.

    learned: the part of the text that is learned of a message, by its number: all of it must be
        there, thoughts too; roles: look at messages of these alone
    """
    rendered, parts = _pressed(text), {i: _pressed(part) for i, part in (learned or {}).items()}
    wanted: Counter[str] = Counter()
    for i, message in enumerate(messages):
        if roles is not None and message["role"] not in roles:
            continue
        for name, said in _said(message, i in parts):
            wanted[said] += name == "content"
            missing = _times(said, rendered) < max(1, wanted[said])
            if missing or not _times(said, parts.get(i, rendered)):
                raise _lost(f"message {i + 1} ({message['role']}): its {name}", said, where)
    for i, tool in enumerate(tools or ()):
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and not _times(name, rendered):
            raise _lost(f"tool {i + 1}: its name", name, where)


def _said(message: dict[str, Any], learned: bool) -> Iterator[tuple[str, str]]:
    """(what it is called, text) of all that must be rendered."""
    if message["role"] == "assistant":
        thought, content = thought_of(message)
        if learned and thought is not None:
            yield "thought", thought
        yield "content", content
    else:
        yield "content", message.get("content", "")
    for call in calls_of(message):
        yield "tool call's name", str(call.get("name", ""))
        for leaf in _leaves(call.get("arguments")):
            yield "tool call's argument", leaf


def _leaves(value: Any) -> Iterator[str]:
    """Keys, texts and whole numbers; how true, false and null are written is a template's own."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        yield str(value)


def contains(text: str, said: str) -> bool:
    """Whether a rendered text says something, blanks aside."""
    return _times(said, _pressed(text)) > 0


def _times(said: str, rendered: str) -> int:
    """How often; once where there is nothing to find."""
    texts = {said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]}
    texts.add(_SWITCH.sub("", said))
    pressed = {_pressed(text) for text in texts}
    return 1_000_000 if "" in pressed else sum(rendered.count(text) for text in pressed)


def _pressed(text: str) -> str:
    return "".join(text.split())


def _lost(what: str, said: str, where: str) -> InputError:
    return InputError(
        f"{where}: {what} {shortened(said, 80)!r} is not in what the chat template renders, so "
        "that it would be lost without a word; take it out of the row, or give the tokenizer a "
        "chat template that renders it"
    )
