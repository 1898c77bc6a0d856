"""What a tokenizer and a chat template make of a few texts, kept so that a change shows where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redrafter.files import versions
from redrafter.targets.identity import text_identity

_SAMPLE = "Hello,  world! 1234.5 + x_1 = ?\n\tdéjà vu 你好"
_CONVERSATIONS = (
    [{"role": "user", "content": "Hello! What is 2 + 2?"}],
    [
        {"role": "user", "content": " Name a colour.\n"},
        {"role": "assistant", "content": "Blue. "},
        {"role": "user", "content": "Another?"},
    ],
)
_SHOWN = 40  # characters of a difference


def describe_text(tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """Digests, and samples of what they stand for. rows: token ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    texts = [_SAMPLE, *tokenizer.batch_decode(list(map(list, rows)))]
    return {
        **text_identity(tokenizer),
        "texts": texts,
        "ids": [tokenizer(text).input_ids for text in texts],
        "conversations": list(_CONVERSATIONS),
        "rendered": [_rendered(tokenizer, messages) for messages in _CONVERSATIONS],
    }


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """None where there is no template, or it does not take such a conversation."""
    template = getattr(tokenizer, "chat_template", None)
    # The date of the day would be another difference every day.
    if template is None or "strftime_now" in str(template):
        return None
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise what it likes
        return None


def tokenizer_fault(tokenizer: Any, then: dict[str, Any] | None, made_with: str) -> str | None:
    """What differs from `describe_text` then, None where nothing does that matters.

    made_with: the version of `tokenizers` then: another one may write the same tokenizer otherwise
    """
    if then is None or tokenizer is None:
        return None if then is tokenizer else _one_alone(then)
    for number, (text, ids) in enumerate(zip(then["texts"], then["ids"], strict=True)):
        here = tokenizer(text).input_ids
        if here != ids:
            at = _first(here, ids)
            piece = tokenizer.decode(ids[:at])[-_SHOWN:]
            return (
                f"another tokenizer: of text {number}, behind {piece!r}, token {at} is "
                f"{_item(here, at)} here, {_item(ids, at)} in the golden batch"
            )
    digest = text_identity(tokenizer)["tokenizer"]
    if digest == then["tokenizer"] or versions()["tokenizers"] != made_with:
        return None
    return (
        f"another tokenizer (digest {digest}, in the golden batch {then['tokenizer']}); the texts "
        "that are kept become the same tokens"
    )


def template_fault(tokenizer: Any, then: dict[str, Any] | None) -> str | None:
    """What differs in the chat template, None where nothing does."""
    if then is None or tokenizer is None:
        return None  # told of the tokenizer
    shown = None
    for number, (messages, text) in enumerate(
        zip(then["conversations"], then["rendered"], strict=True)
    ):
        here = _rendered(tokenizer, messages)
        if here != text:
            shown = f"conversation {number} differs {_difference(here or '', text or '')}"
            break
    digest = text_identity(tokenizer)["template"]
    if digest == then["template"]:
        return None if shown is None else f"the same template with other special tokens: {shown}"
    if digest is None or then["template"] is None:
        missing = "here there is none" if digest is None else "the golden batch had none"
        return f"another chat template: {missing}"
    same = "the conversations that are kept are rendered alike"
    return (
        f"another chat template (digest {digest}, in the golden batch {then['template']}): "
        f"{shown or same}"
    )


def _one_alone(then: dict[str, Any] | None) -> str:
    if then is None:
        return "the golden batch was made without a tokenizer, here there is one"
    return "there is no tokenizer here, the golden batch was made with one"


def _first(here: Sequence[Any], then: Sequence[Any]) -> int:
    """Index of the first difference."""
    pairs = zip(here, then, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(here), len(then)))


def _item(ids: Sequence[int], at: int) -> str:
    return str(ids[at]) if at < len(ids) else "the end"


def _difference(here: str, then: str) -> str:
    at = _first(here, then)
    return (
        f"from character {at} on: {here[at : at + _SHOWN]!r} here, {then[at : at + _SHOWN]!r} in "
        "the golden batch"
    )
