"""The processes of one launch: accelerate starts them, this asks it who we are.

A job that can be split makes its shards by number, `mine(n)`, and the content of a shard does not
depend on who makes it; so the number of processes changes nothing but the time.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from redrafter.contracts import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

#: one process may wait for another that still has shards to make
_PATIENCE = timedelta(days=7)


def join(cpu: bool = False) -> PartialState:
    """The state of this process among all (`process_index`, `num_processes`, `is_main_process`,
    `wait_for_everyone()`); made on the first call, by accelerate, found again by later ones.

    cpu: do not use an accelerator although there is one
    Raises InputError where the launch did not give the processes that were asked for.
    """
    from accelerate import PartialState

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    kwargs = {"timeout": _PATIENCE} if launched > 1 else {}
    state = PartialState() if PartialState._shared_state else PartialState(cpu=cpu, **kwargs)
    if state.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}: they "
            "would work as copies that know nothing of each other. On CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return state


def mine(n: int) -> range:
    """Of shards 0 .. n - 1 those that this process makes."""
    state = join()
    return range(state.process_index, n, state.num_processes)
