"""What a step of decoding asks of a device: operations, and reads by the host.

On an accelerator every operation that is not a mere view is at least one launch, and every read is
a wait until all that was launched is done. Both are counted, not timed: they are the same on a CPU,
where they can be tested. Ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from redrafter.contracts import Drafter, Generation
from redrafter.data.answers import generation_config
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.targets.model import Target

#: operations whose result's shape or value the host must know
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
_COPIES = ("_to_copy", "copy_")
#: with a mask of bool for an index they are `nonzero` inside
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


@dataclass
class Counts:
    """Totals, or means per step. launches: operations that are not views"""

    operations: float = 0
    launches: float = 0
    host_reads: float = 0


class _Lists(TorchFunctionMode):
    """`tolist` reads the host without an operation on a CPU, and by a copy elsewhere."""

    def __init__(self, counter: CountOperations):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (Tensor.tolist, Tensor.numpy):
            return func(*args, **(kwargs or {}))
        self.counter.counts.host_reads += 1
        self.counter.reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.reading = False


class CountOperations(TorchDispatchMode):
    """Entered around work, counts what it asks of the device: `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.reading, self._lists = Counts(), False, _Lists(self)

    def __enter__(self) -> CountOperations:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # In inference mode operations that are made of others come as one: only the parts count.
        TorchDispatchMode.__enter__(self)
        try:
            out = func.decompose(*args, **(kwargs or {}))
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        self.counts.operations += 1
        self.counts.launches += not func.is_view
        self.counts.host_reads += not self.reading and _reads(func, args, out)
        return out


def _reads(func: Any, args: tuple, out: Any) -> bool:
    """Whether the host waits for an operation's result."""
    name = func.overloadpacket.__name__
    if name in _READS:
        return True
    if name in _INDEXED:
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1] or ())
    if name not in _COPIES or not isinstance(out, Tensor) or out.device.type != "cpu":
        return False
    return any(isinstance(x, Tensor) and x.device.type != "cpu" for x in args)


def per_step(
    decode: Callable[[GenerationConfig], Generation],
    settings: Callable[[int], GenerationConfig],
    tokens: tuple[int, int] = (8, 24),
) -> dict[str, float]:
    """Means per step of decoding: what a longer generation takes beyond a shorter one, so that the
    prefill is not counted; nor is what a first generation does once (matrices are packed).

    decode: of prompts that do not stop before; settings: new tokens -> what to decode with
    Returns the fields of `Counts`, and `steps`, how many the means are over.
    """
    found = []
    decode(settings(max(tokens)))  # tables of positions grow with a text, too
    for n in tokens:
        with CountOperations() as counter:
            made = decode(settings(n))
        found.append((made.stats.forwards, counter.counts))
    (short, less), (long, more) = found
    steps = max(1, long - short)
    means = {k: (v - asdict(less)[k]) / steps for k, v in asdict(more).items()}
    return {**means, "steps": long - short}


def of_decoding(
    target: Target, row: list[int], drafters: Mapping[str, Drafter]
) -> dict[str, dict[str, float]]:
    """`per_step` of plain decoding (`plain`) and with each drafter, greedily, of one row."""

    def settings(n: int) -> GenerationConfig:
        made = generation_config(0.0, n)
        made.eos_token_id = -1
        return made

    ways = {"plain": functools.partial(plain, target, [row])}
    for name, drafter in drafters.items():
        ways[name] = functools.partial(speculative, target, [row], drafter=drafter)
    return {name: per_step(decode, settings) for name, decode in ways.items()}
