"""The launch that is planned for, and what its engine keeps of a model in every process.

Sources: ZeRO (arXiv 1910.02054), figure 1; what DeepSpeed and DistributedDataParallel allocate
besides (a copy in float32, buckets) is read in their code and named below.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter.config import PlanConfig
from redrafter.contracts import InputError

_HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class World:
    """processes: all of them; local: those of this machine; sharding: "none", "ddp", "zero0" ..
    "zero3", "fsdp"; mixed: accelerate's mixed precision; bucket: elements of DeepSpeed's
    communication buffer; offloaded: what DeepSpeed keeps in host memory"""

    processes: int = 1
    local: int = 1
    sharding: str = "none"
    mixed: str = "no"
    bucket: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def stage(self) -> int:
        """ZeRO's: what is divided. FSDP divides everything, as stage 3 does."""
        if self.sharding == "fsdp":
            return 3
        return int(self.sharding[4:]) if self.sharding.startswith("zero") else 0

    @property
    def deepspeed(self) -> bool:
        return self.sharding.startswith("zero")

    def describe(self) -> str:
        if self.processes == 1 and self.sharding == "none":
            return "one process"
        named = {"none": "no sharding", "ddp": "DDP", "fsdp": "FSDP"}
        how = named.get(self.sharding, f"DeepSpeed ZeRO stage {self.stage}")
        half = "" if self.mixed == "no" else f", {self.mixed}"
        return f"{self.processes} processes, {how}{half}"


def world_of(wanted: PlanConfig, environment: dict[str, str] | None = None) -> World:
    """The launch of this process, as `accelerate launch` and torchrun tell it in the environment;
    what `wanted` sets comes first. Raises InputError where the two parts do not go together."""
    env = dict(os.environ) if environment is None else environment
    processes = wanted.processes or int(env.get("WORLD_SIZE", "1"))
    launched = int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1")))
    sharding, extra = wanted.sharding, {}
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        extra, stage, mixed = _deepspeed(env, mixed)
        sharding = sharding or f"zero{stage}"
    elif env.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        sharding = sharding or "fsdp"
    sharding = sharding or ("ddp" if processes > 1 else "none")
    if sharding == "none" and processes > 1:
        raise InputError(f"plan_for.sharding none goes with one process, not {processes}: take ddp")
    if sharding.startswith("zero") and "bucket" not in extra:
        extra["bucket"] = _default_bucket()
    return World(
        processes, wanted.processes_per_node or (processes if wanted.processes else launched),
        sharding, mixed, **extra,
    )  # fmt: skip


def _deepspeed(env: dict[str, str], mixed: str) -> tuple[dict[str, Any], int, str]:
    """(fields of World, stage, precision) of a launch with DeepSpeed."""
    prefix, file = "ACCELERATE_DEEPSPEED_", env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file not in ("none", "None", ""):
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    else:
        stage = int(env.get(prefix + "ZERO_STAGE", "2"))
        config = {"zero_optimization": {"stage": stage}}
        for name in ("optimizer", "param"):
            device = env.get(f"{prefix}OFFLOAD_{name.upper()}_DEVICE", "none")
            config["zero_optimization"][f"offload_{name}"] = {"device": device}
    zero = config.get("zero_optimization", {})
    for name in _HALF:
        if config.get(name, {}).get("enabled") is True:
            mixed = name
    offloaded = {
        name: (zero.get(f"offload_{short}") or {}).get("device", "none") != "none"
        for name, short in (("offload_optimizer", "optimizer"), ("offload_parameters", "param"))
    }
    bucket = zero.get("reduce_bucket_size")
    if isinstance(bucket, (int, float)):
        offloaded["bucket"] = int(bucket)
    return offloaded, int(zero.get("stage", 0)), mixed


def _default_bucket() -> int:
    """DeepSpeed's own default, asked of it; 0 where it is not installed."""
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError:
        return 0
    return int(DeepSpeedZeroConfig().reduce_bucket_size)


@dataclass(frozen=True)
class Shares:
    """Bytes of a trained model that one process keeps between two steps (parameters, master,
    averages), while it computes one (gathered, gradients, buckets), and while it applies one
    (update: gradients converted for the optimizer)."""

    parameters: int
    master: int
    averages: int
    gradients: int
    gathered: int = 0
    buckets: int = 0
    update: int = 0


def shares(world: World, trained: int, frozen: int, largest: int, averages: int = 2) -> Shares:
    """What ZeRO's stages divide: the optimizer's state from 1, gradients from 2, parameters from 3.

    trained, frozen: elements of the model; largest: of its largest parameter; averages: numbers
    that the optimizer keeps per trained element. Parameters are float32; under DeepSpeed with mixed
    precision half as wide. DeepSpeed's stages 1 and 2 keep a float32 copy of a process's part of
    the parameters even where these are float32; from stage 2 on a gradient is whole only until it
    is reduced, and the largest one is the most that is whole at a time.
    """
    stage, n = world.stage, world.processes
    half = world.mixed in _HALF
    width = 2 if world.deepspeed and half else 4
    part = -(-trained // n)
    own = part if stage >= 1 else trained
    master = 4 * own if world.deepspeed and (stage >= 1 or half) else 0
    buckets = 4 * trained if world.sharding == "ddp" else width * world.bucket * (stage >= 1)
    return Shares(
        parameters=width * (-(-(trained + frozen) // n) if stage >= 3 else trained + frozen),
        master=master,
        averages=4 * averages * own,
        gradients=width * ((part + largest) if stage >= 2 else trained),
        gathered=width * largest if stage >= 3 else 0,
        buckets=buckets,
        update=4 * part if world.deepspeed and stage >= 1 else 0,
    )
