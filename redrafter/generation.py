"""Text in, text out: the shortest way to use a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from redrafter.config import TreeConfig
from redrafter.contracts import Generation, InputError
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.recurrent import RecurrentDrafter
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.target.model import Target


def generate(
    target: Target,
    texts: str | Sequence[str],
    head: RecurrentHead | str | Path | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    tree: TreeConfig | None = None,
    seeds: int | Sequence[int] = 0,
    **generation_options,
) -> Generation:
    """Continue texts, drafting with `head` (None: plain decoding; the text is the same).

    texts: one or several; encoded as they are (apply a chat template before, if you want one)
    temperature: 0 is greedy
    generation_options: further fields of a transformers GenerationConfig, e.g. top_p=0.9
    Returns a Generation whose `extra["texts"]` are the decoded continuations.
    """
    if target.tokenizer is None:
        raise InputError(f"{target.name} has no tokenizer; call redrafter.speculative on token ids")
    rows = target.tokenizer([texts] if isinstance(texts, str) else list(texts)).input_ids
    options = dict(max_new_tokens=max_new_tokens, do_sample=temperature > 0, **generation_options)
    if temperature > 0:
        options["temperature"] = temperature
    config = GenerationConfig(**options)
    if head is None:
        result = plain(target, rows, config, seeds=seeds)
    else:
        if isinstance(head, (str, Path)):
            head = load_head(head, target)
        drafter = RecurrentDrafter(head, target, tree)
        result = speculative(target, rows, config, seeds=seeds, drafter=drafter)
    result.extra["texts"] = target.tokenizer.batch_decode(result.tokens, skip_special_tokens=True)
    return result
