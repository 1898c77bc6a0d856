"""Counted bigrams of a store: which token follows which in what is learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redrafter.bars import Bar
from redrafter.contracts import InputError
from redrafter.data.store import Store
from redrafter.drafters.bigram import BigramTable, PairCounts, load_bigrams
from redrafter.tables.probed import PROBED, check_probed
from redrafter.targets.identity import text_identity
from redrafter.targets.model import Target

# Tokens read at a time (a longer row is read whole).
_CHUNK_TOKENS = 1 << 20


def bigrams_of_store(
    store: Store, vocab_size: int, width: int, *, progress: bool = False
) -> BigramTable:
    """The `width` most frequent successors of every token.

    A pair counts where its second token is supervised: the first token of an answer follows the
    last one of its prompt; what the prompt says, and the end of a row and the next one, do not.
    Raises InputError naming the store where an id is outside the vocabulary or nothing counts.
    """
    counts, n_pairs = PairCounts(vocab_size), 0
    chunk = (store.lengths.cumsum(0) - store.lengths) // _CHUNK_TOKENS
    sizes = chunk.unique_consecutive(return_counts=True)[1].tolist()
    with Bar(total=store.n_rows, desc="bigrams", unit="row", disable=not progress) as bar:
        for rows in torch.arange(store.n_rows).split(sizes) if sizes else ():
            found = store.rows(rows)
            tokens, wanted = found.tokens, found.supervised
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
                raise InputError(
                    f"{store.name} has token ids {int(tokens.min())} to {int(tokens.max())}, the "
                    f"vocabulary is {vocab_size}: give the target that the store was made for"
                )
            wanted[found.offsets[:-1][found.lengths() > 0]] = False  # a row's first follows nothing
            second = wanted.nonzero()[:, 0]
            n_pairs += len(second)
            counts.add(tokens[second - 1], tokens[second])
            bar.update(len(rows))
    if not n_pairs:
        raise InputError(
            f"{store.name} ({store.identity['kind']}) has no supervised token behind another: "
            "count on answers, or on texts with answers in them"
        )
    return counts.table(width)


def table_identity(store: Store) -> dict[str, Any]:
    """What a table says about the store that it was counted on."""
    return {
        "counted_on": {
            "store": store.name,
            "digest": store.digest,
            "kind": store.identity["kind"],
            "rows": store.n_rows,
            "supervised_tokens": store.counts["supervised"],
        },
        "tokenizer": tokenizer_of(store),
    }


def open_bigrams(path: str, target: Target, width: int) -> tuple[BigramTable, str]:
    """A table of data/bigrams.py or data/probe.py, or one counted now on the store at a folder or
    URL.

    width: successors per token; a table on disk may have more, or fewer
    Returns the table and a line that says what it was counted on. Raises InputError naming what is
    missing, damaged, made with another vocabulary or tokenizer, or probed from another target.
    """
    if "://" in path or Path(path).is_dir():
        store = Store(path)
        about, shown = table_identity(store), ""
        check_tokenizer(path, about["tokenizer"], target)
        table = bigrams_of_store(store, target.vocab_size, width, progress=True)
    else:
        table, about = load_bigrams(path, target.vocab_size)
        if about.get("kind") == PROBED:
            check_probed(path, about, target)
            return table, f"{path}: probed {'with' if about['bos'] else 'without'} BOS"
        shown = f", as {path} says"
        check_tokenizer(path, about.get("tokenizer"), target)
    on = about.get("counted_on") or {}
    return table, (
        f"{on.get('store', 'unknown')} ({on.get('kind', '?')}, {on.get('rows', '?')} rows, "
        f"{on.get('supervised_tokens', '?')} supervised tokens{shown})"
    )


def open_probed(path: str, target: Target) -> BigramTable:
    """A table of data/probe.py. Raises InputError naming what is missing, damaged, or was made
    otherwise or from another target."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: make it with data/probe.py")
    table, about = load_bigrams(path, target.vocab_size)
    if about.get("kind") != PROBED:
        raise InputError(
            f"{path} holds counted bigrams, no probed ones: give it as --bigrams, or make a table "
            "of this target with data/probe.py"
        )
    check_probed(path, about, target)
    return table


def tokenizer_of(store: Store) -> str | None:
    """Digest of the tokenizer that rows of a store were made with, where it is known."""
    made = store.identity.get("text") or store.identity.get("target") or {}
    return made.get("tokenizer")


def check_tokenizer(name: str, made: str | None, target: Target) -> None:
    """Equal sizes do not make equal vocabularies; drafts would be wrong, though never the text."""
    if made is None or target.tokenizer is None:
        return
    here = text_identity(target.tokenizer)["tokenizer"]
    if made != here:
        raise InputError(
            f"{name} was made with another tokenizer ({made}, this target has {here}): count on "
            "answers of this target"
        )
