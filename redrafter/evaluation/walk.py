"""A drafter walked over known texts: what greedy decoding would accept, and no tree is verified.

Ours. Greedy decoding emits the same text whatever is drafted, so the text can be given; and with it
the hidden states that a head drafts from, of one forward over the text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, StepStats, TokenTree, Truth
from redrafter.decode.stats import count_step, no_steps

#: what a drafter may need and find in hidden states
_OF_STATES = frozenset({"hidden", "prompt_hidden"})


@torch.inference_mode()
def walk(
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    device: torch.device | str = "cpu",
    states: Sequence[Tensor] | None = None,
) -> StepStats:
    """The counts of greedy decoding, each prompt by itself.

    answers: the target's greedy answers, as `plain` gives them, at least one token each
    max_new_tokens: the limit that they were made with (a tree is not drafted past it); None takes
        each answer's own length
    states: of each prompt (T, S), the hidden states that the target gives of all tokens of prompt
        and answer but the last (`Target.states`), for a drafter that reads them
    Returns the stats of `speculative`, `steps` and `emitted` per prompt; of `seconds` only "draft",
    the drafter's calls, means something, and `forwards` is the sum of steps.
    Raises InputError for a drafter that must see more: logits, the target's cache, hidden states
    where none are given.
    """
    given = frozenset() if states is None else _OF_STATES
    lacking = (drafter.needs - given) | ({"cache"} if drafter.borrows_cache else set())
    if lacking:
        raise InputError(
            f"walk: the drafter needs the target's {', '.join(sorted(lacking))}, which "
            f"{'texts alone do' if states is None else 'hidden states do'} not give"
        )
    depth = drafter.max_depth
    n = len(prompts)
    stats = no_steps(n, depth)
    stats.seconds = {"draft": 0.0}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        limit = len(answer) if max_new_tokens is None else max_new_tokens
        hidden = None if states is None else states[row]
        text = list(prompt), list(answer)
        _walk_one(drafter, *text, limit, stats, row, torch.device(device), hidden)
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
    states: Tensor | None,
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
        if states is None:
            return Truth(tokens, count)
        # The state before a token is the one that led to it; padded as tokens are.
        hidden = states.new_zeros(1, width, states.shape[-1])
        hidden[0, : len(new)] = states[at - 1 : at - 1 + len(new)]
        begun = states[None, : len(prompt)] if at == len(prompt) else None
        return Truth(tokens, count, hidden=hidden, prompt_hidden=begun)

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
