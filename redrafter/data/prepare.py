"""The rows of a source as tokens, each one accounted for: kept, left out, or malformed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, Literal

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer, Text
from redrafter.data.formats import category_of
from redrafter.data.rows import RejectedRow, TokenRow, row_digest
from redrafter.data.sources import Source
from redrafter.data.vocabulary import check_ids

_NAMED_ROWS = 10  # malformed rows that a message quotes


def prepared(
    source: Source,
    renderer: Renderer,
    config: SourceConfig,
    keep: Literal["prompts", "texts"],
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[TokenRow | RejectedRow]:
    """One item per row of the source, in its order; of a row that is learned from in several texts
    (see `Renderer.texts`) one each.

    keep: "prompts": what stands before an answer, nothing supervised; "texts": with the answers
    max_tokens: the longest row kept (None: any)
    vocab_size: rows of the target's lm_head; a row with a token beyond them is malformed
    A row is left out if its ids and mask were seen before, or if it is too long. Raises InputError
    naming the malformed rows when there are more than `config.max_failed_rows`.
    """
    seen: set[bytes] = set()
    failures: list[str] = []
    for row, content in source:
        try:
            texts = _texts(renderer, content, source.where(row), keep)
            for ids, _ in texts:
                check_ids(ids, vocab_size, renderer.tokenizer, source.where(row))
        except InputError as error:
            failures.append(str(error))
            if len(failures) > config.max_failed_rows:
                raise _too_many(failures, config) from error
            yield RejectedRow(row, str(error), failed=True)
            continue
        if not texts:
            yield RejectedRow(row, "none of its answers is to be learned", failed=False)
        for ids, supervised in texts:
            if max_tokens is not None and len(ids) > max_tokens:
                reason = f"{len(ids)} tokens, more than the {max_tokens} that fit"
                yield RejectedRow(row, reason, failed=False)
                continue
            digest = row_digest(array("q", ids).tobytes(), bytes(supervised))
            if digest in seen:
                yield RejectedRow(row, "duplicate", failed=False)
                continue
            seen.add(digest)
            yield TokenRow(ids, supervised, row, category_of(content))


def _texts(renderer: Renderer, content: dict[str, Any], where: str, keep: str) -> list[Text]:
    if keep == "texts":
        return renderer.texts(content, where)
    ids = renderer.prompt(content, where)
    return [(ids, (False,) * len(ids))]


def _too_many(failures: list[str], config: SourceConfig) -> InputError:
    allowed = f"max_failed_rows {config.max_failed_rows}"
    if len(failures) == 1:
        return InputError(f"{failures[0]}\n({allowed}: mend the row, or raise it to go on)")
    named = "\n".join(f"- {failure}" for failure in failures[-_NAMED_ROWS:])
    last = f", the last {_NAMED_ROWS} of them" if len(failures) > _NAMED_ROWS else ""
    return InputError(
        f"{config.path}: {len(failures)} malformed rows, more than {allowed}; mend them, or "
        f"raise it{last}:\n{named}"
    )
