"""Which device a process computes on, and what it is called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from redrafter.contracts import InputError
from redrafter.processes import join, launched, on_cpu


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator torch knows of, of several processes the one that accelerate gives
    to this process; else the CPU. Raises InputError for one device that all would share."""
    if launched() == 1:
        if name != "auto":
            return torch.device(name)
        if torch.accelerator.is_available() and not on_cpu():
            return torch.accelerator.current_accelerator()
        return torch.device("cpu")
    own = join(cpu=name == "cpu").device
    if own.type == "cpu":  # accelerate numbers these, too
        own = torch.device("cpu")
    wanted = own if name == "auto" else torch.device(name)
    if wanted.type != own.type or wanted.index not in (None, own.index):
        raise InputError(
            f"target.device {name}, but accelerate gave {own} to process {join().process_index} of "
            f"{launched()}: set target.device auto, each process then takes its own"
        )
    return own


def device_name(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
