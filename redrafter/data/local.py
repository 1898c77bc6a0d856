"""Local distillation: what the target itself would say after every position of a given text.

Source: ReDrafter (arXiv 2403.09919), knowledge distillation: at each position of the training
text the target continues greedily for a few tokens, and the head learns those. Text that the
target did not write is thereby labelled with what the target would have written.

All positions go on together. Every wanted position t has one chain of nodes, and one forward adds
one node to every chain. With the text of length T in the cache, C chains and two passes done, the
keys of the third pass are

    | text 0 .. T-1 | (t_1, 1) .. (t_C, 1) | (t_1, 2) .. (t_C, 2) | (t_1, 3) .. (t_C, 3) |

and the node (t, j), the j-th token said after t, stands at position t + j. It sees the text up to
t and the nodes (t, 1) .. (t, j), which are one column in C, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from redrafter.contracts import InputError
from redrafter.data.finite import choice
from redrafter.data.rows import padded_with_last
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target


@torch.inference_mode()
def continue_greedily(
    target: Target,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[bool]],
    n: int,
    *,
    max_nodes: int = 256,
    eos: set[int] | None = None,
) -> list[Tensor]:
    """For every position t of every row with wanted[t]: the n tokens that the target says greedily
    after row[: t + 1].

    rows: token ids, one forward holds all of them (group rows of similar length); wanted: one
        bool per token
    n: tokens per position
    max_nodes: tokens per forward over all rows, at least one per row. It bounds the logits,
        (max_nodes, V), and the mask, max_nodes * (T + n * max_nodes / B) numbers. On a CPU core
        256 is within 7 % of the fastest for 1, 4 and 8 rows: fewer leave the matrix products
        small, and more make a single row's chains look at too many keys of other chains
    eos: what ends a chain; None takes the target's own, an empty set ends none
    Returns per row (T, n) int64 on the host, column j - 1 being position t + j; -1 where t is not
    wanted, after an EOS (which itself stays), and where t + j is past the target's context;
    OVERFLOWED (`finite.py`) for a token chosen from scores that are not finite, and what is behind
    it means nothing.
    Raises InputError where a row and its `wanted` differ in length or a row exceeds the context.
    """
    if n > 1 and target.verifies == "chains":
        raise InputError(
            f"data.labels local: {target.name} reads no chains beside each other (it has recurrent "
            "layers, or target.exact invariant computes it in blocks); take data.labels greedy or "
            "tokens"
        )
    _check(target, rows, wanted, n, max_nodes)
    result = [torch.full((len(row), n), -1) for row in rows]
    work = [r for r in range(len(rows)) if any(wanted[r])]
    if not work:
        return result
    where = [torch.as_tensor(wanted[r]).nonzero()[:, 0] for r in work]
    # Padding is a chain like others, at position 0; nobody sees it and it is not read.
    start = pad_sequence(where, batch_first=True).to(target.device)
    tokens = pad_sequence([torch.as_tensor(rows[r]) for r in work], batch_first=True)
    n_rows, length = tokens.shape
    tokens = padded_with_last(tokens, torch.tensor([len(rows[r]) for r in work]))
    width = max(1, max_nodes // n_rows)
    # Chunks of equal size: a last one of two chains would cost as many forwards as a full one.
    n_chunks = -(-start.shape[1] // width)
    chunk = -(-start.shape[1] // n_chunks)
    cache = target.new_cache(n_rows, length + (n - 1) * chunk)
    first = _read(target, tokens.to(target.device), width, cache)
    chains = [_say(target, first, t, n, cache) for t in start.split(chunk, dim=1)]
    eos = target.eos_token_ids if eos is None else eos
    said = _cut(torch.cat(chains, 1), start, target.max_positions, eos).cpu()
    for b, r in enumerate(work):
        result[r][where[b]] = said[b, : len(where[b])]
    return result


def _read(target: Target, tokens: Tensor, width: int, cache: RowCache) -> Tensor:
    """Bring the text into the cache, `width` tokens of every row at a time.

    tokens: (B, T), right-padded; the cache takes the padding as well, since a chain never looks
        right of its own t, and entries then lie alike in all rows
    Returns (B, T) int64, the target's next token after every position.
    """
    said = []
    for part in tokens.split(width, dim=1):
        begin = cache.get_seq_length()
        cache.prepare(part.shape[1])
        keys = torch.arange(cache.width, device=tokens.device)[None]
        position = keys[:, begin:]
        masks = target.masks(keys[:, None] <= position[:, :, None], position, keys)
        logits = target.forward(part, position.expand_as(part), masks, cache).logits
        said.append(choice(logits))
        cache.commit([cache.width] * len(tokens))
    return torch.cat(said, 1)


def _say(target: Target, first: Tensor, start: Tensor, n: int, cache: RowCache) -> Tensor:
    """Chains behind the text in the cache, which is as it was afterwards.

    first: (B, T), the next token after every position; start: (B, C), every chain's t
    Returns (B, C, n): the n tokens after each t.
    """
    n_rows, n_chains = start.shape
    length = first.shape[1]
    # Past the context any position that the model has will do: `_cut` drops what is said there.
    last = length + n if target.max_positions is None else target.max_positions - 1
    key_position = torch.arange(length, device=start.device).expand(n_rows, -1)
    chain = torch.arange(n_chains, device=start.device)[:, None]
    said = [first.gather(1, start)]
    for j in range(1, n):
        position = (start + j).clamp(max=last)
        key_position = torch.cat([key_position, position], 1)
        cache.prepare(n_chains)
        keys = torch.arange(cache.width, device=start.device)
        own = (keys >= length) & ((keys - length) % n_chains == chain)  # (C, S)
        allowed = (keys <= start[:, :, None]) | own
        masks = target.masks(allowed, position, key_position)
        token = said[-1].clamp(min=0)  # one that is none leads nowhere
        said.append(choice(target.forward(token, position, masks, cache).logits))
        cache.commit([cache.width] * n_rows)
    cache.commit([length] * n_rows)
    return torch.stack(said, -1)


def _cut(said: Tensor, start: Tensor, context: int | None, eos: set[int]) -> Tensor:
    """-1 after an EOS and past the context. said: (B, C, n); start: (B, C)."""
    ends = torch.tensor(sorted(eos), dtype=torch.long, device=said.device)
    is_eos = torch.isin(said, ends).int()
    drop = is_eos.cumsum(-1) > is_eos
    if context is not None:
        ahead = torch.arange(1, said.shape[-1] + 1, device=said.device)
        drop |= start[:, :, None] + ahead >= context
    return said.masked_fill(drop, -1)


def _check(
    target: Target,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[bool]],
    n: int,
    max_nodes: int,
) -> None:
    if n < 1 or max_nodes < 1:
        raise InputError(f"n = {n} and max_nodes = {max_nodes} must be at least 1")
    if len(rows) != len(wanted):
        raise InputError(f"{len(rows)} rows, but `wanted` is given for {len(wanted)}")
    for r, (row, flags) in enumerate(zip(rows, wanted, strict=True)):
        if len(row) != len(flags):
            raise InputError(f"row {r} has {len(row)} tokens, its `wanted` has {len(flags)}")
        if target.max_positions is not None and len(row) > target.max_positions:
            raise InputError(
                f"row {r} has {len(row)} tokens, the context of {target.name} is "
                f"{target.max_positions}; shorten it"
            )
