"""Prompts from JSON lines, in the few shapes that public files have.

    text       {"text": ...}                  the first tokens of a text, to be continued
    question   {"question": ...}              one user message
    messages   {"messages": [{role, content}, ...]}  up to the last assistant message, excluded
    turns      {"turns": [...]}               the first turn as one user message

A chat template is used where the tokenizer has one; otherwise the text stands as it is, behind the
tokens that the tokenizer puts first (BOS).

Convention: training reads a file from its front (`part="first"`) and never its last
`holdout_rows` rows; evaluation reads rows from its end (`part="last"`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redrafter.contracts import InputError

Format = Literal["text", "question", "messages", "turns"]


@dataclass(frozen=True)
class Prompt:
    """ids: token ids; row: 0-based row of the file it came from; category: if the row has one."""

    ids: tuple[int, ...]
    row: int
    category: str | None = None


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    format: Format,
    n: int | None = None,
    part: Literal["first", "last"] = "first",
    holdout_rows: int = 0,
    text_prompt_tokens: int = 16,
    max_tokens: int | None = None,
) -> list[Prompt]:
    """Read prompts of a .jsonl or .jsonl.gz file, in the order of the file.

    n: how many (None: all that `part` allows)
    part: "first": from the front, leaving out the last `holdout_rows` rows;
        "last": from the last `holdout_rows` rows (of the whole file where 0), taken from the end
    text_prompt_tokens: tokens of a `text` that are the prompt, BOS not counted
    max_tokens: the longest prompt allowed (None: any)
    Raises InputError naming the file, and the line where it has one.
    """
    if tokenizer is None:
        raise InputError(f"{path}: the target has no tokenizer, so no prompt can be read from text")
    rows = read_rows(path)
    keep = max(0, len(rows) - holdout_rows)
    if part == "first":
        rows = rows[:keep][:n]
    else:
        rows = rows[keep if holdout_rows else 0 :]
        rows = rows if n is None else rows[max(0, len(rows) - n) :]
    if not rows:
        raise InputError(
            f"{path}: no rows left ({keep} rows before the {holdout_rows} held-out ones); "
            "give a longer file, or lower data.holdout_rows"
        )
    make = _MAKERS[format]
    prompts = []
    for row, content in rows:
        where = f"{path}:{row + 1}"
        ids = make(content, tokenizer, where, text_prompt_tokens)
        if not ids:
            raise InputError(f"{where}: the prompt is empty; remove the row")
        if max_tokens is not None and len(ids) > max_tokens:
            raise InputError(
                f"{where}: a prompt of {len(ids)} tokens, only {max_tokens} leave room for an "
                "answer in the target's context; shorten the row or lower max_new_tokens"
            )
        category = content.get("category")
        prompts.append(Prompt(tuple(ids), row, None if category is None else str(category)))
    return prompts


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(0-based line, object) of every non-empty line. Raises InputError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a .jsonl or .jsonl.gz file of prompts")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    content = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number + 1}: not valid JSON ({error})") from None
                if not isinstance(content, dict):
                    raise InputError(f"{path}:{number + 1}: not a JSON object")
                rows.append((number, content))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return rows


def _field(content: dict, name: str, kind: type, where: str) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or not value:
        raise InputError(
            f"{where}: no {name!r} holding a {'text' if kind is str else 'list'}; this row has "
            f"the keys {sorted(content)}. Is the prompt format right?"
        )
    return value


def _text(content: dict, tokenizer: Any, where: str, n_tokens: int) -> list[int]:
    ids = tokenizer(_field(content, "text", str, where)).input_ids
    n_special = len(tokenizer("").input_ids)
    return ids[: n_special + n_tokens]


def _question(content: dict, tokenizer: Any, where: str, _: int) -> list[int]:
    return as_chat([_user(_field(content, "question", str, where))], tokenizer)


def _turns(content: dict, tokenizer: Any, where: str, _: int) -> list[int]:
    first = _field(content, "turns", list, where)[0]
    if not isinstance(first, str):
        raise InputError(f"{where}: the first of 'turns' is not a text")
    return as_chat([_user(first)], tokenizer)


def _messages(content: dict, tokenizer: Any, where: str, _: int) -> list[int]:
    key = "conversations" if "messages" not in content else "messages"
    messages = _field(content, key, list, where)
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f"{where}: every message needs 'role' and 'content'")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: answers[-1]] if answers else messages
    if not messages:
        raise InputError(f"{where}: nothing stands before the last assistant message")
    return as_chat(messages, tokenizer)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def as_chat(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids up to where the assistant would begin; plain text without a chat template."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A template writes the special tokens itself; what it leaves out is left out.
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer("\n".join(message["content"] for message in messages)).input_ids


_MAKERS: dict[str, Callable[[dict, Any, str, int], list[int]]] = {
    "text": _text,
    "question": _question,
    "messages": _messages,
    "turns": _turns,
}
