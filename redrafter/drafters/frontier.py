"""What a model thinks comes next at every leaf of a growing tree: a draft head, or a second model.

A drafter decides which children to take; a frontier reads them. Levels may have any width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.warp import score_dtype
from redrafter.drafters.context import HeadContext
from redrafter.heads.base import DraftHead
from redrafter.targets.cache import RowCache
from redrafter.targets.model import Target

_SHOWN = 5  # tokens that an error message names


class Frontier(ABC):
    """Per step `start`, then `advance` once per further level; `observe` with the truth.

    needs: what `observe` must carry; see `Drafter.needs`
    """

    needs: frozenset[str] = frozenset()
    vocab_size: int  # V
    #: (Vd,) int64, the tokens that its logits are of; None: all of the vocabulary, Vd = V
    ids: Tensor | None = None
    #: most levels that any live row can draft in this step, known after `start`
    levels: float = math.inf

    def fingerprint(self) -> str:
        """Of the weights it reads with, where it has any."""
        return type(self).__name__

    def begin(self, seqs: RowState) -> None:
        """A new generation starts."""
        self.seqs = seqs

    @abstractmethod
    def start(self) -> Tensor | None:
        """(B, 1, Vd) logits of what follows the root; None where `levels` is 0."""

    @abstractmethod
    def advance(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Read the next level. tokens: (B, w) int64; place: (B, w) int64, each one's parent in the
        level before. Returns (B, w, Vd) logits of what follows them."""

    def room(self) -> Tensor | None:
        """(B,) int64: levels that each row can draft, likewise; None: any."""
        return None

    def over_vocabulary(self, log_q: Tensor) -> Tensor:
        """(..., Vd) log-probabilities -> (..., V)."""
        if self.ids is None:
            return log_q
        whole = log_q.new_full((*log_q.shape[:-1], self.vocab_size), float("-inf"))
        return whole.index_copy_(-1, self.ids, log_q)

    def observe(self, truth: Truth) -> None:  # noqa: B027 - a model reads the text itself
        """Learn what the target said."""


class HeadFrontier(Frontier):
    """A head of any kind: its context is made once, tokens are read level by level."""

    def __init__(self, head: DraftHead, target: Target):
        self.head, self.target = head, target
        self._reader = HeadContext(head, target)
        self.needs = self._reader.needs
        self.vocab_size = target.vocab_size
        if head.max_depth is not None:
            self.levels = head.max_depth

    @property
    def ids(self) -> Tensor | None:
        return None if self.head.config.draft_vocab_size is None else self.head.draft_ids

    def fingerprint(self) -> str:
        return self.head.fingerprint()

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self._reader.begin(seqs)

    def observe(self, truth: Truth) -> None:
        self.context = self._reader.observe(truth)

    def start(self) -> Tensor:
        self.states, self._level = None, 0
        return self._read(self.seqs.root[:, None])

    def advance(self, tokens: Tensor, place: Tensor) -> Tensor:
        place = place[:, :, None].expand(-1, -1, self.states.shape[-1])
        self.states = self.states.gather(1, place)
        return self._read(tokens)

    def _read(self, tokens: Tensor) -> Tensor:
        self._level += 1
        self.states, logits = self.head.read(
            self.target, tokens, self.context, self.states, self._level
        )
        return logits


class ModelFrontier(Frontier):
    """A smaller causal LM, with a cache of its own.

    draft: loaded like a target
    max_nodes: most nodes of all levels that `advance` is given in a step

    `start` reads the tokens that the cache lacks: the root, and where all levels were accepted the
    last drafted token, which was never read. What of the last tree became text is found by
    comparing tokens, so it is right too where steps were skipped or others drafted. The batch
    shares a forward, so a row may read its last token but one again beside a row that lacks it.
    Raises InputError where the vocabularies or devices of the two models differ.
    """

    def __init__(self, draft: Target, target: Target, max_nodes: int):
        if draft.device != target.device:
            raise InputError(
                f"draft model {draft.name} is on {draft.device}, the target on {target.device}: "
                "load both on one device"
            )
        if draft.has_states:
            raise InputError(
                f"draft model {draft.name}: {type(draft.model).__name__} has recurrent layers, "
                "whose states do not go back to where the target took another token: take a draft "
                "model of attention alone"
            )
        check_vocabulary(target, draft)
        self.draft, self.max_nodes = draft, max_nodes
        self.vocab_size = target.vocab_size

    def fingerprint(self) -> str:
        return self.draft.fingerprint()

    def begin(self, seqs: RowState) -> None:
        """Reads the prompts: all that is known but the root."""
        super().begin(seqs)
        batch, capacity = seqs.ids.shape
        device = seqs.ids.device
        # Positions that the draft model has; the loop asks for none past the ids' end.
        context = self.draft.max_positions
        self._context = capacity if context is None else min(context, capacity)
        slots = self._context + self.max_nodes
        self._cache = RowCache(self.draft.n_layers, batch, slots, device)
        self._arange = torch.arange(slots, device=device)
        #: of the last tree, per level that was read: tokens, and the parent's place above
        self._tokens: list[Tensor] = []
        self._place: list[Tensor] = []
        stop = (seqs.length - 1).clamp(max=self._context)
        stops = stop.tolist()
        self._read(stop, stops, max(stops))

    def start(self) -> Tensor | None:
        """Bring the cache up to the text, the root included. The step's one read of the host."""
        seqs, root = self.seqs, self.seqs.root[:, None]
        path, agreed = self._agreed()
        stop = seqs.length.clamp(max=self._context)
        kept = torch.minimum(agreed, stop - 1)  # the root's logits are always needed
        # Depth d is said by the token at position L + d - 2, which must be in the context.
        self._room = self._context + 1 - seqs.length  # (B,) levels
        room = torch.where(seqs.live, self._room, 0)
        keeps, stops, rooms = torch.stack([kept, stop, room]).tolist()
        self.levels = max(rooms)
        if any(level.shape[1] > 1 for level in self._tokens):
            self._cache.commit([n - 1 for n in self._stops])  # the root is node 0 of the path
            self._cache.commit(keeps, path)
        self._tokens, self._place = [], []
        self._seen = torch.ones_like(root, dtype=torch.bool)[:, :, None]
        if self.levels <= 0:
            return None
        missing = max(s - k for s, k in zip(stops, keeps, strict=True))
        logits = self._read(stop, stops, missing)
        return self._to_vocabulary(logits)

    def room(self) -> Tensor:
        return self._room

    def advance(self, tokens: Tensor, place: Tensor) -> Tensor:
        cache, width = self._cache, tokens.shape[1]
        self._tokens.append(tokens)
        self._place.append(place)
        cache.prepare(width)
        level = len(self._tokens)
        position = (self._known - 1 + level).clamp(max=self._context - 1)[:, None]
        seen = self._seen.gather(1, place[:, :, None].expand(-1, -1, self._seen.shape[2]))
        own = torch.eye(width, dtype=torch.bool, device=seen.device)
        self._seen = torch.cat([seen, own.expand(len(seen), -1, -1)], 2)  # (B, w, n)
        if all(t.shape[1] == 1 for t in self._tokens):
            masks = self._causal(position)
        else:
            position = position.expand_as(tokens)
            masks = self._tree_masks(position)
        known = tokens.clamp(max=self.draft.vocab_size - 1)  # as in `_read`
        out = self.draft.forward(known, position, masks, cache)
        cache.commit([n + width for n in cache.lengths])
        return self._to_vocabulary(out.logits)

    def _to_vocabulary(self, logits: Tensor) -> Tensor:
        """Ids that only one of the two lm_heads has are padding: cut off, or impossible."""
        missing = self.vocab_size - logits.shape[-1]
        if missing <= 0:
            return logits[..., : self.vocab_size]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))

    def _agreed(self) -> tuple[Tensor, Tensor]:
        """What the cache holds of the present text.

        Returns path (B, 1 + levels read): the root and the node of each level that became text;
        and (B,), how many entries are text once the path's nodes follow the root.
        """
        agreed, ids = self._known, self.seqs.ids
        place = torch.zeros_like(agreed)
        good, path, first = torch.ones_like(agreed, dtype=torch.bool), [place], 1
        for level, (tokens, above) in enumerate(zip(self._tokens, self._place, strict=True)):
            where = (self._known + level).clamp(max=ids.shape[1] - 1)
            fits = tokens == ids.gather(1, where[:, None])
            fits &= good[:, None] & (above == place[:, None])
            good = fits.any(1)
            place = fits.int().argmax(1)
            path.append(first + place)
            first += tokens.shape[1]
            agreed = agreed + good
        return torch.stack(path, 1), agreed

    def _read(self, stop: Tensor, stops: list[int], n: int) -> Tensor:
        """Read the n tokens before `stop` (B,), fewer in rows that have fewer.

        stops: `stop` on the host. Returns (B, 1, V) logits of each row's last token.
        """
        first = (stop - n).clamp(min=0)
        position = first[:, None] + self._arange[:n]
        self._cache.commit([max(s - n, 0) for s in stops])
        self._cache.prepare(n)
        # The target's lm_head may be padded further than the draft model's.
        tokens = self.seqs.ids.gather(1, position).clamp(max=self.draft.vocab_size - 1)
        masks = self._causal(position)
        keep = None if n == 1 else stop - first - 1
        out = self.draft.forward(tokens, position, masks, self._cache, keep)
        # What was written behind a shorter row's end is overwritten before it can be seen.
        self._cache.commit(stops)
        self._known, self._stops = stop, stops
        return out.logits

    def _causal(self, position: Tensor):
        """Masks for keys that lie in the order of the text. position: (B, N)"""
        if position.shape[1] == 1 and self.draft.sees_all and self._cache.uniform:
            return self.draft.no_mask(self._cache.width)  # as in plain decoding
        keys = self._arange[: self._cache.width]
        allowed = keys <= position[:, :, None]
        return self.draft.masks(allowed, position, keys.expand(len(position), -1))

    def _tree_masks(self, position: Tensor):
        """Masks for a level at `position` (B, w) that sees the text and its ancestors."""
        keys, n = self._arange[: self._cache.width], self._seen.shape[2]
        allowed = (keys < self._known[:, None])[:, None].repeat(1, position.shape[1], 1)
        root = self._known[:, None] - 1
        column = root + self._arange[:n]  # (B, n): where node j lies
        allowed.scatter_(2, column[:, None].expand_as(self._seen), self._seen)
        depth = [torch.full((t.shape[1],), i) for i, t in enumerate(self._tokens, start=1)]
        depth = torch.cat([torch.zeros(1, dtype=torch.long), *depth]).to(root.device)
        key_position = keys.repeat(len(position), 1).scatter_(1, column, root + depth)
        return self.draft.masks(allowed, position, key_position)


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """(..., Vd) log q at a temperature above 0, in float32 or float64."""
    return (logits.to(score_dtype(logits.dtype)) / temperature).log_softmax(-1)


def check_vocabulary(target: Target, draft: Target) -> None:
    """Raises InputError, showing the difference, where the two models' ids do not mean the same.

    Tokenizers decide where both models have one: an lm_head may then be padded further than the
    other. Else the sizes of the lm_heads must be equal.
    """
    start = f"draft model {draft.name} has not the vocabulary of the target {target.name}: "
    if target.tokenizer is None or draft.tokenizer is None:
        if target.vocab_size != draft.vocab_size:
            raise InputError(
                f"{start}their lm_heads have {draft.vocab_size} and {target.vocab_size} ids, and "
                "without both tokenizers padding cannot be told from tokens"
            )
        return
    vocabs = [model.tokenizer.get_vocab() for model in (draft, target)]
    if vocabs[0] == vocabs[1]:
        return
    mine, theirs = ({i: token for token, i in vocab.items()} for vocab in vocabs)
    differ = [i for i in sorted(mine.keys() | theirs.keys()) if mine.get(i) != theirs.get(i)]
    shown = ", ".join(
        f"{i}: {_quoted(mine.get(i))} / {_quoted(theirs.get(i))}" for i in differ[:_SHOWN]
    )
    raise InputError(
        f"{start}{len(mine)} and {len(theirs)} tokens, of which {len(differ)} ids differ, first "
        f"(draft / target) {shown}; use a draft model with the target's tokenizer"
    )


def _quoted(token: str | None) -> str:
    return "none" if token is None else repr(token)
