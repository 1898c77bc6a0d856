"""`--plan`: what a plan assumes where there is nothing to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import at_least

Sharding = Literal["none", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class PlanConfig:
    """What `--plan` plans for; what is left out is asked of machine, launch and data."""

    rows: int | None = None
    """Rows of text, where there is no data to count."""
    prompt_tokens: int = 256
    """Tokens of a prompt, where there is no data to look at."""
    processes: int | None = None
    """Processes; none takes those of this launch."""
    processes_per_node: int | None = None
    """Processes that share one machine's host memory; none takes them all."""
    sharding: Sharding | None = None
    """What the engine divides among the processes; none takes that of this launch."""
    memory_bytes: int | None = None
    """Memory of the device; none asks it what is free."""
    host_bytes: int | None = None
    """Memory of the machine beside an accelerator; none asks what is free."""
    disk_bytes: int | None = None
    """Free bytes of the disk; none asks it."""
    probe_s: float = 5.0
    """Seconds that each probe of a speed may take, loading left out; 0 makes none."""

    def __post_init__(self) -> None:
        at_least(1, self, "rows", "prompt_tokens", "processes", "processes_per_node")
        at_least(1, self, "memory_bytes", "host_bytes", "disk_bytes")
        at_least(0, self, "probe_s")
