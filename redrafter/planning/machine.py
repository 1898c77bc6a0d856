"""What this machine has: memory of a device, of the host, of a container; the bytes in use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from redrafter.config import PlanConfig
from redrafter.planning.plan import Memory
from redrafter.planning.world import World
from redrafter.targets.devices import device_name

_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def resident_bytes() -> int:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss


def host_memory(wanted: PlanConfig, world: World, option: int | None, name: str) -> Memory:
    """The machine's, or a container's where that is less; what this process has now will be free
    when the job begins. option: a number given instead"""
    if option is not None:
        return Memory(name, option, option, world.local, given=True)
    found = psutil.virtual_memory()
    total, free = found.total, found.available
    for limit_file, used_file in _CGROUP:
        try:
            limit = int(Path(limit_file).read_text())
            used = int(Path(used_file).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < total:
            total, free = limit, min(free, limit - used)
    return Memory(name, total, min(total, free + resident_bytes()), world.local)


def memories(
    device: torch.device, wanted: PlanConfig, world: World
) -> tuple[Memory | None, Memory | None]:
    """(device, host); the second is None on a CPU, the first where the device is not here."""
    if device.type == "cpu":
        return host_memory(wanted, world, wanted.memory_bytes, "this machine"), None
    host = host_memory(wanted, world, wanted.host_bytes, "the host")
    if wanted.memory_bytes is not None:
        return Memory(str(device), wanted.memory_bytes, wanted.memory_bytes, given=True), host
    if device.type == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device)
        return Memory(f"{device} ({device_name(device)})", total, free), host
    return None, host


def free_disk(folder: str | Path, wanted: PlanConfig) -> int:
    """Of the disk that a folder lies on, or will lie on."""
    if wanted.disk_bytes is not None:
        return wanted.disk_bytes
    path = Path(folder or ".").absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def is_first_process() -> bool:
    """Whether this process should print: the others of a launch plan the same."""
    return int(os.environ.get("RANK", "0")) == 0
