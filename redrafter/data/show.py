"""Rows for human eyes: which tokens are learned from, and which only stand before them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from redrafter.data.rows import RejectedRow, TokenRow

_TRIED = 1000  # rows that may be left out before some are shown
_LEARNED, _OTHER, _END = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"

#: what there is to say of prompts
OF_PROMPTS = """\
Nothing of a prompt is learned: what the target answers to it is. `redrafter answers` lets it
answer, and `redrafter check-store --store ANSWERS --target.path MODEL --show 3` prints what is then
learned. To learn from the answers that stand in the rows, prepare them with `--keep texts`.
"""


def show_rows(
    rows: Iterable[TokenRow | RejectedRow], tokenizer: Any, n: int, color: bool | None = None
) -> None:
    """Print the first n rows that are kept, with their mask, and the first n of those that are left
    out before them, with why; of prompts, of which nothing is learned, say so.

    color: learned tokens green and bold, others dim; False puts learned ones in ⟦ ⟧ instead;
        None takes colours where the output is a terminal and NO_COLOR is not set
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    prompts, kept, out = False, 0, 0
    for row in rows:
        if isinstance(row, RejectedRow):
            out += 1
            if out == _TRIED:
                break
            kind = "malformed" if row.failed else "left out"
            if out <= n:
                print(f"--- row {row.source_row}: {kind}: {row.reason}\n")
            continue
        category = f", {row.category}" if row.category else ""
        learned = sum(row.supervised)
        prompts |= not learned
        print(
            f"--- row {row.source_row}: {len(row.ids)} tokens, "
            f"{f'{learned} supervised' if learned else 'a prompt'}{category}\n"
            f"{marked(row.ids, row.supervised, tokenizer, color)}\n"
        )
        kept += 1
        if kept == n:
            break
    if out > n:
        print(f"--- {out - n} more rows were left out before\n")
    if prompts:
        print(OF_PROMPTS)


def marked(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Any, color: bool) -> str:
    """Tokens as text with the learned ones marked. ↵ is a newline token's; other control
    characters are spelled out, so that a row cannot play tricks on a terminal."""
    shown, text, end = [], "", 0
    for learned, group in groupby(supervised):
        end += len(list(group))
        # Decoded from the front: a piece on its own may lose its leading blank.
        whole = tokenizer.decode(
            list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        piece = _readable(whole[len(text) :] if whole.startswith(text) else whole)
        text = whole
        if color:
            shown.append(f"{_LEARNED if learned else _OTHER}{piece}{_END}")
        else:
            shown.append(f"⟦{piece}⟧" if learned else piece)
    return "".join(shown)


def _readable(text: str) -> str:
    return "".join(
        "↵\n" if char == "\n"
        else char if char.isprintable()
        else char.encode("unicode_escape").decode()
        for char in text
    )  # fmt: skip
