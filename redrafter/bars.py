"""The progress of long work: tqdm's bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

_FIRST_S = 10.0  # until the first line
_LOG_S = 30.0  # between two lines
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed}, {remaining} to go, {rate_fmt}{postfix}"


class Bar(tqdm):
    """tqdm, which draws its bar by returning to the line's beginning; where the error output is no
    terminal that leaves fragments, so there it writes whole lines: one after ten seconds, others
    every half minute, and one at the end, unless it is not to stay (`leave=False`) and was done
    before the first."""

    def __init__(self, *args: Any, **options: Any):
        self.lines = options.get("file") is None and not sys.stderr.isatty()
        self.shown, self.due = False, time.monotonic() + _FIRST_S
        if self.lines:
            options = {"mininterval": _FIRST_S, "maxinterval": _LOG_S, "miniters": 1,
                       "bar_format": _LINE, "delay": 1e-9, **options}  # fmt: skip
        super().__init__(*args, **options)

    def display(self, *args: Any, **options: Any) -> Any:
        """tqdm asks for it at its interval and at every postfix; a line is written when it is due.
        (Its interval itself must not change under way: its loop would count twice.)"""
        if not self.lines:
            return super().display(*args, **options)
        if time.monotonic() >= self.due:
            self._write_line()
        return True

    def _write_line(self) -> None:
        self.shown, self.due = True, time.monotonic() + _LOG_S
        self.fp.write(f"{self}\n")
        self.fp.flush()

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        if sys.stderr.isatty():
            super().write(s, file, end, nolock)
        else:
            print(s, file=file, end=end, flush=True)

    def close(self) -> None:
        if self.lines and not self.disable:
            self.disable = True  # tqdm's own end of a line is not needed
            if self.shown or (self.leave and self.n > self.initial):
                self._write_line()
            self._decr_instances(self)
        else:
            super().close()
