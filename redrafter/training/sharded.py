"""The head's weights and AdamW's averages, whole, out of whatever holds them in parts.

Checkpoints have one format, whoever trained: safetensors by parameter name, the averages of every
parameter in float32. So a run goes on from any checkpoint under any engine and any number of
processes. Everything here that gathers is collective: all processes call it together.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: AdamW's state of one parameter; `step` is a scalar
AVERAGES = ("exp_avg", "exp_avg_sq", "step")


class Parts(Protocol):
    """What an engine keeps. Names are those of the head's own parameters."""

    def weights(self) -> dict[str, Tensor] | None:
        """All parameters, whole, in every process; None: the head itself has them whole."""
        ...

    def averages(self) -> dict[str, Tensor]:
        """ "name.exp_avg" and so on, in the main process (elsewhere anything)."""
        ...

    def load_averages(self, averages: dict[str, Tensor]) -> None:
        """The inverse; every process gives all of them."""
        ...


def trained(head: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in head.named_parameters() if p.requires_grad}


class Whole:
    """One process, or data parallel ones, which all hold everything."""

    def __init__(self, head: nn.Module, optimizer: torch.optim.Optimizer):
        self.head, self.optimizer = head, optimizer

    def weights(self) -> None:
        return None

    def averages(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in trained(self.head).items():
            state = self.optimizer.state.get(parameter) or _blank(parameter)
            found |= {f"{name}.{key}": state[key].contiguous() for key in AVERAGES}
        return found

    def load_averages(self, averages: dict[str, Tensor]) -> None:
        # Only the fused AdamW keeps its step count on the parameter's device.
        fused = self.optimizer.param_groups[0].get("fused")
        for name, parameter in trained(self.head).items():
            there = parameter.device
            self.optimizer.state[parameter] = {
                key: averages[f"{name}.{key}"].to(there if key != "step" or fused else "cpu")
                for key in AVERAGES
            }


def _blank(parameter: Tensor) -> dict[str, Tensor]:
    """Of a parameter that no step has changed yet."""
    zeros = torch.zeros_like(parameter, dtype=torch.float32)
    return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}


class FullySharded:
    """torch's fully_shard (FSDP2), by its own state-dict functions.

    model: the module given to fully_shard; prefix: of the head's parameters in it
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str = "head."):
        self.model, self.optimizer, self.prefix = model, optimizer, prefix

    def weights(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        found = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        return {name.removeprefix(self.prefix): tensor for name, tensor in found.items()}

    def averages(self) -> dict[str, Tensor]:
        state = self._optimizer_state(cpu_offload=True).get("state", {})  # of process 0 alone
        return {
            f"{name.removeprefix(self.prefix)}.{key}": torch.as_tensor(values[key]).contiguous()
            for name, values in state.items()
            for key in AVERAGES
        }

    def load_averages(self, averages: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        content = self._optimizer_state(cpu_offload=False)
        for name, values in content["state"].items():
            for key in AVERAGES:
                values[key] = averages[f"{name.removeprefix(self.prefix)}.{key}"].to(
                    self._device() if key != "step" else "cpu"
                )
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, content, options=options)

    def _optimizer_state(self, cpu_offload: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class Zero:
    """DeepSpeed ZeRO 1, 2, 3, by its `safe_get_full_*` and `safe_set_full_*`.

    optimizer: DeepSpeed's own, which holds flat float32 pieces of the parameters
    """

    def __init__(self, head: nn.Module, optimizer: Any, stage: int):
        self.head, self.optimizer, self.stage = head, optimizer, stage

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        buffers = dict(self.head.named_buffers())
        return buffers | {n: safe_get_full_fp32_param(p) for n, p in trained(self.head).items()}

    def averages(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._prepare()
        step = torch.tensor(float(self._states()[0]["step"]))
        found = {}
        for name, parameter in trained(self.head).items():
            for key in AVERAGES[:2]:
                whole = safe_get_full_optimizer_state(parameter, key)
                found[f"{name}.{key}"] = whole.cpu().contiguous()
            found[f"{name}.step"] = step.clone()
        return found

    def load_averages(self, averages: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._prepare()
        for name, parameter in trained(self.head).items():
            for key in AVERAGES[:2]:
                value = averages[f"{name}.{key}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)
        step = max(float(averages[f"{name}.step"]) for name in trained(self.head))
        for state in self._states():
            if torch.is_tensor(state["step"]):
                state["step"].fill_(step)
            else:  # DeepSpeed's own Adam for the CPU counts in Python
                state["step"] = int(step)

    def _pieces(self) -> list[Tensor]:
        """This process's flat float32 parameters, by group."""
        zero = self.optimizer
        return (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )

    def _states(self) -> list[dict[str, Any]]:
        return [self.optimizer.optimizer.state[piece] for piece in self._pieces()]

    def _prepare(self) -> None:
        """AdamW makes its averages in its first step, and DeepSpeed finds them only then."""
        adam = self.optimizer.optimizer
        tensors = isinstance(adam, torch.optim.AdamW)
        for piece in self._pieces():
            if not adam.state.get(piece):
                step = torch.zeros((), device=piece.device) if tensors else 0
                adam.state[piece] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(piece),
                    "exp_avg_sq": torch.zeros_like(piece),
                }
        if self.stage < 3:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for group, piece in zip(self.optimizer.bit16_groups, self._pieces(), strict=True):
                lazy_init_hp_params_optimizer_state(group, piece, adam.state)
