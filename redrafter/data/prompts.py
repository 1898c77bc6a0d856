"""Prompts of one file, all at once: for evaluation, and for what training measures itself on.

Formats are those of `formats.py`, files those of `sources.py`. Convention: training reads a file
from its front (`part="first"`) and never its last `holdout_rows` rows; evaluation reads rows from
its end (`part="last"`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from redrafter.config import PromptFormat, SourceConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer
from redrafter.data.formats import category_of, format_of
from redrafter.data.sources import Row, Source, read_source
from redrafter.data.vocabulary import check_ids


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
) -> list[Prompt]:
    """Read prompts of a file, in its order.

    format: `auto` looks at the first row of the file
    n: how many (None: all that `part` allows)
    part: "first": from the front, leaving out the last `holdout_rows` rows;
        "last": from the last `holdout_rows` rows (of the whole file where 0), taken from the end
    text_prompt_tokens: tokens of a `text` that are the prompt, BOS not counted
    max_tokens: the longest prompt allowed (None: any)
    vocab_size: rows of the target's lm_head (None: not compared)
    day: the date that a chat template may print, YYYY-MM-DD (None: today's)
    Raises InputError naming the file, and the line where it has one.
    """
    config = SourceConfig(
        path=str(path), format=format, holdout_rows=holdout_rows,
        n_rows=n if part == "first" else None, text_prompt_tokens=text_prompt_tokens,
    )  # fmt: skip
    source = read_source(config)
    if format == "auto":
        row, content = source.first()
        config = replace(config, format=format_of(content, source.where(row)))
    rows = source if part == "first" else source.held_out(n)
    renderer = Renderer(tokenizer, config, day)
    return rendered(source, rows, renderer, max_tokens, "max_new_tokens", vocab_size)


def rendered(
    source: Source,
    rows: Iterable[Row],
    renderer: Renderer,
    max_tokens: int | None,
    room: str,
    vocab_size: int | None,
) -> list[Prompt]:
    """Some rows of a source as prompts. Raises InputError naming one that is too long, or has a
    token that the target does not know.

    room: the setting that `max_tokens` leaves room for, which the message names
    """
    prompts = []
    for row, content in rows:
        where = source.where(row)
        ids = renderer.prompt(content, where)
        if max_tokens is not None and len(ids) > max_tokens:
            raise InputError(
                f"{where}: a prompt of {len(ids)} tokens, only {max_tokens} leave room for an "
                f"answer in the target's context; shorten the row or lower {room}"
            )
        check_ids(ids, vocab_size, renderer.tokenizer, where)
        prompts.append(Prompt(ids, row, category_of(content)))
    return prompts


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(0-based line, object) of every non-empty line. Raises InputError naming file and line."""
    return list(read_source(SourceConfig(path=str(path))))
