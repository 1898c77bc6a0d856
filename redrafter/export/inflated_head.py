"""A recurrent head for an inflated target (`redrafter.targets.inflation`).

The hidden states of an inflated target are those of the small one with zeros behind, and so is the
state of the recurrence: SiLU(0), tanh(0) and a sum of zeros are 0. x = [c ; s] has its zeros in two
places, behind c and behind s. exit_dim grows in proportion, so that a draft costs what one of a
head for that width costs. A head's logits are equal up to rounding; with norms, whose
epsilon is not the head's, up to that of an epsilon of 1e-6. Ours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError
from redrafter.heads.base import DraftHead
from redrafter.targets.inflation import grown, placed


def inflate_head(head: DraftHead, hidden_size: int) -> DraftHead:
    """The same head for hidden states of `hidden_size`, in the dtype of its weights. It says still
    that it belongs to the small target. Raises InputError where it is wider than that, or of
    another kind."""
    old = head.config
    if hidden_size < old.hidden_size:
        raise InputError(
            f"hidden_size: {hidden_size} is less than the head's {old.hidden_size}; give a head "
            "that was trained for the small target"
        )
    config = copy.deepcopy(old)
    config.hidden_size = hidden_size
    config.exit_dim = old.exit_dim * hidden_size // old.hidden_size
    axes, made = _head_axes(old, config), {}
    for name, values in head.state_dict().items():
        values = values.detach().cpu()
        if name in ("input_norm.weight", "state_norm.weight"):
            values = values * (old.hidden_size / hidden_size) ** 0.5
        made[name] = placed(values, *(axes[axis] for axis in _axes_of(name, values.dim(), head)))
    large = type(head)(config).to(next(head.parameters()).dtype)
    large.load_state_dict(made)
    return large.eval()


def _head_axes(old: Any, new: Any) -> dict[str | None, Tensor | None]:
    """As `placed` reads them."""
    hidden = grown(old.hidden_size, new.hidden_size)

    def repeated(times: int) -> Tensor:
        parts = [torch.where(hidden < 0, -1, hidden + i * old.hidden_size) for i in range(times)]
        return torch.cat(parts)

    exit_ = repeated(2) if old.exit_dim == 2 * old.hidden_size else None
    return {
        None: None,
        "hidden": hidden,
        "both": repeated(2),
        "gates": repeated(3),
        "exit": grown(old.exit_dim, new.exit_dim) if exit_ is None else exit_,
    }


def _axes_of(name: str, dims: int, head: DraftHead) -> tuple[str | None, ...]:
    """Of a tensor of a recurrent head; see `redrafter.heads.recurrent`."""
    part = name.split(".")[0]
    both = {
        "rnn_w": ("hidden", "hidden"),
        "rnn_u": ("hidden", "hidden"),
        "gru": ("gates", "hidden"),
        "input_norm": ("both",),
        "state_norm": ("hidden",),
        "input_proj": ("exit", "both"),
        "to_hidden": ("hidden", "exit"),
        "lm_head": ("exit", "exit"),
        "draft_ids": (None,),
        "inverse_rms": (),
    }.get(part)
    if both is None:
        raise InputError(
            f"head: a {type(head).__name__} cannot be inflated (nothing is known of its {part}): "
            "give a recurrent one"
        )
    if name == f"lm_head.{head.config.num_draft_layers}.weight":  # its own vocabulary
        both = (None, "exit")
    return both[:dims]
