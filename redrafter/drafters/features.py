"""What a drafter can say of a level that it has just drafted, for a lookahead to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redrafter.decode.warp import score_dtype

TOP = 10
#: `p_1` .. `p_10`: the likeliest guesses of the level, in order; `margin`: p_1 - p_2;
#: `entropy_nats`: of the level's distribution; `p_level`: that the level's nodes hold the right
#: token, given that the level above does (of a chain: q of the drafted token); `log_p_path`: that
#: the drafted nodes hold the right path down to this level, in nats
#: (in that order, `log_p_path` the last); `token_noise`: the verifier's noise for the level's best
#: node, 0 where it was not used
MODEL_FEATURES = (
    *(f"p_{i}" for i in range(1, TOP + 1)),
    "margin", "entropy_nats", "token_noise", "p_level", "log_p_path",
)  # fmt: skip
#: what a classifier reads unless told otherwise: it costs one small operation, and says nearly all
#: (gsm-stories-6m with a draft model, gain over the best static length by the prices of forwards:
#: 1.101, with `p_level` and `token_noise` 1.104 on GSM8K, greedy; 1.038 and 1.043 on TinyStories at
#: T = 1; all fifteen do no better than the three)
SURE = ("log_p_path",)
LEAST = -30.0  # in nats; what is no longer drafted is -inf, and no classifier can read that
_NEVER = -1e4  # a score so far below all others that its probability is 0 in any dtype


def model_features(
    scores: Tensor,
    log_q: Sequence[Tensor],
    tokens: Tensor | None = None,
    noise: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """(B, F) `MODEL_FEATURES` of the last level, or some; the last three are made of what is
    there already, without another look at the V scores.

    scores: (B, w, V), in any scale, of what follows each of the w nodes above, as the drafter read
        them: with the verifier's noise where it used that
    log_q: per level (B, w_level) cumulative log-scores of the nodes, the last level's own last;
        the root's 0
    tokens: (B, >= 1) int64, the level's, the best one first; noise: (B, V), where `scores` hold it
    The level's distribution is the one over all (node above, token) pairs, each node weighted by
    its own probability; for a chain it is q. Below the first level of a tree of width W only
    p_1 .. p_W are given, the others are 0. Features: DISCO (arXiv 2405.04304); for trees, ours.
    """
    dtype = score_dtype(scores.dtype)

    def path(of: Tensor) -> Tensor:
        whole = of if of.shape[1] == 1 else of.logsumexp(-1, keepdim=True)
        return whole.to(dtype).clamp(LEAST, 0.0)

    def own_noise() -> Tensor:
        if noise is None:
            return scores.new_zeros(len(scores), 1, dtype=dtype)
        return noise.gather(1, tokens[:, :1]).to(dtype)

    def p_level() -> Tensor:
        return (path(log_q[-1]) - path(log_q[-2])).exp().clamp(max=1.0)

    cheap = {"token_noise": own_noise, "p_level": p_level, "log_p_path": lambda: path(log_q[-1])}
    if names is not None and cheap.keys() >= set(names):
        found = [cheap[name]() for name in names]
        return found[0] if len(found) == 1 else torch.cat(found, 1)
    log_p = scores.log_softmax(-1, dtype=dtype)
    above, level = log_q[-2].to(dtype), log_q[-1].to(dtype)
    entropy = -torch.linalg.vecdot(log_p.exp(), log_p.clamp(min=_NEVER))  # (B, w)
    if log_p.shape[1] == 1:
        top = log_p[:, 0].topk(min(TOP, log_p.shape[-1]), dim=-1).values.exp()
    else:
        weight = above.clamp(min=LEAST).log_softmax(-1)  # a row may have nothing but pruned nodes
        entropy = (weight.exp() * (entropy - weight)).sum(-1, keepdim=True)
        # The likeliest of all are those that were taken.
        top = (level[:, :TOP] - path(log_q[-2])).exp()
    if top.shape[1] < TOP:
        top = torch.nn.functional.pad(top, (0, TOP - top.shape[1]))
    last = [make() for make in cheap.values()]
    all_of_them = [top, top[:, :1] - top[:, 1:2], entropy, *last]
    return columns(torch.cat(all_of_them, 1), MODEL_FEATURES, names)


def columns(features: Tensor, known: Sequence[str], names: Sequence[str] | None) -> Tensor:
    """(..., F) features by name. known: those of `features`; names: those wanted, None: all"""
    return features if names is None else features[..., [known.index(name) for name in names]]


#: `best_log_q`: cumulative log-score of the level's best node, in nats
TABLE_FEATURES = ("best_log_q",)


def best_score(log_q: Sequence[Tensor], names: Sequence[str] | None = None) -> Tensor | None:
    """(B, 1) `TABLE_FEATURES` of the last level; None where there is only the root's."""
    if len(log_q) == 1:
        return None
    return columns(log_q[-1].amax(1, keepdim=True).clamp(min=LEAST), TABLE_FEATURES, names)
