"""One chain of guesses per row from any head: what an engine without trees can verify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import InputError


def check_depth(head: Any, depth: int, option: str) -> None:
    """Raises InputError where a head cannot draft that many tokens ahead, or not by `draft_chain`.

    option: what the depth was given as, for the message
    """
    if head.reads_prefix:
        raise InputError(
            "this head reads the whole row (head.prefix attention), and an engine shows a proposer "
            "neither which request a row is nor the states of a prompt that it found in its cache: "
            "serve a head trained with head.prefix none; here (generate, eval) this one drafts"
        )
    if head.aux_layers:
        raise InputError(
            f"this head reads the states of layers {list(head.aux_layers)} (head.aux_layers), and "
            "an engine shows a proposer the last layer's alone: serve a head trained without; here "
            "(generate, eval) this one drafts"
        )
    if depth < 1:
        raise InputError(f"{option} = {depth}; at least 1 is needed")
    if head.max_depth is not None and depth > head.max_depth:
        raise InputError(
            f"{option} = {depth}, but this head drafts {head.max_depth} tokens ahead at most: "
            f"set it to {head.max_depth}"
        )


@torch.inference_mode()
def draft_chain(head: Any, target: Any, context: Tensor, tokens: Tensor, depth: int) -> Tensor:
    """The best chain of every row, level by level; all rows in one call of the head per level.

    head: of any kind (`DraftHead`); target: has `embed(tokens)`
    context: (B, H), the hidden state whose logits chose `tokens`
    tokens: (B,) int64, the last known token of each row
    Returns (B, depth) int64 ids of the target's vocabulary.
    """
    context, last, states = context[:, None], tokens[:, None], None
    drafted = []
    for level in range(1, depth + 1):
        states, scores = head.read(target, last, context, states, level)
        last = head.to_vocab_ids(scores.argmax(-1))
        drafted.append(last)
    return torch.cat(drafted, 1)
