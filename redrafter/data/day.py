"""The day that the texts of a run are rendered on.

A chat template may print the date (`strftime_now`), and a run that goes on tomorrow must give the
same tokens. So the day is part of what identifies a store or a journal, is read back where one was
begun, and every rendering of the run is told it. Where the template prints none, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

#: the name by which a template asks for the date, and the key that it is kept under
CLOCK, KEY = "strftime_now", "day"


def prints_date(tokenizer: Any) -> bool:
    """Whether the chat template asks for the date."""
    return CLOCK in str(getattr(tokenizer, "chat_template", None))


def day_of(tokenizer: Any, begun: Mapping[str, Any] | None = None) -> str | None:
    """The date of a run, YYYY-MM-DD: today's, or that of the run that it goes on with.

    begun: what identifies that run, None where there is none
    Returns None where the template prints no date, and for a run from before days were kept.
    """
    if not prints_date(tokenizer):
        return None
    return date.today().isoformat() if begun is None else begun.get(KEY)


def dated(identity: dict[str, Any], day: str | None) -> dict[str, Any]:
    """An identity that holds the day, if there is one."""
    return identity if day is None else {**identity, KEY: day}
