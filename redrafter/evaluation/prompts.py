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
# What a row holds, told by its keys; the first match counts.
_FORMAT_OF_KEY = {
    "turns": "turns",
    "messages": "messages",
    "conversations": "messages",
    "question": "question",
    "text": "text",
}


def number_list(name: str, text: str, kind: Callable[[str], Number], least: Number) -> list[Number]:
    """ "1,4" -> [1, 4]. Raises InputError naming the option."""
    try:
        values = [kind(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"{name}: {text!r} is not a comma-separated list of numbers") from None
    if min(values) < least:
        raise InputError(f"{name}: {min(values)} is below {least}")
    return list(dict.fromkeys(values))


def detect_format(path: str) -> str:
    """Prompt format of a file, by the keys of its first row. Raises InputError naming the file."""
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path} has no rows; give a file of prompts")
    keys = rows[0][1]
    for key, name in _FORMAT_OF_KEY.items():
        if key in keys:
            return name
    raise InputError(
        f"{path}:1: none of the keys {sorted(keys)} is one of {', '.join(_FORMAT_OF_KEY)}; "
        "set prompt_format, or rename a key"
    )


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
    form = config.prompt_format
    rows = load_prompts(
        config.prompts,
        target.tokenizer,
        detect_format(config.prompts) if form == "auto" else form,
        n=config.n_prompts + more,
        part="last",
        text_prompt_tokens=config.text_prompt_tokens,
        max_tokens=None if room is None else room - config.max_new_tokens,
    )
    if len(rows) < config.n_prompts + more:
        wanted = f"n_prompts {config.n_prompts}" + (f" and {more} other rows" if more else "")
        raise InputError(f"{config.prompts} has {len(rows)} rows, not {wanted}; ask for less")
    return rows[more:], rows[:more]


def holdout_warning(head: str, prompts: str, first_row: int) -> str | None:
    """Says so if a head was trained on rows of the file that it is evaluated on.

    head: its folder; what training wrote there, or in the folders above it, is read where it is
        found (any YAML or JSON that holds `prompts` and `holdout_rows` together)
    first_row: the first row of the file that the evaluation uses
    """
    folder = Path(head).resolve()
    for place in (folder, folder.parent, folder.parent.parent):
        for file in sorted([*place.glob("*.yaml"), *place.glob("*.json")]):
            data = _training_data(file)
            if data is None or Path(data["prompts"]).name != Path(prompts).name:
                continue
            rows = read_rows(prompts)
            trained = max(0, len(rows) - int(data["holdout_rows"]))
            trained = min(trained, data.get("n_prompts") or trained)
            if trained and first_row <= rows[trained - 1][0]:
                return (
                    f"{head} was trained on the first {trained} rows of {Path(prompts).name} "
                    f"({file.name}), and the evaluation begins at row {first_row + 1}: its "
                    "figures flatter the head; use fewer prompts or another file"
                )
            return None
    return None


def _training_data(file: Path) -> dict[str, Any] | None:
    """The part of a recorded configuration that says which prompts were trained on."""
    try:
        if file.stat().st_size > _MAX_RECORD_BYTES:
            return None
        read = json.loads if file.suffix == ".json" else yaml.safe_load
        stack = [read(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, yaml.YAMLError):
        return None  # not ours
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("prompts"), str) and isinstance(item.get("holdout_rows"), int):
                return item
            stack.extend(item.values())
    return None
