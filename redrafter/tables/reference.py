"""Texts of a store to copy from while drafting."""

from __future__ import annotations

from redrafter.bars import Bar
from redrafter.data.store import Store
from redrafter.drafters.suffix import ReferenceTexts
from redrafter.tables.bigrams import check_tokenizer, tokenizer_of
from redrafter.targets.model import Target


def reference_texts(path: str, target: Target, *, progress: bool = False) -> ReferenceTexts:
    """The rows of the store at a folder or URL, prompts and answers, whole.

    Raises InputError where it is damaged or of another tokenizer.
    """
    store = Store(path)
    check_tokenizer(path, tokenizer_of(store), target)
    rows = store.rows()
    numbers = Bar(range(rows.n_rows), desc="reference texts", unit="row", disable=not progress)
    return ReferenceTexts(rows.ids(row) for row in numbers)
