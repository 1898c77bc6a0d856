"""What can end a run from outside: a signal, or the loss of another process."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from redrafter.contracts import InputError
from redrafter.launcher import end_launcher, from_terminal
from redrafter.processes import is_main
from redrafter.training.refusals import all_steps

#: exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL of sysexits.h)
RESUMABLE = 75

#: a launcher passes on what a terminal has sent to everyone: within this time it is the same signal
_SAME_S = 3.0
#: SIGHUP: the terminal is gone, or the launcher that it belonged to
_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

#: what gloo and NCCL say when the other side is gone
_LOST = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|remote process has exited|"
    "unhandled system error|Timed out waiting|timed out|Socket Timeout",
    re.IGNORECASE,
)


class Interrupted(Exception):
    """A run was asked to stop, and has left a checkpoint."""


class Interruption:
    """Within it SIGINT, SIGTERM and SIGHUP are only noted (`asked`), so that the step at hand can
    be finished and a checkpoint written. Another one, later, ends the process at once."""

    asked = False

    def __enter__(self) -> Interruption:
        self._before: dict[int, Any] = {}
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # whoever started us wants it so
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                pass  # signals can be handled in the main thread only
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._when = True, now
            self._name = signal.Signals(number).name
            if number == signal.SIGINT and from_terminal():
                end_launcher()  # it has the same signal, and would end with a traceback
            text = f"\n{self._name}: ends after this step (another one: at once)\n"
            _write(text if is_main() else "")
        elif now - self._when > _SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stopped(self, path: Path) -> Interrupted:
        # Another process of the launch may have been told instead.
        by = f" by {self._name}" if self.asked else ""
        return Interrupted(
            f"stopped{by}: {path} is written, the same command with --resume auto goes on"
        )


def _write(text: str) -> None:
    """To the error output, where print may be at work; and if the terminal is gone, nothing that is
    printed from now on may end the process."""
    for number, content in ((1, ""), (2, text)):
        try:
            os.write(number, content.encode())
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextmanager
def lost_peers(world: int, checkpoints: Path) -> Iterator[None]:
    """Says which checkpoint is left when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if world == 1 or not _LOST.search(str(error)):
            raise
        steps = all_steps(checkpoints)
        left = f"from step {steps[-1]}" if steps else "from the start: there is no checkpoint yet"
        raise InputError(
            f"another of the {world} processes is gone (its own message says why; "
            f"{str(error).splitlines()[0][:200]}). The same command with --resume auto goes on "
            f"{left}"
        ) from error
