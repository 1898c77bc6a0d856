"""From the content of a row to the messages of a chat.

    text       {"text": ...}                  its first tokens are the prompt, the rest is learned
    question   {"question": ..., "answer": ...}      one user message, and the assistant's
    messages   {"messages": [{role, content}, ...]}  or ShareGPT "conversations", whose keys may be
               {from, value} and whose roles human and gpt
    turns      {"turns": [...]}               what a user says, turn by turn (MT-bench, Spec-Bench;
               of the Hub's copies of MT-bench: {"prompt": [...]})
    humaneval, mbpp, summarization            rows of these benchmarks, see `BENCHMARKS`
    prompt     {"prompt": ..., "completion": ...}    the same by other names; or "response"
    instruction  {"instruction": ..., "input": ..., "output": ...}  Alpaca's; Dolly's "context" and
               "response" will do. What stands beside the instruction comes below it
    columns    a user's message and an assistant's, in columns that the configuration names

`auto` tells them by the keys of the first row.

A row of any of them may hold `tools`, which the chat template is given: a list of schemas, or that
list as JSON. Messages may hold `tool_calls` (or the older `function_call`), whose arguments may be
JSON, and say by `weight: 0` or `train: false` that they are not to be learned. Keys whose value is
null are dropped, however deep: columns of Parquet and Arrow give every object the keys of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redrafter.contracts import InputError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """Rows that tell themselves by their keys.

    keys: those that a row has, all of them
    question: what the user says; it is given texts by key, and `where`
    answer: the key of an answer that the benchmark gives, learned from where asked for
    """

    keys: tuple[str, ...]
    question: Callable[[dict[str, Any], str], str]
    answer: str


def _humaneval(content: dict[str, Any], where: str) -> str:
    """The beginning of the function, as it stands."""
    return field(content, "prompt", str, where)


def _mbpp(content: dict[str, Any], where: str) -> str:
    """The task and its tests, in the words of the benchmark's paper (arXiv 2108.07732)."""
    task = field(content, "text" if "text" in content else "prompt", str, where)
    tests = field(content, "test_list", list, where)
    if not all(isinstance(test, str) for test in tests):
        raise InputError(f"{where}: not all of 'test_list' are texts")
    listed = whole("\n".join(tests), where)
    return (
        f"You are an expert Python programmer, and here is your task: {task} "
        f"Your code should pass these tests:\n\n{listed}\n"
    )


def _summarization(content: dict[str, Any], where: str) -> str:
    """The article, asked for as Spec-Bench asks for it."""
    return f"Summarize: {field(content, 'article', str, where)}"


BENCHMARKS = {
    "humaneval": Benchmark(("prompt", "entry_point"), _humaneval, "canonical_solution"),
    "mbpp": Benchmark(("test_list",), _mbpp, "code"),
    "summarization": Benchmark(("article",), _summarization, "highlights"),
}

# One user message: its key, those of what belongs below it, and those of the answer.
_ASKED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "question": ("question", (), ("answer",)),
    "prompt": ("prompt", (), ("completion", "response")),
    "instruction": ("instruction", ("input", "context"), ("output", "response")),
}

# What a row holds, told by its keys; the first match counts.
_FORMAT_OF_KEY = {
    "turns": "turns",
    "messages": "messages",
    "conversations": "messages",
}
# Benchmarks come in between: a row of MBPP has a text, too.
_SINGLE_KEYS = ("question", "text", "instruction", "prompt")
# The same roles as different sources spell them. What a template does with a tool's is its own.
_ROLES = {
    "system": "system", "developer": "developer", "tool": "tool", "function": "function",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip


def format_of(content: dict[str, Any], where: str) -> str:
    """What `format: auto` means for a row, by its keys. Raises InputError naming them."""
    for key, name in _FORMAT_OF_KEY.items():
        if content.get(key) is not None:
            return name
    if isinstance(content.get("prompt"), list):
        return "turns"
    for name, benchmark in BENCHMARKS.items():
        if all(content.get(key) is not None for key in benchmark.keys):
            return name
    for key in _SINGLE_KEYS:
        if content.get(key) is not None:
            return key
    known = (*_FORMAT_OF_KEY, *_SINGLE_KEYS, *BENCHMARKS["mbpp"].keys, "article")
    raise InputError(
        f"{where}: none of this row's keys {sorted(content)} is one of "
        f"{', '.join(known)}, and it is no row of HumanEval; name the column of the question "
        "(prompt_column), or rename a key"
    )


def category_of(content: dict[str, Any]) -> str | None:
    """The category that a row names, if any."""
    value = content.get("category")
    return None if value is None else str(value)


def messages_of(
    content: dict[str, Any],
    form: str,
    where: str,
    columns: tuple[str | None, str | None] = (None, None),
    answered: bool = False,
) -> Messages:
    """The chat of a row of any format but `text`; of `turns` the first one.

    columns: of the user's and the assistant's message, for format `columns`
    answered: look for an answer beside the question, too
    Raises InputError naming the row and the key.
    """
    if form == "messages":
        return _chat_of(content, where)
    if form == "turns":
        return [_user(_turn_list(content, where), 0, where)]
    benchmark = BENCHMARKS.get(form)
    answer_keys: tuple[str | None, ...]
    if benchmark is not None:
        user, answer_keys = benchmark.question(content, where), (benchmark.answer,)
    elif form == "columns":
        user, answer_keys = field(content, columns[0], str, where), columns[1:]
    else:
        key, below, answer_keys = _ASKED[form]
        # Of Alpaca's rows many have an empty input.
        parts = [key, *(name for name in below if content.get(name))]
        user = "\n\n".join(field(content, name, str, where) for name in parts)
    messages = [{"role": "user", "content": user}]
    for key in answer_keys if answered else ():
        if key is not None and content.get(key) is not None:
            messages.append({"role": "assistant", "content": field(content, key, str, where)})
            break
    return messages


def turns_of(
    content: dict[str, Any],
    form: str,
    where: str,
    columns: tuple[str | None, str | None] = (None, None),
) -> list[Messages]:
    """What is said before each answer: of `turns` every one, of `messages` what stands between the
    assistant's, of other formats the question. Raises InputError as `messages_of` does."""
    if form == "turns":
        listed = _turn_list(content, where)
        return [[_user(listed, i, where)] for i in range(len(listed))]
    groups: list[Messages] = [[]]
    for message in messages_of(content, form, where, columns):
        role = message["role"]
        if role in ("tool", "function"):
            raise InputError(
                f"{where}: a {role} answers a call that the target may not make in its own "
                "answers; remove the row, or let the target answer prompts (data/prepare.py) alone"
            )
        if role != "assistant":
            groups[-1].append(message)
        elif _asks(groups[-1]):  # else it is a greeting, and what stood before it stays
            groups.append([])
    if not _asks(groups[-1]):
        groups.pop()
    if not groups:
        raise InputError(f"{where}: no user says anything in it; remove the row")
    return groups


def _asks(messages: Messages) -> bool:
    return any(message["role"] == "user" for message in messages)


def _turn_list(content: dict[str, Any], where: str) -> list[Any]:
    copied = "turns" not in content and isinstance(content.get("prompt"), list)
    return field(content, "prompt" if copied else "turns", list, where)


def _user(turns: list[Any], i: int, where: str) -> dict[str, str]:
    if not isinstance(turns[i], str):
        name = "the first" if i == 0 else f"number {i + 1}"
        raise InputError(f"{where}: {name} of 'turns' is not a text")
    return {"role": "user", "content": whole(turns[i], where)}


def tools_of(content: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The tools that a row offers, None where there are none. Raises InputError naming the row."""
    tools = _parsed(content.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(
            f"{where}: 'tools' must be a list of schemas (or JSON of one), but is "
            f"{shortened(repr(tools), 200)}; mend the row"
        )
    return without_nulls(tools)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a message of `messages_of`: what holds `name` and `arguments`."""
    return [call.get("function", call) for call in message.get("tool_calls", ())]


def with_calls(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message whose tool calls have change(arguments)."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call.get("arguments", {}))}

    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


def is_learned(message: dict[str, Any]) -> bool:
    """Whether a message lets itself be learned from."""
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


def without_nulls(value: Any) -> Any:
    """Without the keys whose value is null, all the way down; a null in a list says something."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """What stands in JSON text that holds an object or a list; else the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) else value


def _chat_of(content: dict[str, Any], where: str) -> Messages:
    """Messages with `role` and `content`, whatever the source calls them; other keys stay."""
    key = "messages" if content.get("messages") is not None else "conversations"
    messages = []
    for i, message in enumerate(field(content, key, list, where), 1):
        given = without_nulls(message) if isinstance(message, dict) else {}
        role = given.pop("role", given.get("from"))
        text = given.pop("content", given.get("value"))
        calls = _calls(given, i, where)
        if role is None or not (isinstance(text, str) or (text is None and calls)):
            raise InputError(
                f"{where}: message {i} needs 'role' and 'content' (or 'from' and 'value') holding "
                f"texts, but is {shortened(repr(message), 200)}"
            )
        if role not in _ROLES:
            raise InputError(
                f"{where}: message {i} has the unknown role {role!r}; known are "
                f"{', '.join(_ROLES)}. Rename it, or remove the row"
            )
        _check_flags(given, i, where)
        read = ("from", "value", "tool_calls", "function_call")
        others = {k: v for k, v in given.items() if k not in read}
        said = {} if text is None else {"content": whole(text, where)}
        made = {"role": _ROLES[role], **said, **others}
        if calls:
            made = with_calls({**made, "tool_calls": calls}, _parsed)
        messages.append(made)
    return messages


def _calls(message: dict[str, Any], number: int, where: str) -> list[dict[str, Any]]:
    """The tool calls of a message as it is given, the older `function_call` too."""
    calls = _parsed(message.get("tool_calls")) or []
    if not calls and message.get("function_call"):
        calls = [{"type": "function", "function": _parsed(message["function_call"])}]
    inner = [c.get("function", c) for c in calls if isinstance(c, dict)] if calls else []
    if not isinstance(calls, list) or len(inner) != len(calls) or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in inner
    ):  # fmt: skip
        raise InputError(
            f"{where}: the tool calls of message {number} must be a list of {{name, arguments}}, "
            f"but are {shortened(repr(calls), 200)}; mend the row"
        )
    return calls


def _check_flags(message: dict[str, Any], number: int, where: str) -> None:
    kinds = {"weight": (int, float), "train": (bool,)}
    for key, kind in kinds.items():
        if key in message and not isinstance(message[key], kind):
            raise InputError(
                f"{where}: {key!r} of message {number} is {message[key]!r}; it must be "
                f"{'a number' if key == 'weight' else 'true or false'}"
            )


def field(content: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or not value:
        raise InputError(
            f"{where}: no {name!r} holding a {'text' if kind is str else 'list'}; this row has "
            f"the keys {sorted(content)}. Is the format right? (`format auto` goes by the keys)"
        )
    return whole(value, where) if kind is str else value


def whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a character ({error}); mend or remove the row") from None
    return text


def shortened(text: str, chars: int = 800) -> str:
    half = chars // 2
    return text if len(text) <= chars else f"{text[:half]} [...] {text[-half:]}"
