"""How many threads torch computes with, and how they wait for each other: decided here for every
command. A program that imports the library decides for itself: nothing here happens on import.

libgomp's threads spin at a barrier. Where another process has the core that a late one needs, they
spin away the time slice it waits for: with two threads beside one busy process on two cores, a
token of a small target took 55 ms instead of 1.5. Asleep they cost nothing to the others.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from redrafter.contracts import InputError

#: what a user may have said about waiting; of libgomp, of any OpenMP, of LLVM's and Intel's
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: a piece of work that takes longer is shared among all threads without asking
_SMALL_S = 0.05
#: more threads must be faster by this factor: they also take the cores from others
_WORTH = 1.1
_ROUNDS = 9
_LOOKS = 3  # a busy machine may make a small piece of work seem large once


def wait_asleep() -> None:
    """Threads that wait give up their core, unless the user has said how they wait. Must precede
    the first import of torch, which reads it once; after it nothing is changed."""
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def quota(root: Path = Path("/")) -> float | None:
    """CPUs that this process's control groups grant it, None without a limit or without Linux.

    root: where proc/ and sys/ lie
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    mounts, found = root / "sys/fs/cgroup", []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mounts / controllers if controllers else mounts
        base = base if base.is_dir() else mounts / "cpu"
        parts = Path(own.lstrip("/")).parts
        # A limit of any group above counts too; in a container the own one may be the mount itself.
        found += [_granted(base.joinpath(*parts[:n])) for n in range(len(parts) + 1)]
    return min((cpus for cpus in found if cpus is not None), default=None)


def _granted(group: Path) -> float | None:
    """CPUs by a group's own files: cpu.max (version 2), or a quota and its period (version 1)."""
    try:
        if (group / "cpu.max").is_file():
            most, period = (group / "cpu.max").read_text().split()
        else:
            most = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return int(most) / int(period) if most not in ("max", "-1") else None
    except (OSError, ValueError):
        return None


def allowed() -> int:
    """CPUs that this process may use: by its affinity and by its control groups, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return max(1, min(cpus, math.ceil(quota() or cpus)))


def fixed(threads: int | None) -> bool:
    """Whether the number is the user's: by `threads`, or by OMP_NUM_THREADS."""
    return threads is not None or "OMP_NUM_THREADS" in os.environ


def settle(threads: int | None = None) -> None:
    """Set torch's threads: `threads`, else OMP_NUM_THREADS, else as many as torch would take of the
    CPUs that are `allowed`; the same at every start. Raises InputError for less than 1."""
    import torch

    if threads is not None and threads < 1:
        raise InputError(f"threads: {threads} must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    elif not fixed(threads):
        torch.set_num_threads(min(torch.get_num_threads(), allowed()))


def choose(work: Callable[[], object]) -> int:
    """Set torch's threads to 1 where as many as are set now do not make a small piece of work
    clearly faster. Returns their number. By the clock, so for measurements alone: the number of
    threads may change the last digits of a sum."""
    import torch

    most = torch.get_num_threads()
    work()  # pays for what comes once
    if most == 1 or not any(_seconds(work) < _SMALL_S for _ in range(_LOOKS)):
        return most
    times: dict[int, list[float]] = {1: [], most: []}
    for _ in range(_ROUNDS):  # interleaved: a neighbour that comes or goes meets both
        for number, found in times.items():
            torch.set_num_threads(number)
            work()  # threads are started, or sent away
            found.append(_seconds(work))
    one, all_of_them = (statistics.median(found) for found in times.values())
    torch.set_num_threads(most if one > _WORTH * all_of_them else 1)
    return torch.get_num_threads()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
