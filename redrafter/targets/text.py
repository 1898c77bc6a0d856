"""Text in, text out: a target's tokenizer (or why there is none), tokens of text and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.targets.adapters import find_adapter
from redrafter.targets.paths import OWN_CODE, check_path, said

# How the files of tokenizers are called, whatever the family.
_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "spm", "bpe")
#: tokens before a new one that it is decoded with: a character has at most four bytes
_BEFORE_TOKENS = 8
#: what a tokenizer makes of bytes that are no whole character
_HALF = "\ufffd"


def load_tokenizer(config: TargetConfig) -> Any:
    """A target's tokenizer. An adapter may bring its own; else its base's is taken.

    Raises InputError that says what is missing, a package or a file.
    """
    from transformers import AutoTokenizer

    adapter = find_adapter(config)
    path, revision = config.path, config.revision
    if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
        path, revision = str(adapter.folder), None
    else:
        config = config if adapter is None else adapter.base_config(config)
        path, revision = check_path(config), config.revision
    try:
        found = AutoTokenizer.from_pretrained(path, revision=revision, **OWN_CODE)
    except Exception as error:  # each family's own class, where a file or a package is missing
        lacks = _lacks(path, error)
        raise InputError(f"the tokenizer of {path!r} cannot be loaded: {lacks}") from error
    if len(found) <= len(found.all_special_tokens):
        # Without its files transformers makes some families' tokenizers of special tokens alone.
        raise InputError(
            f"{path!r} has no tokenizer: put its files (tokenizer.json, tokenizer_config.json) "
            "beside config.json"
        )
    return found


def _lacks(path: str, error: Exception) -> str:
    """What to do about a tokenizer that cannot be loaded."""
    model = os.path.join(path, "tokenizer.model")
    if os.path.isfile(model) and find_spec("sentencepiece") is None:
        # transformers then takes the file for one of tiktoken's, and its error asks for that.
        return f"{model} needs sentencepiece, which is not installed: pip install sentencepiece"
    files = os.listdir(path) if os.path.isdir(path) else ["tokenizer"]
    if not isinstance(error, ImportError) and not any(f.startswith(_FILES) for f in files):
        return f"none of its files lies beside config.json ({said(error)})"
    return said(error)


def tokenizer_of(target: Any, what: str) -> Any:
    """The tokenizer, for whoever needs text. what: is text, for the message.

    Raises InputError where there is none, with what kept it from being loaded.
    """
    if target.tokenizer is None:
        cause = getattr(target, "tokenizer_error", None)
        why = f"{target.name} has no tokenizer" if cause is None else str(cause)
        raise InputError(f"{what} is text, and {why}; token ids need none") from cause
    return target.tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to be continued.

    The special tokens that the tokenizer puts in front stand there once, where the text brings them
    itself, too (a rendered chat), and none stand behind it: nothing is continued after an EOS.
    """
    bare = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    front, _ = added(tokenizer)
    return bare if bare[: len(front)] == front else front + bare


def encode_whole(tokenizer: Any, text: str, **options: Any) -> dict[str, list]:
    """What a tokenizer makes of a text that is complete: with its special tokens around it, of
    which none stands there twice where the text brings them itself."""
    made = tokenizer(text, verbose=False, **options)
    front, behind = added(tokenizer)
    ids, n, m = made["input_ids"], len(front), len(behind)
    first = n if ids[n : 2 * n] == front else 0
    last = m if ids[len(ids) - 2 * m : len(ids) - m] == behind else 0
    return {name: values[first : len(ids) - last] for name, values in made.items()}


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before any text, and those behind."""
    whole = tokenizer("a", verbose=False).input_ids
    bare = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    if not bare:  # no token of the text's: nothing tells the two apart
        return whole, []
    starts = range(len(whole) - len(bare) + 1)
    first = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
    return whole[:first], whole[first + len(bare) :]


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What tokens add to the text of a prompt, without special tokens.

    Decoded together with the prompt: on their own SentencePiece's kind lose their first blank.
    """
    before = _text(tokenizer, prompt)
    whole = _text(tokenizer, [*prompt, *tokens])
    # A prompt may end inside a character, which then belongs to what was added.
    differ = (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    return whole[next(differ, min(len(before), len(whole))) :]


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What tokens are as text, special ones included."""
    return tokenizer.decode(
        list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def tokens_behind(tokenizer: Any, prompt: Sequence[int], text: str) -> list[int] | None:
    """Tokens that render as `text` behind a prompt; None where none do, or the text has a character
    of which only a part was said.

    Tokenised with the prompt, where that leaves the prompt's own tokens as they are, else alone.
    """
    if _HALF in text:
        return None
    before, ids = text_of(tokenizer, prompt), list(prompt)
    whole = tokenizer(before + text, add_special_tokens=False, verbose=False).input_ids
    alone = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    tried = [whole[len(ids) :]] if whole[: len(ids)] == ids else []
    for tokens in (*tried, alone):
        if text_of(tokenizer, [*ids, *tokens]) == before + text:
            return tokens
    return None


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


class TextStream:
    """A streamer that gives away the text of a generation piece by piece: joined, the pieces are
    `continuation`'s text. `write` is called with each as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, write: Any):
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.begun = False

    def put(self, value: Any) -> None:
        """First the prompt, (1, T), then new tokens."""
        if not self.begun:
            self.begun = True
            self.ids = value.flatten().tolist()
            self.first = max(0, len(self.ids) - _BEFORE_TOKENS)  # where decoding starts
            self.shown = len(self.ids)  # tokens before this one are written
            return
        self.ids += value.flatten().tolist()
        self._flush(last=False)

    def end(self) -> None:
        self._flush(last=True)
        self.begun = False

    def _flush(self, last: bool) -> None:
        text = continuation(
            self.tokenizer, self.ids[self.first : self.shown], self.ids[self.shown :]
        )
        if not text or (text.endswith(_HALF) and not last):
            return
        self.write(text)
        self.first = max(self.first, self.shown - _BEFORE_TOKENS)
        self.shown = len(self.ids)
