"""One generation at a time for whoever keeps the state of one.

A drafter that served two, in two threads, would draft for one row from the other's text, and a tree
whose root is another row's token becomes text. A target and a head hold no such state: threads
share them, each with a drafter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from redrafter.contracts import InputError

_lock = Lock()
_serving: set[int] = set()


@contextmanager
def turn_of(*parts: object) -> Iterator[None]:
    """A drafter and a lookahead, until the generation ends. Raises InputError where one of them is
    serving another."""
    served = set(map(id, parts))
    with _lock:
        for part in parts:
            if id(part) in _serving:
                raise InputError(
                    f"this {type(part).__name__} is serving another generation, whose state it "
                    "keeps; build one for each thread (`load_strategy`, or a name as `draft`)"
                )
        _serving.update(served)
    try:
        yield
    finally:
        with _lock:
            _serving.difference_update(served)
