"""Prompts of one file, all at once: for evaluation, and for what training measures itself on.

Formats are those of `formats.py`, files those of `sources.py`. Convention: training reads a file
from its front (`part="first"`) and never its last `holdout_rows` rows; evaluation reads rows from
its end (`part="last"`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from redrafter.config import PromptFormat, SourceConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer
from redrafter.data.formats import category_of, format_of
from redrafter.data.rows import RejectedRow
from redrafter.data.sources import Row, Source, read_source
from redrafter.data.vocabulary import check_ids

_NAMED_ROWS = 5  # of those left out, in a message


@dataclass(frozen=True)
class Prompt:
    """ids: token ids; row: 0-based row of the file it came from; category: if the row has one."""

    ids: tuple[int, ...]
    row: int
    category: str | None = None


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    format: PromptFormat,
    n: int | None = None,
    part: Literal["first", "last"] = "first",
    holdout_rows: int = 0,
    text_prompt_tokens: int = 16,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
    day: str | None = None,
    prompt_column: str | None = None,
    left_out: list[RejectedRow] | None = None,
) -> list[Prompt]:
    """Read prompts of a file, in its order.

    format: `auto` looks at the first row of the file
    n: how many (None: all that `part` allows)
    part: "first": from the front, leaving out the last `holdout_rows` rows;
        "last": from the last `holdout_rows` rows (of the whole file where 0), taken from the end
    text_prompt_tokens: tokens of a `text` that are the prompt, BOS not counted
    max_tokens: the longest prompt allowed (None: any); left_out: see `rendered`
    vocab_size: rows of the target's lm_head (None: not compared)
    day: the date that a chat template may print, YYYY-MM-DD (None: today's)
    prompt_column: of the user's message, where no format fits
    Raises InputError naming the file, and the line where it has one.
    """
    config = SourceConfig(
        path=str(path), format=format, holdout_rows=holdout_rows,
        n_rows=n if part == "first" else None, text_prompt_tokens=text_prompt_tokens,
        prompt_column=prompt_column,
    )  # fmt: skip
    source = read_source(config)
    if format == "auto" and prompt_column is None:
        row, content = source.first()
        config = replace(config, format=format_of(content, source.where(row)))
    rows = source if part == "first" else source.held_out(n)
    renderer = Renderer(tokenizer, config, day)
    return rendered(source, rows, renderer, max_tokens, "max_new_tokens", vocab_size, left_out)


def rendered(
    source: Source,
    rows: Iterable[Row],
    renderer: Renderer,
    max_tokens: int | None,
    room: str,
    vocab_size: int | None,
    left_out: list[RejectedRow] | None = None,
) -> list[Prompt]:
    """Some rows of a source as prompts. Raises InputError naming one that has a token that the
    target does not know.

    room: the setting that `max_tokens` leaves room for, which the message names
    left_out: rows that are too long are put here and skipped; None: an InputError names the first
    """
    prompts = []
    for row, content in rows:
        where = source.where(row)
        ids = renderer.prompt(content, where)
        if max_tokens is None or len(ids) <= max_tokens:
            check_ids(ids, vocab_size, renderer.tokenizer, where)
            prompts.append(Prompt(ids, row, category_of(content)))
            continue
        if left_out is None:
            raise InputError(
                f"{where}: a prompt of {len(ids)} tokens, only {max_tokens} leave room for an "
                f"answer in the target's context; shorten the row or lower {room}"
            )
        left_out.append(RejectedRow(row, f"{where} ({len(ids)} tokens)", failed=False))
    return prompts


def say_left_out(left_out: Sequence[RejectedRow], n_kept: int, room: str) -> list[str]:
    """One line that counts and names rows which `rendered` left out; none where there are none.

    n_kept: rows that were not; room: as of `rendered`. Raises InputError where nothing is left.
    """
    if not left_out:
        return []
    named = ", ".join(row.reason for row in left_out[:_NAMED_ROWS])
    named += ", ..." * (len(left_out) > _NAMED_ROWS)
    said = (
        f"{len(left_out)} of {len(left_out) + n_kept} rows left out, whose prompts leave no room "
        f"for {room} in the target's context: {named}"
    )
    if not n_kept:
        raise InputError(f"{said}; shorten the rows or lower {room}")
    return [said]


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(0-based line, object) of every non-empty line. Raises InputError naming file and line."""
    return list(read_source(SourceConfig(path=str(path))))
