"""Making the shards of a job: each process its own, the main one the manifest once all are there.

The folder is one that every process sees (on several machines: a shared file system). Which process
makes a shard changes nothing in it, so neither does their number, and what one launch left is gone
on with by another of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from redrafter.bars import Bar
from redrafter.data.store import Job, Store
from redrafter.processes import by_main, everyone, is_main, launched, mine, share_of, wait_to_see

#: columns of a shard, the rows left out, and where there is one its tally (see `Job.write`)
Shard = (
    tuple[dict[str, Tensor], Sequence[dict[str, Any]]]
    | tuple[dict[str, Tensor], Sequence[dict[str, Any]], Mapping[str, int]]
)


def fill(
    job: Job,
    sizes: Sequence[int],
    make: Callable[[int, Bar], Shard],
    *,
    what: str,
    unit: str,
    progress: bool = True,
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
    **facts: Any,
) -> Store:
    """Make the shards that are missing and write the manifest. Every process of a launch calls it,
    and gets the store.

    sizes: units of each shard, for the progress bar; make: called with a shard's number and the
        bar, which it moves by the shard's units
    together: what the making is done in (`Target.together`)
    facts: for the manifest
    """
    job.receipts = _together(job)
    todo = [i for i in range(len(sizes)) if i not in job.receipts]
    own = [todo[place] for place in mine(len(todo))]
    left = sum(sizes[i] for i in own)
    done = sum(sizes) - left if launched() == 1 else 0  # one cannot tell what others have done
    with Bar(total=done + left, initial=done, desc=share_of(what), unit=unit,
              unit_scale=unit == "token", disable=not (progress and is_main())) as bar:  # fmt: skip
        with together():
            for index in own:
                job.write(index, *make(index, bar))
    job.receipts = _together(job)
    by_main(lambda: job.finish(len(sizes), **facts))
    return open_filled(job)


def _together(job: Job) -> dict[int, dict[str, Any]]:
    """The receipts that all processes know of."""
    return {index: receipt for known in everyone(job.receipts) for index, receipt in known.items()}


def open_filled(job: Job) -> Store:
    """The store that a job has become, once this machine sees all of it. Every process calls it:
    none goes on before all have it."""
    if launched() > 1:
        wait_to_see(job.folder / "manifest.json")
        for receipt in by_main(lambda: job.receipts).values():
            if receipt["file"]:
                wait_to_see(job.folder / receipt["file"])
    store = Store(job.folder)
    everyone(None)
    return store
