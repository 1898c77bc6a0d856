"""The tokenizer of a GGUF file, splitting text into words as the model's own does.

A GGUF file names the way by which text is split before merges apply (`tokenizer.ggml.pre`);
transformers knows some of the names and takes GPT-2's way for all others, without a word. Of a
model that sets digits apart (SmolLM2, StarCoder) two line breaks before "1." would become two
tokens and not the one that it has learned. Source: ours; names and ways are llama.cpp's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

#: each digit is a word, and GPT-2's way splits what lies between
DIGITS_APART = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
)
#: GPT-2's way itself
_AS_GPT2 = frozenset((
    "gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2", "roberta-bpe",
    "gigachat", "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es",
    "jina-v2-de",
))  # fmt: skip


def load_tokenizer(file: Path, reader: Any) -> Any:
    """Its tokenizer; None, and a line that says so, where transformers cannot read it.

    reader: gguf's, of this file
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # as various as what can be wrong with a file
        print(f"{file.name}: its tokenizer cannot be read ({error})", file=sys.stderr, flush=True)
        return None
    field = reader.get_field("tokenizer.ggml.pre")
    name = None if field is None else str(field.contents())
    if name is None or name in _AS_GPT2 or not _splits_as_gpt2(tokenizer):
        return tokenizer
    if name in DIGITS_APART:
        _set_digits_apart(tokenizer)
    else:
        print(
            f"{file.name}: how its tokenizer splits text, tokenizer.ggml.pre {name!r}, is not known"
            " here or to transformers, which splits as GPT-2 does: texts may become other tokens"
            " than the model learned from. Give the model that the file was made from",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return tokenizer


def _splits_as_gpt2(tokenizer: Any) -> bool:
    """Whether text is split by the one way that byte-level tokenizers have where none is said."""
    way = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return way.get("type") == "ByteLevel" and way.get("use_regex", False)


def _set_digits_apart(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
