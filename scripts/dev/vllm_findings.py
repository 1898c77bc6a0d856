"""What the programs of scripts/test_vllm.sh find: a line each, and whether it is right.

Rows that differ from a greedy text are never passed over: they are kept in a file, and
vllm_ties.py says whether near-ties explain them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

failed: list[str] = []
_differing: list[dict] = []


def say(what: str, right: bool | None = None) -> None:
    """One finding; None: only reported."""
    mark = {True: "ok    ", False: "WRONG ", None: "      "}[right]
    print(f"== {mark}{what}", flush=True)
    if right is False:
        failed.append(what)


def same(
    what: str,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    wanted: Sequence[list[int]],
) -> None:
    """How many greedy texts differ; right where none does, else the near-ties decide."""
    rows = [
        {"prompt": prompt, "tokens": text}
        for prompt, text, other in zip(prompts, texts, wanted, strict=True)
        if text != other
    ]
    _differing.extend({"what": what, **row} for row in rows)
    if rows:
        say(f"{what}: {len(rows)} of {len(texts)} rows differ (near-ties? see below)")
    else:
        say(f"{what}: 0 of {len(texts)} rows differ", True)


def near(
    what: str,
    theirs: Sequence[float],
    ours: Sequence[float],
    share: float,
    planted: bool = False,
) -> None:
    """Counts of an engine beside those of the library's own chain, which may differ by a share.

    planted: a fault was, and they must differ by more
    """
    within = all(abs(a - b) <= share * b for a, b in zip(theirs, ours, strict=True))
    theirs = [int(count) for count in theirs]
    more = ": not within" if not within else ": within"
    say(f"{what}: vLLM {theirs}, redrafter's chain {list(ours)}{more} {share:.0%}",
        within != planted)  # fmt: skip


def end(file: str | Path) -> int:
    """Write the rows that differ; the exit status."""
    Path(file).write_text(json.dumps(_differing), encoding="utf-8")
    return 1 if failed else 0
