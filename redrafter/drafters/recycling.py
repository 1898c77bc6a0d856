"""Token recycling: after a token come the k tokens that the target last thought likely there.

An adjacency matrix holds k successors of every token, most probable first. Every verification
overwrites the rows of the tokens that it has just read, so what the target thought and did not say
is not thrown away. The draft is a static tree grown over the matrix. Source: Luo et al. 2024
(arXiv 2408.08696).

What differs from the paper:
- Its unknown successors are token 0. Here they are invalid nodes.
- The matrix also keeps log-probabilities (float32): they rank nodes against those of other
  drafters, and let sampled decoding propose with the verifier's own noise. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.drafters.bigram import BigramTable, PairCounts
from redrafter.drafters.features import TABLE_FEATURES, best_score
from redrafter.files import digest_weights

#: The paper's 80 guesses, depth 6, k = 8 (its repository's template 2.2.2).
PAPER_TREE = "8/84321111/8321111121001001011/52111000100100000010011/3110010000101/2001"
#: 24 guesses, depth 5: by hand, after the counts of accepted nodes of the paper's tree in 869 steps
#: (gsm-stories-6m, 12 prompts, greedy and T = 1, a matrix that began cold). Ours.
DEFAULT_TREE = "6/321/4101/11101/1001"


def parse_children(text: str) -> tuple[tuple[int, ...], ...]:
    """Child counts from digits: one group per level, one digit per node of the level above it.

    "3/21" gives the root 3 children, the first of these 2 and the second 1, the third none: see
    `TokenRecycling`. Raises InputError for anything but digits and slashes.
    """
    groups = text.split("/")
    if not all(group.isascii() and group.isdigit() for group in groups):
        raise InputError(
            f"recycling: {text!r} is no tree; write one digit per node and a slash between "
            f"levels, e.g. {DEFAULT_TREE}"
        )
    return tuple(tuple(int(digit) for digit in group) for group in groups)


class TokenRecycling(Drafter):
    """A static tree over the target's own last opinions about what follows each token.

    vocab_size: V of the target; k: successors kept per token (more than V are never found)
    children: the tree. `children[l][i]` is how many children the i-th node of level l has, counted
        as they stand in the tree (level 0 is the root; the first node's children come first, each
        family by falling probability); nodes that the list does not reach have none. Text as in
        `parse_children`.
    warm: what is known before the target has said anything
    fill_prompt: a token whose row is empty gets its successors in the batch's prompts, by count.
        On by default: the contract shows the logits of the prompt's last position alone, so a
        cold matrix would otherwise draft nothing until the answer repeats a token (tokens per step
        on gsm-stories-6m, 5 + 5 prompts, greedy, `all_nodes` off, with and without: gsm8k 1.88 and
        1.80, stories 2.67 and 2.58). What the target or `warm` said is never overwritten by it.
    reset: forget everything but `warm` whenever a generation begins
    all_nodes: learn from every node that was verified, rejected ones too, as in the paper; False
        learns along the accepted path alone (tokens per step on gsm-stories-6m, 10 + 10 prompts,
        greedy, with and without: gsm8k 2.44 and 1.99, stories 3.17 and 2.70; 6 + 6, T = 1: 1.44
        and 1.25, 1.42 and 1.23)
    seeded: when sampling, order a token's k successors by log p / temperature + the verifier's
        noise, which is how the target will choose among them (5 + 5 prompts, T = 1, `all_nodes`
        off, with and without: 1.21 and 1.19, 1.25 and 1.20)
    device: the target's

    The matrix is one for all rows of a batch and, unless `reset`, for all generations (the paper's
    hot start). So a row's *draft* depends on its neighbours and on earlier texts. Its text does
    not: verification does not care where guesses come from.
    Raises InputError for a tree or table that does not fit.
    """

    feature_names = TABLE_FEATURES

    def __init__(
        self,
        vocab_size: int,
        children: str | Sequence[Sequence[int]] = DEFAULT_TREE,
        k: int = 8,
        warm: BigramTable | None = None,
        *,
        fill_prompt: bool = True,
        reset: bool = False,
        all_nodes: bool = True,
        seeded: bool = True,
        device: torch.device | str = "cpu",
    ):
        if warm is not None and warm.vocab_size != vocab_size:
            raise InputError(
                f"recycling: the bigrams are of {warm.vocab_size} tokens, the target has "
                f"{vocab_size}: count on answers of this target"
            )
        if isinstance(children, str):
            children = parse_children(children)
        levels = _static_tree(children, k)
        parent, depth, first = [0], [0], 0  # `first`: where the level above begins in the tree
        for level, (place, _) in enumerate(levels, start=1):
            parent, above = parent + [first + i for i in place], len(parent)
            depth, first = depth + [level] * len(place), above
        self.max_depth, self.max_nodes = len(levels), len(parent)
        self._levels = [torch.tensor(level, device=device) for level in levels]  # each (2, n)
        self._parent = torch.tensor(parent, device=device)
        self._depth = torch.tensor(depth, device=device)
        self.vocab_size, self.k, self.warm = vocab_size, k, warm
        self.fill_prompt, self.reset, self.seeded = fill_prompt, reset, seeded
        self.all_nodes = all_nodes
        self.needs = frozenset({"logits", "tree_logits"} if all_nodes else {"logits"})
        # Row V takes what must not be kept, so that no write depends on a read of the host.
        self.next_tokens = torch.zeros(vocab_size + 1, k, dtype=torch.long, device=device)
        self.next_log_p = torch.zeros(vocab_size + 1, k, device=device)  # -inf: not known
        self.said = torch.zeros(vocab_size + 1, dtype=torch.bool, device=device)  # not by a prompt
        self.forget()

    def forget(self) -> None:
        """Back to what `warm` knows, or to nothing."""
        self.next_tokens.zero_()
        self.next_log_p.fill_(float("-inf"))
        self.said.zero_()
        if self.warm is not None:
            width = min(self.k, self.warm.width)
            self.next_tokens[:-1, :width] = self.warm.tokens[:, :width].to(self.said.device)
            self.next_log_p[:-1, :width] = self.warm.log_p[:, :width].to(self.said.device)
            self.said[:-1] = self.next_log_p[:-1, 0] > float("-inf")

    def identity(self) -> dict[str, Any]:
        warm = []
        if self.warm is not None:
            warm = [("tokens", self.warm.tokens), ("log_p", self.warm.log_p)]
        return super().identity() | {
            "k": self.k, "tree": self._parent.tolist(), "fill_prompt": self.fill_prompt,
            "reset": self.reset, "all_nodes": self.all_nodes, "seeded": self.seeded,
            "warm": digest_weights(warm),
        }  # fmt: skip

    def begin(self, seqs: RowState) -> None:
        """Reads the prompts on the host where `fill_prompt` is on, once per generation."""
        super().begin(seqs)
        self._zeros = torch.zeros_like(seqs.length)[:, None]
        if self.reset:
            self.forget()
        if self.fill_prompt:
            self._learn_prompts()

    def _learn_prompts(self) -> None:
        counts, seen = PairCounts(self.vocab_size), []
        ids, length = self.seqs.ids.cpu(), self.seqs.prompt_length.tolist()
        for row, n in zip(ids, length, strict=True):
            counts.add(row[: n - 1], row[1:n])
            seen.append(row[: n - 1])
        key = torch.cat(seen).unique()
        if not len(key):
            return  # prompts of one token each
        table = counts.table(self.k)
        device = self.said.device
        tokens, log_p = table.tokens[key].to(device), table.log_p[key].to(device)
        key = key.to(device)
        key = torch.where(self.said[key], self.vocab_size, key)
        self.next_tokens[key], self.next_log_p[key] = tokens, log_p

    def observe(self, truth: Truth) -> None:
        """Overwrite the rows of the tokens that the target has read, with what it then said.

        A node's logits come after reading its own token. Along the accepted path, logits[:, d] were
        made after reading the old root (d = 0) or the d-th accepted token, not the token emitted
        there, which is `truth.tokens[:, d]` and comes next. So for an old root r and accepted
        tokens a, b, then a bonus c: rows r, a, b are written (and those of all rejected nodes), row
        c is not; after the prefill, the row of the prompt's last token.
        A token that was read several times keeps what was said last: at the largest depth, and
        among equal depths in the last row of the batch, at its last node. Accepted nodes do not go
        before rejected ones: that lost 1 to 3 % of the tokens per step (as for `all_nodes`).
        """
        tree, seqs = truth.tree, self.seqs
        if self.all_nodes and tree is not None:
            read = tree.valid & (truth.count > 0)[:, None]
            self._learn(tree.tokens, read, tree.depth, truth.tree_logits)
            return
        depth = torch.arange(truth.logits.shape[1], device=seqs.ids.device)
        place = seqs.length[:, None] - 1 - truth.count[:, None] + depth  # (B, K+1)
        tokens = seqs.ids.gather(1, place.clamp(max=seqs.ids.shape[1] - 1))
        read = depth < truth.count[:, None]
        self._learn(tokens, read, depth.expand_as(tokens), truth.logits)

    def _learn(self, key: Tensor, read: Tensor, depth: Tensor, logits: Tensor) -> None:
        """key: (B, N) tokens; read: (B, N) bool, which of them count; logits: (B, N, V)."""
        key = torch.where(read, key, self.vocab_size)
        logits = logits.float()
        top, tokens = logits.topk(min(self.k, logits.shape[-1]), dim=-1)
        log_p = top - logits.logsumexp(-1, keepdim=True)
        # Of equal keys one alone may be written: the order of a scatter's writes is not defined.
        place = torch.arange(key.numel(), device=key.device).view_as(key)
        order = 1 + depth * key.numel() + place
        last = torch.zeros(self.vocab_size + 1, dtype=torch.long, device=key.device)
        last.scatter_reduce_(0, key.flatten(), order.flatten(), "amax")
        key = torch.where(last[key] == order, key, self.vocab_size)
        n = log_p.shape[-1]
        self.next_tokens[key, :n], self.next_log_p[key, :n] = tokens, log_p
        self.said.index_fill_(0, key.flatten(), True)

    def start(self) -> None:
        root = self.seqs.root[:, None]
        self.tokens = [root]
        self.log_q = [torch.zeros(root.shape, device=root.device)]

    def extend(self, level: int) -> None:
        parent, rank = self._levels[level - 1]
        frontier = self.tokens[-1]  # (B, n of the level above)
        tokens, log_p = self.next_tokens[frontier], self.next_log_p[frontier]  # (B, n, k)
        if self.seeded and self.seqs.noise is not None:
            tokens, log_p = self._with_noise(tokens, log_p, level)
        log_q = self.log_q[-1][:, parent] + log_p[:, parent, rank]
        self.tokens.append(tokens[:, parent, rank])
        self.log_q.append(log_q)

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        return best_score(self.log_q, names)

    def _with_noise(self, tokens: Tensor, log_p: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Successors (B, n, k) in the order in which the target would choose them."""
        noise = self.seqs.noise[:, level - 1].gather(1, tokens.flatten(1)).view_as(tokens)
        score = (log_p / self.seqs.temperature + noise.to(log_p.dtype)).log_softmax(-1)
        # A row without any successor is nan after the softmax.
        score = score.masked_fill(log_p == float("-inf"), float("-inf"))
        score, order = score.sort(dim=-1, descending=True)
        return tokens.gather(-1, order), score

    def tree(self) -> TokenTree:
        tokens, log_q = torch.cat(self.tokens, 1), torch.cat(self.log_q, 1)
        n = tokens.shape[1]  # fewer than N where the lookahead ended the draft
        parent, depth = (x[:n].expand_as(tokens) for x in (self._parent, self._depth))
        return TokenTree(tokens, parent, depth, log_q > float("-inf"), log_q)


def _static_tree(children: Sequence[Sequence[int]], k: int) -> list[tuple[list[int], list[int]]]:
    """Per level, of each of its nodes: the parent's place in the level above, and its rank among
    its siblings. Raises InputError naming the level that cannot be."""
    if k < 1 or not children:
        raise InputError(f"recycling: k = {k} must be positive, and the tree needs a level")
    levels, above = [], 1
    for level, counts in enumerate(children, start=1):
        if len(counts) > above:
            raise InputError(
                f"recycling: level {level} of the tree gives children to {len(counts)} nodes, the "
                f"level above has {above}"
            )
        if not all(0 <= n <= k for n in counts) or not any(counts):
            raise InputError(
                f"recycling: level {level} of the tree has child counts {list(counts)}; they must "
                f"be 0 to k = {k}, and not all 0"
            )
        place = [i for i, n in enumerate(counts) for _ in range(n)]
        levels.append((place, [rank for n in counts for rank in range(n)]))
        above = len(place)
    return levels
