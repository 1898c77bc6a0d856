"""What a way of decoding is: it takes a batch and is timed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers import GenerationConfig

from redrafter.contracts import Drafter, StepStats
from redrafter.costs import synchronize
from redrafter.targets.model import Target, TargetOutput


@dataclass(frozen=True)
class PromptBatch:
    """Rows decoded together. texts: prompt and plain answer, for the drafter that knows them."""

    prompts: list[list[int]]
    seeds: list[int]
    texts: list[list[int]] = field(default_factory=list)


@dataclass
class TimedCall:
    """One timed call. seconds["total"] is wall-clock around everything, prefill included;
    "forward" is the time inside the target's forwards after the prefill, a part of "verify"; "cpu",
    where the target is on a CPU, is what all threads of the process computed meanwhile, however
    busy the machine was.
    stats: None where one forward makes one token by construction
    nodes: new tokens per row of each of those forwards; report: what the drafter said of itself"""

    tokens: list[list[int]]
    seconds: dict[str, float]
    stats: StepStats | None = None
    nodes: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


class Timing:
    """Per batch, of one method: tokens and median seconds over its repeats."""

    def __init__(self, runs: list[list[TimedCall]]):
        self.tokens = np.array([sum(map(len, r[0].tokens)) for r in runs], dtype=float)
        self.rows = np.array([len(r[0].tokens) for r in runs], dtype=float)
        self.total_s = self._median(runs, "total")
        self.prefill_s = self._median(runs, "prefill")  # 0 where it is not known
        self.cpu_s = self._median(runs, "cpu")  # likewise

    @staticmethod
    def _median(runs: list[list[TimedCall]], part: str) -> np.ndarray:
        return np.array([np.median([run.seconds.get(part, 0.0) for run in r]) for r in runs])

    def per_second(self) -> np.ndarray:
        return self.tokens / self.total_s

    def decode_per_second(self, prefill_s: np.ndarray) -> np.ndarray:
        """Tokens after the prefill's own per second after the prefill; nan where there are none."""
        new = self.tokens - self.rows
        return np.where(new > 0, new / np.maximum(self.total_s - prefill_s, 1e-9), np.nan)


class TimedTarget:
    """A target whose forwards are timed; the first one of a run is the prefill."""

    def __init__(self, target: Target):
        self._target = target
        self.times_s: list[float] = []
        self.nodes: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._target, name)

    def forward(self, tokens: Tensor, *args, **kwargs) -> TargetOutput:
        clock = time.perf_counter()
        out = self._target.forward(tokens, *args, **kwargs)
        self.times_s.append(time.perf_counter() - clock)
        self.nodes.append(tokens.shape[1])
        return out


class Method(ABC):
    """One way of decoding. `run` is what is timed."""

    #: the drafter whose costs bound the method's speed; None drafts nothing, or is not ours
    drafter: Drafter | None = None
    #: another one like it, whose costs are measured: what it learns meanwhile disturbs nothing
    twin: Drafter | None = None
    #: other people's loop: what its prefill takes is not known, nor what bounds it
    outside = False
    #: a lookahead may end its drafts before their full depth
    stops_early = False
    #: its text is another one than plain's, of the same law; not compared token by token
    law_only = False

    def __init__(self, name: str, target: Target, config: GenerationConfig):
        self.name, self.target, self.config = name, target, config

    def prepare(self, batch: PromptBatch) -> None:  # noqa: B027 - most methods know all they need
        """Untimed work before a batch."""

    def run(self, batch: PromptBatch) -> TimedCall:
        synchronize(self.target.device)
        clock, cpu = time.perf_counter(), time.process_time()
        run = self._run(batch)
        synchronize(self.target.device)
        run.seconds["total"] = time.perf_counter() - clock
        if self.target.device.type == "cpu":
            run.seconds["cpu"] = time.process_time() - cpu
        return run

    @abstractmethod
    def _run(self, batch: PromptBatch) -> TimedCall: ...
