"""Which rows an evaluation uses, and arguments that are lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from redrafter.contracts import InputError
from redrafter.data.prompts import Prompt, load_prompts, read_rows
from redrafter.target.model import Target

# No configuration is larger; other files beside a head (a tokenizer) are.
_MAX_RECORD_BYTES = 200_000
Number = TypeVar("Number", int, float)


def number_list(name: str, text: str, kind: Callable[[str], Number], least: Number) -> list[Number]:
    """ "1,4" -> [1, 4]. Raises InputError naming the option."""
    try:
        values = [kind(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"{name}: {text!r} is not a comma-separated list of numbers") from None
    if min(values) < least:
        raise InputError(f"{name}: {min(values)} is below {least}")
    return list(dict.fromkeys(values))


def evaluation_prompts(
    target: Target, config: Any, more: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """The last `config.n_prompts` rows of `config.prompts`, and the `more` rows before them.

    config: LosslessConfig or SpeedConfig
    Raises InputError naming the file where it has too few rows or a prompt is too long.
    """
    if config.n_prompts < 1 or config.max_new_tokens < 1:
        raise InputError(
            f"n_prompts {config.n_prompts} and max_new_tokens {config.max_new_tokens} must be "
            "positive"
        )
    room = target.max_positions
    rows = load_prompts(
        config.prompts,
        target.tokenizer,
        config.prompt_format,
        n=config.n_prompts + more,
        part="last",
        text_prompt_tokens=config.text_prompt_tokens,
        max_tokens=None if room is None else room - config.max_new_tokens,
        vocab_size=target.vocab_size,
    )
    if len(rows) < config.n_prompts + more:
        wanted = f"n_prompts {config.n_prompts}" + (f" and {more} other rows" if more else "")
        raise InputError(f"{config.prompts} has {len(rows)} rows, not {wanted}; ask for less")
    return rows[more:], rows[:more]


def holdout_warning(head: str, prompts: str, first_row: int) -> str | None:
    """Says so if a head was trained on rows of the file that it is evaluated on.

    head: its folder; what training wrote there, or in the folders above it, is read where it is
        found (any YAML or JSON that holds the `path` and `holdout_rows` of a source together)
    first_row: the first row of the file that the evaluation uses
    """
    folder = Path(head).resolve()
    for place in (folder, folder.parent, folder.parent.parent):
        for file in sorted([*place.glob("*.yaml"), *place.glob("*.json")]):
            sources = [s for s in _sources(file) if Path(s["path"]).name == Path(prompts).name]
            if not sources:
                continue
            rows = read_rows(prompts)
            # Of several the one that reached farthest counts.
            trained = max(_n_read(source, len(rows)) for source in sources)
            if trained and first_row <= rows[trained - 1][0]:
                return (
                    f"{head} was trained on the first {trained} rows of {Path(prompts).name} "
                    f"({file.name}), and the evaluation begins at row {first_row + 1}: its "
                    "figures flatter the head; use fewer prompts or another file"
                )
            return None
    return None


def _sources(file: Path) -> list[dict[str, Any]]:
    """The parts of a recorded configuration that say which rows were trained on."""
    try:
        if file.stat().st_size > _MAX_RECORD_BYTES:
            return []
        read = json.loads if file.suffix == ".json" else yaml.safe_load
        stack = [read(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, yaml.YAMLError):
        return []  # not ours
    found = []
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("path"), str) and isinstance(item.get("holdout_rows"), int):
                found.append(item)
            stack.extend(value for key, value in item.items() if key != "eval")
    return found


def _n_read(source: dict[str, Any], n_rows: int) -> int:
    kept = max(0, n_rows - source["holdout_rows"])
    return min(kept, source.get("n_rows") or kept)
