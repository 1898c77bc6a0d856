"""Plain decoding of many prompts in a batch that is kept full: a row that ends leaves it at once,
and prompts that wait take its place. The texts are those of `plain` (`tests/test_refill.py`)."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from redrafter.contracts import Generation, RowState, StepStats
from redrafter.decode.noise import gumbel
from redrafter.decode.plain import plain
from redrafter.decode.request import Emitter, Prompts, Request, as_rows, row_seeds
from redrafter.decode.verify import choose_scored, to_host
from redrafter.decode.warp import MinNewTokens, Warp, score_dtype
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target

#: Prompts enter once this part of the places is free: one forward then reads several of them.
_FREE = 1 / 8


class SlotCache(RowCache):
    """A `RowCache` whose rows come and go. Room for `slots` rows is allocated once; the first
    `len(lengths)` of them are in use, and a forward works on these alone or on new ones alone.

    What lies behind a row's committed part is never what another row left there: it might be nan,
    which a mask does not hide (see `RowCache.prepare`)."""

    def __init__(self, n_layers: int, slots: int, capacity: int, device: torch.device):
        super().__init__(n_layers, 0, capacity, device)
        self.slots = slots
        self._rows = slice(0, 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        entering = self._rows.start > 0 or not self.lengths
        return 0 if entering else super().get_seq_length(layer_idx)

    def prepare(self, n: int) -> None:
        self._rows = slice(0, len(self.lengths))
        super().prepare(n)

    def enter(self, padding: Tensor) -> None:
        """The next forward brings new rows, and sees no others; after it call `entered`.

        padding: (rows, tokens) bool, as of `prepare`
        """
        first, (n_rows, n_tokens) = len(self.lengths), padding.shape
        if first + n_rows > self.slots or n_tokens > self.capacity:
            raise RuntimeError(
                f"cache of {self.slots} rows of {self.capacity} entries, {first} of them in use, "
                f"cannot take {n_rows} of {n_tokens}"
            )
        self._rows = slice(first, first + n_rows)
        self._start, self._width, self._uniform = 0, n_tokens, True
        self._padding = padding

    def entered(self, lengths: list[int]) -> None:
        """lengths: tokens of every new row."""
        self.commit([*self.lengths, *lengths])

    def leave(self, places: Sequence[int]) -> list[int]:
        """Take rows out, each gap filled by the last row. Returns, for every place that is left,
        the place where its row was. Moves the keys and values of at most `places` rows, and
        forgets those of as many."""
        n, longest = len(self.lengths), max(self.lengths)
        order = list(range(n))
        for place in sorted(places, reverse=True):  # so that the last one is never a leaving row
            last = order.pop()
            if place < len(order):
                order[place] = last
        for store in self._groups:
            for to, place in enumerate(order):
                if to != place:  # with the zeros behind a shorter row
                    store[:, to, :, :longest] = store[:, place, :, :longest]
            store[:, len(order) : n, :, :longest] = 0
        self.commit([self.lengths[place] for place in order])
        return order

    def _stores(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        whole = self._views[layer_idx]
        if whole is None:
            rows = [x[:1].expand(self.slots, *x.shape[1:]) for x in (keys, values)]
            whole = self._allocate(*rows, layer_idx)
        return whole[0][self._rows], whole[1][self._rows]


@torch.inference_mode()
def refilled(
    target: Target,
    prompts: Prompts,
    generation_config: GenerationConfig | None = None,
    *,
    slots: int,
    seeds: int | Sequence[int] = 0,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    ended: Callable[[int], object] = lambda row: None,
) -> Generation:
    """Decode any number of prompts, at most `slots` of them at a time; else as `plain`.

    slots: rows of a forward at most. Keys and values are kept of as many, each with room for the
        longest row
    ended: told the number of every row that ends, in the order of the ends
    The longest prompts go first: what memory is needed is needed at once, and few rows are left
    when the last ones end. Rows with recurrent states do not take each other's places: they go
    `slots` at a time.
    """
    if target.verifies == "chains":
        how = dict(logits_processor=logits_processor, stopping_criteria=stopping_criteria)
        return _in_turns(target, prompts, generation_config, slots, seeds, ended, how)
    request = Request(
        target, prompts, generation_config, seeds, logits_processor, stopping_criteria, None, None
    )
    n_rows, known = request.n_rows, request.sequences(slack=1)
    stats = StepStats([0] * n_rows, [0] * n_rows)
    emitter = Emitter(request)
    slots = min(slots, n_rows)
    cache = SlotCache(target.n_layers, slots, known.ids.shape[1], target.device)
    waiting = deque(sorted(range(n_rows), key=lambda row: -len(request.prompts[row])))
    live: list[int] = []  # the row at every place of the cache
    while waiting or live:
        free = slots - len(live)
        if waiting and (free >= slots * _FREE or not live):
            first, new = len(live), [waiting.popleft() for _ in range(min(free, len(waiting)))]
            logits = _read(target, [request.prompts[row] for row in new], cache)
            live += new
        else:
            first, new = 0, live
            logits = _go_on(target, [emitter.tokens[row][-1] for row in live], cache)
            stats.forwards += 1
            stats.nodes_verified += len(live)
            for row in live:
                stats.steps[row] += 1
        for row, token in zip(new, _choose(request, known, new, logits), strict=True):
            stats.emitted[row] += emitter.emit(row, token)
        left = [p for p, row in enumerate(new, start=first) if emitter.finish[row] is not None]
        for place in left:
            ended(live[place])
        if left:
            live = [live[place] for place in cache.leave(left)]
    # The prefill's own token is not a step's.
    stats.emitted = [max(0, n - 1) for n in stats.emitted]
    return emitter.result(stats)


def _in_turns(
    target: Target,
    prompts: Prompts,
    generation_config: GenerationConfig | None,
    slots: int,
    seeds: int | Sequence[int],
    ended: Callable[[int], object],
    how: dict[str, Any],
) -> Generation:
    """`plain` of `slots` prompts at a time, the longest first."""
    rows = as_rows(prompts, None, target)
    own = row_seeds(seeds, len(rows)).tolist()
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    stats = StepStats([0] * len(rows), [0] * len(rows))
    tokens: list[list[int]] = [[] for _ in rows]
    finish = [""] * len(rows)
    for start in range(0, len(order), slots):
        turn = order[start : start + slots]
        made = plain(
            target, [rows[row] for row in turn], generation_config,
            seeds=[own[row] for row in turn], **how,
        )  # fmt: skip
        for place, row in enumerate(turn):
            tokens[row], finish[row] = made.tokens[place], made.finish[place]
            stats.steps[row], stats.emitted[row] = (
                made.stats.steps[place], made.stats.emitted[place],
            )  # fmt: skip
            ended(row)
        stats.forwards += made.stats.forwards
        stats.nodes_verified += made.stats.nodes_verified
        for part, seconds in made.stats.seconds.items():
            stats.seconds[part] = stats.seconds.get(part, 0.0) + seconds
    return Generation(tokens, finish, stats)


def _read(target: Target, prompts: list[list[int]], cache: SlotCache) -> Tensor:
    """The prompts of rows that enter. Returns (B, V) logits behind each one's last token."""
    lengths = torch.tensor([len(p) for p in prompts])
    position = torch.arange(int(lengths.max()))
    padding = position >= lengths[:, None]
    ids = torch.zeros(len(prompts), len(position), dtype=torch.long)
    ids[~padding] = torch.tensor([token for p in prompts for token in p])
    position = position.to(target.device)[None]
    causal = position[:, :, None] >= position[:, None, :]
    cache.enter(padding.to(target.device))
    out = target.forward(
        ids.to(target.device),
        position.expand(len(prompts), -1),
        target.masks(causal, position, position),
        cache,
        keep=lengths.to(target.device) - 1,
    )
    cache.entered(lengths.tolist())
    return out.logits[:, 0]


def _go_on(target: Target, tokens: list[int], cache: SlotCache) -> Tensor:
    """One new token of every row in the batch. Returns (B, V) logits behind it."""
    cache.prepare(1)
    position = cache.length[:, None]
    keys = torch.arange(cache.width, device=target.device)[None]
    masks = target.masks((keys <= position)[:, None], position, keys.expand(len(tokens), -1))
    root = torch.tensor(tokens, device=target.device)[:, None]
    logits = target.forward(root, position, masks, cache).logits[:, 0]
    cache.commit([n + 1 for n in cache.lengths])
    return logits


def _choose(
    request: Request, known: RowState, rows: list[int], logits: Tensor
) -> list[list[int]]:
    """The next token of some rows, or none. known: of all rows, brought up to date with them;
    logits: (B, V)."""
    at = torch.tensor(rows, device=logits.device)
    length = known.length[at]
    scores = _warp_of(request.warp, at).rows(
        logits, RowState(known.ids[at], length, known.prompt_length[at], known.live[at])
    )
    noise = None
    if known.seeds is not None:
        noise = gumbel(known.seeds[at], length[:, None], scores.shape[-1])[:, 0]
        noise = noise.to(score_dtype(logits.dtype))  # as `NoiseAhead` rounds it
    chosen, best = choose_scored(scores, noise)
    known.ids[at, length] = chosen
    known.length[at] += 1
    return to_host(chosen, best)


def _warp_of(warp: Warp, at: Tensor) -> Warp:
    """A request's processors for some of its rows: only the minimum length differs among them."""
    if not any(isinstance(p, MinNewTokens) for p in warp.processors):
        return warp
    mine = [
        MinNewTokens(p.minimum[at], set(p.eos)) if isinstance(p, MinNewTokens) else p
        for p in warp.processors
    ]
    found = copy.copy(warp)  # the processors have been checked
    found.processors = mine
    return found
