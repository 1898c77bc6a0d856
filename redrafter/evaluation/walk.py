"""A drafter walked over known texts: what greedy decoding would accept, without a target forward.

Ours. Greedy decoding emits the same text whatever is drafted, so the text can be given.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from redrafter.contracts import Drafter, InputError, RowState, StepStats, TokenTree, Truth
from redrafter.decode.stats import count_step, no_steps


@torch.inference_mode()
def walk(
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> StepStats:
    """The counts of greedy decoding, each prompt by itself.

    answers: the target's greedy answers, as `plain` gives them, at least one token each
    max_new_tokens: the limit that they were made with (a tree is not drafted past it); None takes
        each answer's own length
    Returns the stats of `speculative`, `steps` and `emitted` per prompt; of `seconds` only "draft",
    the drafter's calls, means something, and `forwards` is the sum of steps.
    Raises InputError for a drafter that must see hidden states, logits or the target's cache.
    """
    if drafter.needs or drafter.borrows_cache:
        needs = ", ".join(sorted(drafter.needs | ({"cache"} if drafter.borrows_cache else set())))
        raise InputError(f"walk: the drafter needs the target's {needs}, texts alone do not do")
    depth = drafter.max_depth
    n = len(prompts)
    stats = no_steps(n, depth)
    stats.seconds = {"draft": 0.0}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        limit = len(answer) if max_new_tokens is None else max_new_tokens
        _walk_one(drafter, list(prompt), list(answer), limit, stats, row, torch.device(device))
    stats.forwards = sum(stats.steps)
    return stats


def _walk_one(
    drafter: Drafter,
    prompt: list[int],
    answer: list[int],
    limit: int,
    stats: StepStats,
    row: int,
    device: torch.device,
) -> None:
    depth, text = drafter.max_depth, prompt + answer
    room = len(prompt) + limit + depth + 1
    ids = torch.zeros(1, room, dtype=torch.long, device=device)
    ids[0, : len(prompt)] = torch.tensor(prompt)
    length = torch.tensor([len(prompt)], device=device)
    seqs = RowState(ids, length, length.clone(), torch.tensor([len(answer) > 1], device=device))
    known = 0  # tokens of the answer that have been emitted

    def emit(new: list[int], width: int) -> Truth:
        """What the loop does once a step has emitted `new`."""
        nonlocal known
        tokens = torch.zeros(1, width, dtype=torch.long, device=device)
        tokens[0, : len(new)] = torch.tensor(new)
        at = len(prompt) + known
        ids[0, at : at + len(new)] = tokens[0, : len(new)]
        known += len(new)
        live = known < len(answer)
        seqs.length = torch.tensor([len(prompt) + known], device=device)
        seqs.live = torch.tensor([live], device=device)
        count = torch.tensor([len(new) if live else 0], device=device)
        return Truth(tokens, count)

    first = emit(answer[:1], 1)
    drafter.begin(seqs)
    drafter.observe(first)
    while known < len(answer):
        clock = time.perf_counter()
        drafter.start()
        for level in range(1, depth + 1):
            drafter.extend(level)
        tree = drafter.tree()
        stats.seconds["draft"] += time.perf_counter() - clock
        levels = limit - known
        tree.valid = tree.valid & (tree.depth <= levels)
        drafted = int(torch.where(tree.valid, tree.depth, 0).max())
        accepted = accepted_depth(tree, text[len(prompt) + known :])
        new = answer[known : known + accepted + 1]
        count_step(stats, row, drafted, accepted, len(new))
        stats.nodes_verified += tree.n_nodes
        truth = emit(new, depth + 1)
        truth.tree = tree
        clock = time.perf_counter()
        drafter.observe(truth)
        stats.seconds["draft"] += time.perf_counter() - clock


def accepted_depth(tree: TokenTree, text: Sequence[int]) -> int:
    """Levels of a tree of one row (B = 1) that the text behind its root goes along."""
    tokens, parent, valid = (x[0].tolist() for x in (tree.tokens, tree.parent, tree.valid))
    on_path = {0}
    for level, token in enumerate(text):
        on_path = {
            i for i in range(1, len(tokens))
            if valid[i] and tokens[i] == token and parent[i] in on_path
        }  # fmt: skip
        if not on_path:
            return level
    return len(text)
