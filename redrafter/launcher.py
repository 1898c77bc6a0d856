"""What a process and the launcher above it (accelerate's, or torchrun) owe each other at the end.

accelerate starts one process by itself and waits for it: a SIGTERM ends the launcher alone, and
whatever ends the process but success gets the launcher's traceback. Several it starts by torchrun,
which passes a signal on (so that after Ctrl-C in a terminal each process gets two), waits 30 s, and
then reports. Neither says what a run that was asked to stop needs to say last: how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from redrafter.processes import launch_arguments

_LOOK_S = 0.5  # how often it is asked whether the launcher is still there
_FOLLOWER = "follows the launcher"
_PATIENCE_S = 5.0  # for a launcher that was asked to end
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
#: prints $2 once process $1 is gone; the sixty seconds are twice what torchrun waits
_AFTER = """\
n=0; while kill -0 "$1" 2>/dev/null && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
printf '%s\\n' "$2"
"""


def launcher() -> int | None:
    """The process id of the launcher that started this process; None without one."""
    try:
        import psutil

        parent = psutil.Process(os.getppid())
        words = parent.cmdline()
    except Exception:  # a parent that cannot be read must not stop any work
        return None
    torchrun = any(Path(word).name in _TORCHRUN for word in words[:3])
    return parent.pid if torchrun or launch_arguments(words) is not None else None


def follow() -> None:
    """From now on a launcher that is gone counts as a SIGTERM: nobody else would end this process.
    By looking now and then, which every system can do."""
    above = launcher()
    if above is None or any(thread.name == _FOLLOWER for thread in threading.enumerate()):
        return

    def look() -> None:
        while os.getppid() == above:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name=_FOLLOWER, daemon=True).start()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it a SIGTERM is a KeyboardInterrupt with its name, as Ctrl-C is one without."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # signals can be handled in the main thread only
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def from_terminal() -> bool:
    """Whether a SIGINT now is Ctrl-C in a terminal, which the launcher gets as well."""
    try:
        return os.tcgetpgrp(sys.__stdin__.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):
        return False


def end_launcher() -> None:
    """End a launcher of one process without its traceback; torchrun cannot be kept from its own."""
    above = launcher()
    if above is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        with contextlib.suppress(OSError):
            os.kill(above, signal.SIGTERM)


def last_word(text: str) -> None:
    """Say how to go on, below all that a launcher says: the process is about to end with an exit
    status that no launcher passes on."""
    above = launcher()
    if above is None or os.name != "posix":
        print(text, flush=True)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a launcher that ends may take its session along
    if "TORCHELASTIC_RUN_ID" in os.environ:  # it waits for us, and then speaks
        sys.stdout.flush()
        subprocess.Popen(["sh", "-c", _AFTER, "sh", str(above), text], start_new_session=True)
    else:
        end_launcher()
        limit = time.monotonic() + _PATIENCE_S
        while os.getppid() == above and time.monotonic() < limit:
            time.sleep(0.01)
        print(text, flush=True)
