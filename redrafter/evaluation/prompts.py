"""Which rows an evaluation uses, and arguments that are lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from redrafter.contracts import InputError
from redrafter.data.prompts import Prompt, load_prompts, read_rows, say_left_out
from redrafter.data.rows import RejectedRow
from redrafter.targets.model import Target
from redrafter.targets.text import tokenizer_of

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
    target: Target, config: Any, more: int = 0, behind: int = 0, day: str | None = None
) -> tuple[list[Prompt], list[Prompt], list[str]]:
    """The last `config.n_prompts` rows of `config.prompts`, and the `more` rows before them; rows
    that leave no room for an answer are left out of both.

    config: LosslessConfig or SpeedConfig
    behind: rows at the very end that are not read
    day: that a chat template may print, see `data/day.py` (None: today's)
    Returns also what there is to say of rows left out. Raises InputError naming the file where it
    has too few rows, and where none is short enough.
    """
    if config.n_prompts < 1 or config.max_new_tokens < 1:
        raise InputError(
            f"n_prompts {config.n_prompts} and max_new_tokens {config.max_new_tokens} must be "
            "positive"
        )
    wanted, left_out = more + config.n_prompts, list[RejectedRow]()
    room = target.max_positions
    kept = load_prompts(
        config.prompts,
        tokenizer_of(target, config.prompts),
        config.prompt_format,
        n=wanted + behind,
        part="last",
        text_prompt_tokens=config.text_prompt_tokens,
        max_tokens=None if room is None else room - config.max_new_tokens,
        vocab_size=target.vocab_size,
        day=day,
        prompt_column=config.prompt_column,
        left_out=left_out,
    )
    read = sorted([p.row for p in kept] + [r.source_row for r in left_out])
    if len(read) < wanted + behind:
        asked = f"n_prompts {config.n_prompts}" + (f" and {more} other rows" if more else "")
        asked += f" and {behind} behind them" if behind else ""
        raise InputError(f"{config.prompts} has {len(read)} rows, not {asked}; ask for less")
    first, last = read[more], read[wanted - 1]
    prompts = [p for p in kept if first <= p.row <= last]
    others = [p for p in kept if p.row < first]
    left_out = [r for r in left_out if r.source_row <= last]
    n_kept = len(kept) if prompts and (others or not more) else 0
    return prompts, others, say_left_out(left_out, n_kept, "max_new_tokens")


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
