"""The processes of one launch: accelerate starts them, this asks it who we are.

A job that can be split makes its shards by number, `mine(n)`, and the content of a shard does not
depend on who makes it; so the number of processes changes nothing but the time. What processes tell
each other goes through `everyone` and `by_main`, which every process must call alike, and in the
same order. A process that fails just ends, with its message: on its own machine the launcher ends
the others at once, and on any machine one that waits for it finds it gone (`everyone`).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from redrafter.contracts import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

#: one process may wait for another that still has shards to make
_PATIENCE = timedelta(days=7)
#: how late a shared file system may show a file that another machine wrote
_LATE_S = 120.0
#: a message that all processes have is printed by the main one: the launcher ends the others first
_LINGER_S = 2.0
#: where launchers say how many processes there are: torchrun (accelerate), then those of MPI
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_REMEDY = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} (on CPUs)"


def launched() -> int:
    """Processes of this launch, on all machines, as their launcher says; 1 without one."""
    return _number(_SIZES, 1)


def is_main() -> bool:
    """Whether this process speaks for the launch; known before `join`."""
    accelerate = sys.modules.get("accelerate")
    if accelerate is not None and accelerate.PartialState._shared_state:
        return accelerate.PartialState().is_main_process
    return _number(_RANKS, 0) == 0


def _number(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


def join(cpu: bool = False) -> PartialState:
    """The state of this process among all (`process_index`, `num_processes`, `is_main_process`,
    `device`); made on the first call, by accelerate, found again by later ones.

    cpu: do not use an accelerator although there is one
    Raises InputError where the launch did not give the processes that were asked for.
    """
    if not is_main():
        hide_bars()
    from accelerate import PartialState

    n = launched()
    if PartialState._shared_state:
        state = PartialState()
    else:
        check_launch()
        state = PartialState(**_options(cpu, n))
    if state.num_processes != n:
        raise InputError(
            f"{n} processes were launched, but accelerate sees {state.num_processes}: they would "
            f"work as copies that know nothing of each other. Launch with {_REMEDY.format(n=n)}"
        )
    return state


def hide_bars() -> None:
    """Those of loading weights, reading data sets, ...; before anything of theirs is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def name_the_cpu() -> None:
    """Where there is no accelerator. DeepSpeed, which transformers imports where it finds it, says
    at length that it saw none, unless it is told."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _options(cpu: bool, n: int) -> dict[str, Any]:
    """How accelerate is to connect n processes. Raises InputError where one has no device."""
    import torch

    cpu = cpu or on_cpu()
    nothing_else = not torch.accelerator.is_available()
    if asked_for("DEEPSPEED") and nothing_else:
        _leave_unbuilt()
    name_the_cpu()
    if n == 1:
        return {"cpu": cpu}
    options: dict[str, Any] = {"timeout": _PATIENCE}
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not (cpu or nothing_else) and local >= torch.accelerator.device_count():
        raise InputError(
            f"process {local} of this machine has no accelerator to itself, there are "
            f"{torch.accelerator.device_count()}: launch as many processes a machine, or set "
            "ACCELERATE_USE_CPU=true"
        )
    if asked_for("DEEPSPEED"):
        # Told of a CPU, accelerate drops DeepSpeed; told nothing, it finds no way to communicate.
        return options | ({"backend": "gloo"} if nothing_else else {})
    # Without it accelerate connects nothing on a machine that has no accelerator.
    return options | {"cpu": cpu or nothing_else}


def _leave_unbuilt() -> None:
    """The operator that DeepSpeed would compile for the processes of one CPU (a minute, and a
    compiler): gloo alone does."""
    import deepspeed

    if (operators := getattr(deepspeed.ops, "__compatible_ops__", None)) is not None:
        operators["deepspeed_shm_comm"] = False


def asked_for(engine: str) -> bool:
    """Whether the launch asked accelerate for DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def on_cpu() -> bool:
    """Whether the launch was told to leave accelerators alone."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")


def mine(n: int) -> range:
    """Of shards 0 .. n - 1 those that this process makes."""
    if launched() == 1:
        return range(n)
    state = join()
    return range(state.process_index, n, state.num_processes)


# ------------------------------------------------------------------------------------ launching


def check_launch() -> None:
    """Raises InputError where `accelerate launch` started fewer processes than it was asked for,
    which it does without a word (`--cpu`, `use_cpu` or MULTI_CPU without MPI: one)."""
    wanted, n = requested(), launched()
    if wanted is not None and wanted != n:
        raise InputError(
            f"accelerate launch was asked for {wanted} processes and started {n} (it does so with "
            "--cpu, use_cpu or MULTI_CPU, and where it finds no GPU): launch with "
            f"{_REMEDY.format(n=wanted)}, or ask for --num_processes {n}"
        )


def check_alone(command: str) -> None:
    """Raises InputError where several processes run a command that works in one."""
    n = max(launched(), requested() or 1)
    if n > 1:
        raise InputError(
            f"{command} works in one process, and {n} were launched, which would all write the "
            f"same files: start it with python {command}, or --num_processes 1"
        )


def requested() -> int | None:
    """Processes that `accelerate launch` was asked for, by its command line or its configuration
    file, if it is our parent; None where that is not so, or not known."""
    try:
        import psutil

        parent = psutil.Process().parent()
        arguments = launch_arguments(parent.cmdline())
        return None if arguments is None else _requested(arguments, parent.cwd())
    except (Exception, SystemExit):  # a parent that cannot be read must not stop any work
        return None


def launch_arguments(words: Sequence[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line, None if it is another command."""
    names = [Path(word).name for word in words]
    for i, name in enumerate(names[:3]):
        if name in ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py"):
            return list(words[i + 2 :]) if names[i + 1 : i + 2] == ["launch"] else None
        is_file = name == "launch.py" and "accelerate" in Path(words[i]).parts
        if name in ("accelerate-launch", "accelerate.commands.launch") or is_file:
            return list(words[i + 1 :])
    return None


def _requested(arguments: list[str], folder: str) -> int | None:
    """By accelerate's own parser and reader; see `_validate_launch_command` there."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    with contextlib.redirect_stderr(io.StringIO()):
        given = launch_command_parser().parse_args(arguments)
    if given.num_processes is not None:
        return given.num_processes
    if given.config_file is not None:
        return load_config_from_file(os.path.join(folder, given.config_file)).num_processes
    if given.cpu or not os.path.isfile(default_config_file):
        return None
    return load_config_from_file(None).num_processes


# ------------------------------------------------------------------------------------ together


def everyone(value: T) -> list[T]:
    """What every process gives, by process, for all of them; each waits for the last one.

    Raises InputError where another process has ended.
    """
    if launched() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * join().num_processes
    try:
        dist.all_gather_object(found, value, group=_meeting())
    except RuntimeError as error:
        known = "onnection" in str(error)  # closed, or reset, by the peer
        raise InputError(
            "another process of this launch has ended before its work was done: its own message "
            "says why, here or in the log of its machine. What is written is whole; the same "
            f"command goes on from there{'' if known else f' ({error})'}"
        ) from error
    return found


def by_main(work: Callable[[], T]) -> T:
    """Work that the main process does while the others wait; all get what it returns."""
    if launched() == 1:
        return work()
    return everyone(work() if join().is_main_process else None)[0]


def main_first(work: Callable[[], T]) -> T:
    """Work that every process does, but the others find what the main one left (a cache)."""
    if launched() == 1:
        return work()
    main = join().is_main_process
    result = work() if main else None
    everyone(None)
    return result if main else work()


_meeting_of: tuple[Any, Any] = (None, None)


def _meeting() -> Any:
    """A group of all processes on CPUs: who waits there burns no GPU, has the patience that work of
    unequal length needs, and notices when another one ends (NCCL's do not)."""
    global _meeting_of
    import torch.distributed as dist

    if _meeting_of[0] is not dist.group.WORLD:
        _meeting_of = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _meeting_of[1]


def wait_to_see(path: Path) -> None:
    """Wait for a file that another process has written: file systems may show it late.

    Raises InputError where it does not appear: the machines share no folder.
    """
    if launched() == 1:
        return
    limit = time.monotonic() + _LATE_S
    while not path.exists():
        if time.monotonic() > limit:
            raise InputError(
                f"process {join().process_index} does not see {path}, which another process of "
                "this launch wrote: all machines need the same folder, on a shared file system"
            )
        time.sleep(0.1)


# ------------------------------------------------------------------------------------ speaking


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if is_main():
        print(text, flush=True)


def share_of(what: str) -> str:
    """What a progress bar counts, which shows this process's part of the work only."""
    n = launched()
    return what if n == 1 else f"{what}, 1 of {n} processes"


def linger() -> None:
    """Before a process that is not the main one reports an error: if all have it, the main one
    prints it and the launcher ends this one meanwhile."""
    if not is_main():
        time.sleep(_LINGER_S)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """What the body prints before it ends the program (a usage, a help text) is printed once."""
    if is_main():
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code:
            linger()
            print(said.getvalue(), end="", file=sys.stderr)
        raise
