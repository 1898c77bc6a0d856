"""What can end a run from outside: a signal, or the loss of another process."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from redrafter.contracts import InputError
from redrafter.training.checkpoint import all_steps

#: exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL of sysexits.h)
RESUMABLE = 75

#: what gloo and NCCL say when the other side is gone
_LOST = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|remote process has exited|"
    "unhandled system error|Timed out waiting|timed out|Socket Timeout",
    re.IGNORECASE,
)


class Interrupted(Exception):
    """A run was asked to stop, and has left a checkpoint."""


class Interruption:
    """Within it a SIGTERM is only noted (`asked`), so that the step at hand can be finished and a
    checkpoint written. A second one ends the process at once."""

    asked = False

    def __enter__(self) -> Interruption:
        self._before = None
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:
            pass  # signals can be handled in the main thread only
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def stopped(self, path: Path) -> Interrupted:
        return Interrupted(
            f"stopped by SIGTERM: {path} is written, the same command with --resume auto goes on"
        )


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
