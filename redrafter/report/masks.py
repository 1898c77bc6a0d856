"""What is learned from rows, over their text as the chat template renders it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from redrafter.data.rows import TokenRow
from redrafter.data.show import OF_PROMPTS
from redrafter.report.page import page, paragraph, tokens
from redrafter.report.texts import pieces

_KEY = (
    '<ul class="key note"><li><span class="learned">learned</span>: a token that the head learns '
    'to say</li><li><span class="unlearned">read only</span>: it stands before them</li></ul>'
)


def mask_page(rows: Iterable[TokenRow], tokenizer: Any, title: str) -> str:
    """A page of rows whose learned tokens are coloured."""
    parts, prompts = [_KEY], False
    for row in rows:
        learned = sum(row.supervised)
        prompts |= not learned
        what = f"{learned} learned" if learned else "a prompt"
        parts.append(f"<h3>{escape(f'Row {row.source_row}: {len(row.ids)} tokens, {what}')}</h3>")
        spans = []
        texts = pieces(tokenizer, [], row.ids)
        for i, (piece, token, mask) in enumerate(zip(texts, row.ids, row.supervised, strict=True)):
            kind = "learned" if mask else "unlearned"
            said = f"position {i}, token {token}: {'learned' if mask else 'read only'}."
            spans.append((piece, kind, "", said))
        parts.append(tokens(spans, f"row {row.source_row}, token by token"))
    if prompts:
        parts.append(paragraph(OF_PROMPTS, "note"))
    return page(title, "", {"Rows, and what is learned from them": "".join(parts)})
