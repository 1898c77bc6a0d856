"""Who makes the optimiser's steps: one process, data parallel ones, FSDP or DeepSpeed.

accelerate chooses by how it was launched (configs/accelerate); the loss, the gradient and AdamW
are the same for all of them. The positions of a step are shared out, every process divides its part
by the weight of the whole step, and as all of these engines average gradients over the processes,
the loss is multiplied by their number: the sum over processes is the gradient of the whole step.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor, nn

from redrafter.config import OptimConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.heads.base import DraftHead
from redrafter.heads.lora import is_adapted
from redrafter.processes import asked_for, join
from redrafter.targets.devices import pick_device
from redrafter.training.feed import Batch
from redrafter.training.sharded import FullySharded, Parts, Whole, Zero
from redrafter.training.step import StepLoss


def connect(config: TrainConfig) -> Accelerator:
    """accelerate, as it was launched. Raises InputError where that is not what was asked for."""
    device = pick_device(config.target.device)
    zero = asked_for("DEEPSPEED")
    cpu = device.type == "cpu" and not zero  # told of a CPU, accelerate drops DeepSpeed silently
    join(cpu)
    out = Path(config.output_dir)
    project = ProjectConfiguration(str(out), logging_dir=str(out / "logs"))
    # With one depth the recurrence's matrix is not used at all.
    handler = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, find_unused_parameters=config.optim.depth == 1
    )
    accelerator = Accelerator(
        cpu=cpu, log_with=config.tracker, project_config=project, kwargs_handlers=[handler]
    )
    check_engine(accelerator)
    check_device(accelerator, device)
    if zero:
        _load_whole()
    return accelerator


def _load_whole() -> None:
    """While accelerate has a configuration of ZeRO-3, transformers loads every model in parts, the
    target's weights too: empty tensors outside of its own forward passes."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_engine(accelerator: Accelerator) -> None:
    """accelerate replaces what it cannot give by something else, silently."""
    found = accelerator.distributed_type
    if asked_for("DEEPSPEED") and found != DistributedType.DEEPSPEED:
        raise InputError(
            f"DeepSpeed was asked for, accelerate made {found.value}: it drops DeepSpeed where it "
            "is told to use a CPU. Set use_cpu: false, and unset ACCELERATE_USE_CPU"
        )
    if asked_for("FSDP") and found != DistributedType.FSDP:
        raise InputError(
            f"FSDP was asked for, accelerate made {found.value}: it has FSDP on accelerators only, "
            "with two processes or more. On CPUs take configs/accelerate/ddp.yaml or zero3.yaml"
        )
    if found == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 0:
        raise InputError("DeepSpeed with zero_stage 0: take 1, 2 or 3, or configs/accelerate/ddp")
    if found == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError("fsdp_version 1 is not supported: set fsdp_version: 2")


def check_device(accelerator: Accelerator, device: torch.device) -> None:
    """The head is trained where accelerate says, on batches that come from the target's device."""
    theirs = accelerator.device
    same = device.type == theirs.type
    if same and (device.index or 0) != (theirs.index or 0):
        same = device.index is None and accelerator.num_processes > 1  # each has its own
    if not same:
        raise InputError(
            f"target.device {device}, but accelerate trains on {accelerator.device}: set "
            "target.device auto, and choose among devices by CUDA_VISIBLE_DEVICES"
        )


class Engine:
    """The head and its optimiser, prepared by accelerate.

    model: what is called for a loss; head: the head in it
    skips: (3,) int64 on the device: optimiser steps left out because the gradient was not finite,
        in all, in a row up to now, and in the longest row
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loss: StepLoss,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
    ):
        self.accelerator, self.optim, self.head = accelerator, optim, loss.head
        self.target = loss.target
        self.world = accelerator.num_processes
        self.kind = accelerator.distributed_type
        # Copies for measuring and saving need to know how the head is made, without its hooks.
        self._twin: DraftHead | None = None
        if self.kind in (DistributedType.DEEPSPEED, DistributedType.FSDP) and is_adapted(loss.head):
            raise InputError(
                "head.lora needs a head that every process holds whole (what is trained is small "
                "anyway): launch with configs/accelerate/ddp.yaml or single.yaml"
            )
        if self.kind == DistributedType.DEEPSPEED:
            self._set_up_deepspeed()
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(loss, optimizer)
        self.parts = self._parts()
        self.skips = torch.zeros(3, dtype=torch.long, device=accelerator.device)

    def _set_up_deepspeed(self) -> None:
        """What DeepSpeed wants to know, from our own configuration, so that nothing is said twice.

        Its micro-batches are what we hand over, and are counted by us.
        """
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = 1
        config["gradient_clipping"] = self.optim.clip_norm or 0.0

    def _parts(self) -> Parts:
        if self.kind == DistributedType.DEEPSPEED:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return Zero(self.head, self.optimizer.optimizer, stage)
        if self.kind == DistributedType.FSDP:
            return FullySharded(self.model, self.optimizer.optimizer)
        return Whole(self.head, self.optimizer.optimizer)

    # -- a step ----------------------------------------------------------------------------

    def step(
        self, pieces: list[Batch], denominator: Tensor, lr: float, done: float = 0.0
    ) -> Tensor:
        """One optimiser step on this process's micro-batches.

        denominator: `total_weight` of the step, summed over all processes
        done: part of the training before it, as `batch_loss` takes it
        A step whose gradient is not finite changes nothing and is counted in `skips`.
        Returns the counts of `batch_loss`, of this process; zeros if the step was skipped.
        """
        self.model.train()
        for group in self.optimizer.param_groups:  # DeepSpeed steps inside of the backward pass
            group["lr"] = lr
        counts = None
        for number, piece in enumerate(pieces, start=1):
            last = number == len(pieces)
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, found = self.model(piece, denominator, done)
                self.accelerator.backward(loss if self.world == 1 else loss * self.world)
            counts = found if counts is None else counts + found
        bad = self._update()
        row = (self.skips[1] + 1) * bad
        self.skips = torch.stack((self.skips[0] + bad, row, torch.maximum(self.skips[2], row)))
        return counts.masked_fill(bad, 0.0)

    def _update(self) -> Tensor:
        """Clip and step. Returns a bool scalar on the device: whether the step was skipped.

        The same in all processes, for it is the summed gradient that is looked at.
        """
        device = self.accelerator.device
        if self.kind == DistributedType.DEEPSPEED:
            # It has looked, clipped and stepped by now.
            return torch.tensor(bool(self.optimizer.step_was_skipped), device=device)
        limit = math.inf if self.optim.clip_norm is None else self.optim.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = ~norm.isfinite()
        adam = self.optimizer.optimizer
        if self.accelerator.scaler is not None:  # it looks for itself, to find its scale
            self.optimizer.step()
        elif self.kind == DistributedType.FSDP:
            if not bad:
                self.optimizer.step()
        else:
            adam.found_inf = bad.float()  # the fused AdamW skips on the device: nothing is read
            self.optimizer.step()
            del adam.found_inf
        self.optimizer.zero_grad()
        return bad

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes; collective."""
        return values if self.world == 1 else self.accelerator.reduce(values, "sum")

    # -- the whole head --------------------------------------------------------------------

    def whole_head(self) -> DraftHead:
        """The head with all of its weights, to decode with or to save; collective.

        Where they lie in parts (or in half precision) it is a copy, on the target's device until
        `release` is called.
        """
        weights = self.parts.weights()
        if weights is None:
            return self.head.eval()
        if self._twin is None:
            self._twin = type(self.head)(self.head.config)
        self._twin.load_state_dict(weights)
        del weights
        return self._twin.to(self.target.device).bind(self.target).eval()

    def release(self) -> None:
        """The copy leaves the device."""
        if self._twin is not None:
            self._twin.to("cpu")
