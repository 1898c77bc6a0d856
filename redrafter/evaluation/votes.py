"""What the samples of a prompt agree on: the last number that most of them say.

Self-consistency (Wang et al. 2022, arXiv 2203.11171), for prompts that ask for a number. It is a
function of the texts, so a way of decoding that leaves the texts as they are leaves the votes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text: str) -> str | None:
    """As it is written, without the commas between thousands; None where there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def vote(texts: Sequence[str]) -> str | None:
    """The last number of most texts, of equally many the one that is said first; None where no
    text has one."""
    numbers = [number for number in map(last_number, texts) if number is not None]
    return Counter(numbers).most_common(1)[0][0] if numbers else None


def votes(
    rows: Sequence[Sequence[int]], samples: int, decode: Callable[[Sequence[int]], str]
) -> list[str | None]:
    """Of every prompt. rows: token ids of all samples, those of a prompt one after the other"""
    texts = [decode(row) for row in rows]
    return [vote(texts[i : i + samples]) for i in range(0, len(texts), samples)]


def told(body: dict[str, Any]) -> list[str]:
    """A line on the votes in figures of `measure_speed`; none where there are none."""
    wanted = body.get("votes", [])
    if not any(wanted):
        return []
    equal = {
        name: sum(a == b for a, b in zip(counts["votes"], wanted, strict=True))
        for name, counts in body["per_prompt"].items()
        if not body["methods"][name]["law_only"]
    }
    least = min(equal, key=equal.__getitem__)
    who = "every method" if equal[least] == len(wanted) else f"`{least}`, the worst method"
    return [
        f"majority vote on the last number: plain's for {equal[least]} of {len(wanted)} prompts "
        f"by {who}"
    ]
