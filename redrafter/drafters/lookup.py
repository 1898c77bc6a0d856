"""Prompt lookup: the text goes on as it did after an earlier occurrence of its last few tokens.

The longest suffix of at most `max_ngram` tokens that occurred before decides; among its earlier
occurrences the leftmost one is taken, as in the original (Saxena's prompt lookup decoding, 2023),
or the most recent one. Unlike the original, a continuation may be shorter than `depth` (it ends
where the text does, soon after a recent occurrence), and the text is prompt and answer alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, TokenTree
from redrafter.decode.tree import bucket
from redrafter.drafters.features import LEAST

Occurrence = Literal["leftmost", "recent"]


def find_match(
    ids: Tensor, length: Tensor, max_ngram: int, occurrence: Occurrence = "leftmost"
) -> tuple[Tensor, Tensor]:
    """Where the continuation of each row's longest repeated suffix begins.

    ids: (B, M) int64; length: (B,) int64, tokens known
    occurrence: which of the suffix's earlier occurrences
    Returns (place, ngram), both (B,) int64: the position after that occurrence, and how many
    tokens matched; both 0 where nothing did.

    Example: a row 5 6 7 5 6 8 5 6 has the suffix (5 6) at 0 and 3 too, so ngram = 2, and place is
    2 for the leftmost, 5 for the most recent one.
    """
    place, ngram = torch.zeros_like(length), torch.zeros_like(length)
    for n in range(1, min(max_ngram, ids.shape[1]) + 1):  # the longest one is written last
        tail = length[:, None] - n + torch.arange(n, device=ids.device)
        suffix = ids.gather(1, tail.clamp(min=0))
        hit = (ids.unfold(1, n, 1) == suffix[:, None]).all(-1)  # (B, M - n + 1)
        # An earlier occurrence starts before the suffix itself does; stale ids lie behind it.
        at = torch.arange(hit.shape[1], device=ids.device)
        hit &= at < length[:, None] - n
        if occurrence == "leftmost":
            start = hit.long().argmax(1)  # the first of equal maxima
        else:
            start = torch.where(hit, at, 0).amax(1)
        found = hit.any(1)
        place = torch.where(found, start + n, place)
        ngram = torch.where(found, n, ngram)
    return place, ngram


def chain_tree(
    root: Tensor,
    tokens: Tensor,
    valid: Tensor,
    longest: int,
    matched: Tensor | None = None,
    noise: Tensor | None = None,
) -> TokenTree:
    """One chain per row below the root, cut to the longest one of the batch.

    root: (B,) int64; tokens: (B, >= k) int64; valid: (B, k) bool, without holes
    longest: tokens of the longest chain
    matched: (B,) tokens of the match that the chain follows: the longer, the surer. It gives the
        nodes scores for whoever ranks them among others, see `chain_scores`
    noise: (B, >= k, V), the verifier's
    """
    root = root[:, None]
    k = min(bucket(1 + longest), 1 + valid.shape[1]) - 1
    depth = torch.arange(1 + k, device=root.device).expand(len(root), -1)
    return TokenTree(
        tokens=torch.cat([root, tokens[:, :k]], 1),
        parent=(depth - 1).clamp(min=0),
        depth=depth,
        valid=torch.cat([torch.ones_like(root, dtype=torch.bool), valid[:, :k]], 1),
        log_q=None if matched is None else chain_scores(tokens[:, :k], matched, noise),
    )


def chain_scores(tokens: Tensor, matched: Tensor, noise: Tensor | None) -> Tensor:
    """(B, 1 + k) cumulative log-scores of a chain tokens (B, k) that follows a match.

    A guess: each token is right with probability r = exp(-1 / (1 + matched)), given that those
    before it are. When sampling, the noise g of the token is known beforehand, and with it the
    chance that it wins: all others together beat it unless a Gumbel variable of mass 1 - r stays
    below log r + g, so it is exp(-(1 - r) / r * exp(-g)), whose mean over g is r. Ours.
    """
    log_r = (-1 / (1 + matched.double()))[:, None].expand(tokens.shape)
    if noise is not None:
        g = noise[:, : tokens.shape[1]].gather(2, tokens[:, :, None])[:, :, 0].double()
        log_r = -((-log_r).exp() - 1) * (-g).exp()  # (1 - r) / r = 1 / r - 1
    return torch.nn.functional.pad(log_r.cumsum(1), (1, 0)).float()


#: of the next token of a copied chain. `matched_tokens`: of the match; `left`: tokens of the chain
#: from this one on; `token_noise`: the verifier's noise for it, 0 when greedy; `chain_score`: see
#: `chain_scores`
CHAIN_FEATURES = ("matched_tokens", "left", "token_noise", "chain_score")


#: what a classifier reads unless told otherwise: that match alone, which costs nothing and says no
#: less than all (gain of the suffix drafter over its best static length by the prices of forwards,
#: gsm-stories-6m, greedy: 1.003 on GSM8K and 1.001 on TinyStories, by all 1.001 and 1.000)
SURE_OF_COPIES = ("matched_tokens",)


def chain_features(
    tokens: Tensor,
    valid: Tensor,
    matched: Tensor,
    noise: Tensor | None,
    names: Sequence[str] = CHAIN_FEATURES,
    **others: Tensor,
) -> Tensor:
    """(B, k + 1, F) the features named, of the token of level 1, 2, ... k, and zeros.

    tokens: (B, k) int64; valid: (B, k) bool, without holes; matched, noise: as for `chain_tree`
    names: some of `CHAIN_FEATURES` and of `others`, which are (B,), the same for every token
    """

    def made(name: str) -> Tensor:
        """(B, k), of what is asked for only."""
        if name == "left":
            return valid.flip(1).cumsum(1).flip(1)
        if name == "chain_score":
            return chain_scores(tokens, matched, noise)[:, 1:].clamp(min=LEAST)
        if name == "token_noise":
            if noise is None:
                return torch.zeros_like(valid)
            return noise[:, : tokens.shape[1]].gather(2, tokens[:, :, None])[:, :, 0]
        each = matched if name == "matched_tokens" else others[name]
        return each[:, None].expand(valid.shape)

    told = torch.stack([made(name).float() for name in names], 2)
    return torch.nn.functional.pad(told * valid[:, :, None], (0, 0, 0, 1))


class PromptLookup(Drafter):
    """One chain of up to `depth` tokens, copied from the row's own text.

    depth: K, tokens copied at most
    max_ngram: longest suffix to look for, in tokens; shorter ones are tried down to 1
    occurrence: which of several earlier occurrences is copied from: the "leftmost" (the
        original's) or the most "recent" one
    """

    one_path = True
    feature_names = CHAIN_FEATURES
    early_features = True
    sees_noise = "own"

    def __init__(self, depth: int = 10, max_ngram: int = 3, occurrence: Occurrence = "leftmost"):
        if depth < 1 or max_ngram < 1:
            raise InputError(f"lookup: depth {depth} and max_ngram {max_ngram} must be positive")
        if occurrence not in get_args(Occurrence):
            raise InputError(f"lookup: occurrence {occurrence!r} is none of {get_args(Occurrence)}")
        self.occurrence = occurrence
        self.max_depth, self.max_nodes, self.max_ngram = depth, 1 + depth, max_ngram

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"max_ngram": self.max_ngram, "occurrence": self.occurrence}

    def start(self) -> None:
        ids, length = self.seqs.ids, self.seqs.length
        place, self.ngram = find_match(ids, length, self.max_ngram, self.occurrence)
        level = torch.arange(self.max_depth, device=ids.device)
        where = place[:, None] + level
        self.valid = (self.ngram > 0)[:, None] & (where < length[:, None])  # (B, K)
        self.tokens = ids.gather(1, where.clamp(max=ids.shape[1] - 1))
        self.level, self._features = 0, {}

    def extend(self, level: int) -> None:
        self.level = level

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        """`CHAIN_FEATURES`; all 0 where nothing can be drafted at the level to come."""
        names = self.feature_names if names is None else tuple(names)
        if names not in self._features:
            noise = self.seqs.noise
            made = chain_features(self.tokens, self.valid, self.ngram, noise, names)
            self._features[names] = made
        return self._features[names][:, self.level]

    def tree(self) -> TokenTree:
        """A chain, cut to the longest one of the batch: one read of the host per step, which is
        worth more than the forward over nodes that are known to be invalid."""
        valid = self.valid[:, : self.level]
        longest = int(valid.sum(1).max()) if self.level else 0
        return chain_tree(self.seqs.root, self.tokens, valid, longest, self.ngram, self.seqs.noise)
