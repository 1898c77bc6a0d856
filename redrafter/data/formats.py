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
"""

from __future__ import annotations

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
        if message["role"] == "assistant":
            groups.append([])
        else:
            groups[-1].append(message)
    asked = [group for group in groups if any(m["role"] == "user" for m in group)]
    if not asked:
        raise InputError(f"{where}: no user says anything in it; remove the row")
    return asked


def _turn_list(content: dict[str, Any], where: str) -> list[Any]:
    copied = "turns" not in content and isinstance(content.get("prompt"), list)
    return field(content, "prompt" if copied else "turns", list, where)


def _user(turns: list[Any], i: int, where: str) -> dict[str, str]:
    if not isinstance(turns[i], str):
        name = "the first" if i == 0 else f"number {i + 1}"
        raise InputError(f"{where}: {name} of 'turns' is not a text")
    return {"role": "user", "content": whole(turns[i], where)}


def _chat_of(content: dict[str, Any], where: str) -> Messages:
    """Messages with `role` and `content`, whatever the source calls them; other keys stay."""
    key = "messages" if content.get("messages") is not None else "conversations"
    messages = []
    for i, message in enumerate(field(content, key, list, where), 1):
        given = message if isinstance(message, dict) else {}
        given = {k: v for k, v in given.items() if v is not None}
        role = given.pop("role", given.get("from"))
        text = given.pop("content", given.get("value"))
        calls = text is None and "tool_calls" in given
        if role is None or not (isinstance(text, str) or calls):
            raise InputError(
                f"{where}: message {i} needs 'role' and 'content' (or 'from' and 'value') holding "
                f"texts, but is {shortened(repr(message), 200)}"
            )
        if role not in _ROLES:
            raise InputError(
                f"{where}: message {i} has the unknown role {role!r}; known are "
                f"{', '.join(_ROLES)}. Rename it, or remove the row"
            )
        others = {k: v for k, v in given.items() if k not in ("from", "value")}
        said = {} if calls else {"content": whole(text, where)}
        messages.append({"role": _ROLES[role], **said, **others})
    return messages


def field(content: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or not value:
        raise InputError(
            f"{where}: no {name!r} holding a {'text' if kind is str else 'list'}; this row has "
            f"the keys {sorted(content)}. Is the format right?"
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
