"""Token ids against the matrices of the target: a tokenizer may know tokens that the model does
not, as one added without resizing the model's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redrafter.contracts import InputError
from redrafter.data.store import Store
from redrafter.targets.model import Target

_CHUNK_ROWS = 4096


def check_ids(ids: Sequence[int], vocab_size: int | None, tokenizer: Any, where: str) -> None:
    """Raises InputError naming the first token of a row that the target has no weights for.

    vocab_size: rows of the target's lm_head (None: not known); where: names the row
    """
    if vocab_size is None or not ids or max(ids) < vocab_size:
        return
    raise InputError(f"{where}: {_unknown(next(i for i in ids if i >= vocab_size), tokenizer)}"
                     f"the target's lm_head has {vocab_size} rows{_REMEDY}")  # fmt: skip


def check_store_ids(store: Store, target: Target) -> None:
    """The same of the rows of a store, before anything is made of them."""
    for first in range(0, store.n_rows, _CHUNK_ROWS):
        tokens = store.rows(range(first, min(first + _CHUNK_ROWS, store.n_rows))).tokens
        if not len(tokens) or int(tokens.max()) < target.vocab_size:
            continue
        for row in range(first, store.n_rows):
            where = f"{store.name}: row {row} (row {int(store.source_row[row])} of the source)"
            ids = store.rows([row]).tokens.tolist()
            check_ids(ids, target.vocab_size, target.tokenizer, where)


_REMEDY = (
    ": it was added without resizing the model. Resize it (resize_token_embeddings(len(tokenizer))"
    "), train its new rows and save it, or leave the token out of the text and its template"
)


def _unknown(token: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return f"token id {token} is unknown to the target, "
    known = tokenizer.convert_ids_to_tokens(token)
    return f"token {known!r} has id {token} of {len(tokenizer)} in the tokenizer, "
