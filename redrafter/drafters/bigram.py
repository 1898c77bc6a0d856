"""Counted bigrams: after token a come the tokens that most often followed it in given texts.

Counted on the target's own answers this is a stronger baseline than a table probed from its
weights, and it costs next to nothing to draft with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, Sequences, TokenTree


def count_bigrams(
    rows: Iterable[Sequence[int]], vocab_size: int, width: int
) -> tuple[Tensor, Tensor]:
    """The `width` most frequent successors of every token.

    rows: token ids; pairs are counted within a row only
    Returns (tokens, log_p): (V, width) int64, most frequent first and the smaller id at equal
    counts, and (V, width) float32, log of count / all successors counted; -inf (and token 0) where
    fewer successors were seen. Raises InputError for an id outside the vocabulary or no pair.
    """
    pairs = []
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row, dtype=torch.long)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(f"bigram: row {i} has a token id outside the vocabulary {vocab_size}")
        pairs.append(ids[:-1] * vocab_size + ids[1:])
    pair, count = (
        torch.cat(pairs).unique(return_counts=True) if pairs else (torch.zeros(0), torch.zeros(0))
    )
    if not len(pair):
        raise InputError("bigram: no two successive tokens to count; give longer answers")
    # Two stable sorts: by count, then by first token; ids ascend from `unique`.
    order = count.argsort(stable=True, descending=True)
    order = order[(pair[order] // vocab_size).argsort(stable=True)]
    first, second, count = pair[order] // vocab_size, pair[order] % vocab_size, count[order]
    total = torch.zeros(vocab_size).index_add_(0, first, count.float())
    group_start = torch.searchsorted(first, first)  # index where this first token's run begins
    rank = torch.arange(len(first)) - group_start
    kept = rank < width
    tokens = torch.zeros(vocab_size, width, dtype=torch.long)
    log_p = torch.full((vocab_size, width), float("-inf"))
    tokens[first[kept], rank[kept]] = second[kept]
    log_p[first[kept], rank[kept]] = (count[kept] / total[first[kept]]).log()
    return tokens, log_p


class CountedBigrams(Drafter):
    """All-levels tree: each level keeps the `width` paths of highest cumulative log-probability.

    rows: texts to count on, as token ids (the target's answers)
    width: W, nodes per level and successors kept per token; depth: K
    """

    feature_names = ("best_log_q",)

    def __init__(
        self,
        rows: Iterable[Sequence[int]],
        vocab_size: int,
        width: int = 4,
        depth: int = 4,
        device: torch.device | str = "cpu",
    ):
        if width < 1 or depth < 1:
            raise InputError(f"bigram: width {width} and depth {depth} must be positive")
        tokens, log_p = count_bigrams(rows, vocab_size, width)
        self.next_tokens, self.next_log_p = tokens.to(device), log_p.to(device)
        self.width, self.max_depth, self.max_nodes = width, depth, 1 + width * depth

    def begin(self, seqs: Sequences) -> None:
        super().begin(seqs)
        self._zeros = torch.zeros_like(seqs.length)[:, None]

    def start(self) -> None:
        self.tokens, self.parents = [self.seqs.root[:, None]], [self._zeros]
        self.log_q = [self._zeros.to(self.next_log_p.dtype)]

    def extend(self, level: int) -> Tensor:
        """Features (B, 1): cumulative log-probability of the level's best node."""
        frontier = self.tokens[-1]  # (B, w)
        total = self.log_q[-1][:, :, None] + self.next_log_p[frontier]  # (B, w, W)
        best, index = total.flatten(1).topk(self.width, dim=-1)
        # Nodes of level 1 follow the root, those of level l the 1 + (l - 1) W nodes before them.
        first = 0 if level == 1 else 1 + (level - 2) * self.width
        self.tokens.append(self.next_tokens[frontier].flatten(1).gather(1, index))
        self.parents.append(first + index // self.width)
        self.log_q.append(best)
        return best[:, :1]

    def tree(self) -> TokenTree:
        tokens, log_q = torch.cat(self.tokens, 1), torch.cat(self.log_q, 1)
        node = torch.arange(tokens.shape[1], device=tokens.device)
        depth = ((node + self.width - 1) // self.width).expand_as(tokens)
        # A token without enough counted successors leaves nodes of probability 0.
        return TokenTree(tokens, torch.cat(self.parents, 1), depth, log_q > float("-inf"), log_q)
