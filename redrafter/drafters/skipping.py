"""Layer skipping: the target drafts for itself, without some of its attention sub-blocks.

Needs no second model, no training and no memory: the drafted chain's keys and values go behind the
committed part of the target's own cache, and the verification writes over them.
Which attentions are skipped is either given (a set found beforehand, as Draft & Verify does) or
chosen for the text at hand, as Draft on the Fly does: those that turn the residual stream least,
by the cosine s_l = cos(h, h + attention_l(h)), which the prefill's forward shows for nothing.
When to stop drafting is not decided here: see `lookahead/draft_exit.py`.

Sources: Draft on the Fly (arXiv 2410.01028): attention only, cosine, threshold; Draft & Verify
(2309.08168): self-drafting by a fixed set. Ours: everything that the former's abstract leaves
open (which tokens are averaged, when anew, which layers are protected, the default threshold), one
set for a batch, and proposing with the verifier's noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.decode.warp import score_dtype
from redrafter.drafters.features import MODEL_FEATURES, columns, model_features
from redrafter.drafters.lookup import chain_tree
from redrafter.targets.model import Target
from redrafter.targets.skipping import AttentionSkipping, Cosines

Refresh = Literal["prompt", "step"]
NO_DRAFT = "no draft: no attention was found that may be skipped"


class LayerSkipping(Drafter):
    """One chain of up to `depth` tokens from the target without some attentions.

    depth: K, tokens drafted at most
    threshold: skip the attention of layer l iff s_l >= threshold; None skips by `max_skipped` alone
    max_skipped: at most so many layers, those of the largest s_l; None is no limit
    positions: s_l is the mean over the last so many tokens that the target has read; None is all
    refresh: "prompt" chooses once, after the prefill; "step" again after each verification, whose
        tokens then count among `positions`. It runs every layer anyway, so this costs the cosines
        alone: 0.5 ms beside 8 ms (gsm-stories-6m, 9 nodes, one x86-64 core)
    protect: (first, last) layers that are never skipped
    fixed: this set of layers, and nothing is chosen. () drafts with the whole target: every token
        is accepted and nothing gained, a test of the machinery
    seeded: propose with the verifier's noise when sampling; False proposes what q holds likeliest

    One forward drafts for the whole batch, so the set is the batch's: s_l is averaged over each
    live row's tokens, then over the rows, every row counting alike. So a row's *draft* depends on
    its neighbours; its text does not.
    Where nothing may be skipped nothing is drafted, and the steps are plain ones. A set that only
    `fixed` can give, all or none, is taken at its word.
    The prefill is watched by way of `watch`; in a loop that does not call it, `begin` reads the
    prompts once more, and "step" keeps the set of the prompt.
    q is the softmax of logits / temperature: other processors of the request are not applied to
    the draft, which costs acceptance, never exactness.
    The default threshold picks layer 5 of 6 on gsm-stories-6m (20 gsm8k prompts, 64 tokens, greedy,
    one x86-64 core). Bounds on the speed with the exit: {5} 0.78, {4, 5} 0.78, {1, 4, 5} 0.76; at
    T = 1, {5} 0.69. The order of the cosines is that of a greedy search for agreement. Nothing
    pays there: a draft costs 0.8 to 0.95 of a forward. What a target of yours gains is told by
    `scripts/dev/measure_skipping.py`.
    Raises InputError for a target whose attentions cannot be skipped, and for impossible options.
    """

    borrows_cache = True
    feature_names = ("p_token", *MODEL_FEATURES)

    def __init__(
        self,
        target: Target,
        depth: int = 8,
        *,
        threshold: float | None = 0.97,
        max_skipped: int | None = None,
        positions: int | None = None,
        refresh: Refresh = "prompt",
        protect: tuple[int, int] = (0, 0),
        fixed: Iterable[int] | None = None,
        seeded: bool = True,
    ):
        _check(depth, threshold, max_skipped, positions, refresh, protect)
        if target.has_states:
            raise InputError(
                f"skip: {target.name} has recurrent layers, whose states would have to go back "
                "after every draft; take another drafter"
            )
        if target.by_kernels and refresh == "step" and fixed is None:
            raise InputError(
                "skip: refresh=step looks into the target's own forwards, which target.exact "
                "invariant does not allow here: take refresh=prompt, or a fixed set"
            )
        self.target, self.seeded = target, seeded
        self.skipping = AttentionSkipping(target)
        self.threshold, self.max_skipped, self.positions = threshold, max_skipped, positions
        self.refresh = refresh
        self.fixed = None if fixed is None else self.skipping.check(fixed)
        first, last = protect
        self.candidates = range(first, self.skipping.n_layers - last)
        self.max_depth, self.max_nodes = depth, 1 + depth
        self._seen: Cosines | None = None

    def identity(self) -> dict[str, Any]:
        names = ("threshold", "max_skipped", "positions", "refresh", "fixed", "seeded")
        told = {name: getattr(self, name) for name in names}
        return super().identity() | told | {"candidates": list(self.candidates)}

    # -- choosing --------------------------------------------------------------------------

    def watch(self, prefill: bool) -> AbstractContextManager:
        looks = prefill or self.refresh == "step"
        # Who looks has the class compute: for scores of kernels the prompt is read once more.
        if self.fixed is not None or not looks or self.target.by_kernels:
            return nullcontext()
        self._seen = self.skipping.measure()
        return self._seen

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self._tree: TokenTree | None = None  # the last one drafted; others' may be verified
        self._n_forwards, self._sets = 0, Counter()
        self.cosine: list[float] | None = None  # per layer, those that the set was chosen by
        device, capacity = seqs.ids.device, seqs.cache.capacity
        self._keys = torch.arange(capacity, device=device)
        if self.fixed is not None:
            self.skipped = self.fixed
            return
        width = int(seqs.prompt_length.max())
        seen, self._seen = self._seen and self._seen.stacked(), None
        if seen is None or seen.shape[1:] != (len(seqs.ids), width):
            with self.skipping.measure() as watched:
                self.target.states(seqs.ids[:, :width])
            seen = watched.stacked()
        self._cosines = torch.zeros(len(seen), *seqs.ids.shape, device=seen.device)  # (L, B, M)
        self._cosines[:, :, :width] = seen
        self._choose()

    def _choose(self) -> None:
        """The batch's set, from the tokens read so far. One read of the host."""
        known = (self.seqs.length - 1)[:, None]  # the root is not read yet
        place = torch.arange(self._cosines.shape[2], device=known.device)
        wanted = place < known
        if self.positions is not None:
            wanted &= place >= known - self.positions
        mean = torch.where(wanted, self._cosines, 0).sum(2) / wanted.sum(1)  # (L, B)
        live = self.seqs.live
        self.cosine = ((mean * live).sum(1) / live.sum().clamp(min=1)).tolist()
        least = -2.0 if self.threshold is None else self.threshold
        best = sorted(self.candidates, key=lambda layer: -self.cosine[layer])
        chosen = [layer for layer in best if self.cosine[layer] >= least]
        self.skipped = tuple(sorted(chosen[: self.max_skipped]))

    def observe(self, truth: Truth) -> None:
        """After a verification of this drafter's own chain, with `refresh` "step": choose anew."""
        seen, self._seen = self._seen and self._seen.stacked(), None
        if seen is None or truth.tree is not self._tree:
            return
        # Node i of a chain, accepted or not, lies i behind the root; what lies behind the
        # accepted ones is not among the tokens read until it is overwritten.
        where = self._root_at[:, None] + torch.arange(seen.shape[2], device=seen.device)
        where = where.clamp(max=self._cosines.shape[2] - 1)
        self._cosines.scatter_(2, where.expand_as(seen), seen)
        self._choose()

    # -- drafting --------------------------------------------------------------------------

    def start(self) -> None:
        seqs = self.seqs
        self._root_at = seqs.length - 1
        self._base = list(seqs.cache.lengths)  # a root is not cached: its own position
        self._drafts = bool(self.skipped) or self.fixed is not None
        self._sets[self.skipped] += 1
        self._noise = seqs.noise if self.seeded else None
        self._tokens = [seqs.root[:, None]]
        dtype = score_dtype(self.target.dtype)
        self._log_q = [torch.zeros(self._tokens[0].shape, dtype=dtype, device=seqs.ids.device)]

    def extend(self, level: int) -> None:
        if not self._drafts:
            return
        logits = self._forward(level)[:, 0]  # (B, V)
        scores = logits.to(self._log_q[0].dtype)
        if self.seqs.noise is not None:
            scores = scores / self.seqs.temperature
        noisy = scores if self._noise is None else scores + self._noise[:, level - 1].to(scores)
        token = noisy.argmax(-1, keepdim=True)
        log_p = scores.gather(1, token) - scores.logsumexp(-1, keepdim=True)
        step = log_p
        if self._noise is not None:
            step = noisy.gather(1, token) - noisy.logsumexp(-1, keepdim=True)
        self._tokens.append(token)
        self._log_q.append(self._log_q[-1] + step)
        self._p_token, self._scores = log_p.exp(), noisy

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        """q of the drafted token, without noise, and `MODEL_FEATURES`; zeros where nothing is
        drafted."""
        if len(self._log_q) == 1:
            n = len(self.feature_names if names is None else names)
            return self._log_q[0].new_zeros(len(self._log_q[0]), n)
        noise = None if self._noise is None else self._noise[:, len(self._log_q) - 2]
        if names is not None and tuple(names) == ("p_token",):
            return self._p_token
        log_p = self._scores[:, None].log_softmax(-1)
        told = model_features(log_p, self._log_q, self._tokens[-1], noise)
        return columns(torch.cat([self._p_token, told], 1), self.feature_names, names)

    def _forward(self, level: int) -> Tensor:
        """Read the last drafted token behind the text. Returns (B, 1, V) logits."""
        target, cache = self.target, self.seqs.cache
        cache.commit([n + level - 1 for n in self._base])
        try:
            cache.prepare(1)
            position = (self._root_at + level - 1)[:, None]
            if target.sees_all and cache.uniform:
                masks = target.no_mask(cache.width)  # as in plain decoding
            else:
                keys = self._keys[: cache.width].expand(len(position), -1)
                masks = target.masks(keys[:, None] <= position[..., None], position, keys)
            if target.max_positions is not None:
                # Such a token is past its row's limit: it is never verified.
                position = position.clamp(max=target.max_positions - 1)
            with self.skipping.without_attention(self.skipped):
                out = target.forward(self._tokens[-1], position, masks, cache)
        finally:
            cache.commit(self._base)  # what was written is stale at once
        self._n_forwards += 1
        return out.logits

    def tree(self) -> TokenTree:
        tokens = torch.cat(self._tokens, 1)
        levels = tokens.shape[1] - 1
        valid = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        self._tree = chain_tree(tokens[:, 0], tokens[:, 1:], valid, levels)
        self._tree.log_q = torch.cat(self._log_q, 1)
        return self._tree

    # -- what was done ---------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """sets: the skipped layers and the steps they were skipped in, most frequent first;
        attention_skipped, weights_skipped: shares, mean over the steps; cosine: s_l per layer at
        the last choice, None with `fixed`; draft_forwards; note: None, or that nothing was
        drafted."""
        n_steps = max(1, sum(self._sets.values()))

        def share(of) -> float:
            return sum(of(layers) * n for layers, n in self._sets.items()) / n_steps

        no_draft = self.fixed is None and not any(self._sets)
        return {
            "sets": [{"layers": list(s), "steps": n} for s, n in self._sets.most_common()],
            "attention_skipped": share(len) / self.skipping.n_layers,
            "weights_skipped": share(self.skipping.weights_skipped),
            "cosine": self.cosine,
            "draft_forwards": self._n_forwards,
            "note": NO_DRAFT if no_draft else None,
        }


def _check(depth, threshold, max_skipped, positions, refresh, protect) -> None:
    """Raises InputError naming the option."""
    if depth < 1:
        raise InputError(f"layer skipping: depth {depth} must be positive")
    if threshold is None and max_skipped is None:
        raise InputError("layer skipping: give threshold, max_skipped or fixed")
    if threshold is not None and not -1 <= threshold <= 1:
        raise InputError(f"layer skipping: threshold {threshold} is no cosine; -1 to 1")
    for name, value in (("max_skipped", max_skipped), ("positions", positions)):
        if value is not None and value < 1:
            raise InputError(f"layer skipping: {name} {value} must be positive, or None for all")
    if refresh not in get_args(Refresh):
        raise InputError(f"layer skipping: refresh {refresh!r} is none of {get_args(Refresh)}")
    if len(protect) != 2 or min(protect) < 0:
        raise InputError(f"layer skipping: protect {protect!r} is not (first, last) layers")
