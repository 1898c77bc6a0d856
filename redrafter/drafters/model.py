"""Drafting with a second, smaller causal LM.

The draft model says what comes next by itself, token by token: a chain, or with `width` > 1 a tree
that keeps the `width` best nodes of each level. Verification is the seeded (membership) rule: at
temperature > 0 each token is the argmax of log q + noise, with the verifier's own Gumbel noise, so
the proposal is what the target would say were p equal to q. One candidate is then accepted with
probability at least (1 - TV) / (1 + TV), TV being the distance between p and q, and the text is
plain decoding's whatever is drafted. The ratio rule of the papers (draw x from q on its own, accept
with min(1, p(x) / q(x)), else draw from the rest) is accepted with probability 1 - TV, which is
more, gives a text of the same law but one that changes with the drafter, and is not built here.
Sources: two-model drafting, arXiv 2302.01318 and 2211.17192; proposing with the shared noise,
Gumbel coupling (Daliri, Musco, Suresh 2024); all-levels trees, EAGLE-2; the bookkeeping, ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, Sequences, TokenTree, Truth
from redrafter.decode.cache import RowCache
from redrafter.decode.tree import best_nodes, level_depths, level_start
from redrafter.decode.warp import score_dtype
from redrafter.drafters.budget import NodeBudget
from redrafter.target.model import Target

_SHOWN = 5  # tokens that an error message names


class DraftModel(Drafter):
    """K tokens (a chain) or W nodes on each of K levels, from a smaller model.

    draft: the smaller model, loaded like a target; on the target's device, with its vocabulary
    depth: K; width: W, 1 is a chain
    seeded: propose with the verifier's noise when sampling; False proposes what q holds likeliest
    temperature: what the draft model's logits are divided by when sampling; None is the target's
    nodes: N, of the 1 + W x K nodes verify those of highest cumulative score; None verifies all
    budget: chooses N in every step, at most `nodes`, and how many levels are drafted, at most K

    A step that drafts l levels costs l forwards of the draft model: the first reads the tokens
    that its cache lacks (the root, and the last drafted one where all were accepted, as that one
    was never read), each later one the W nodes drafted before. The whole batch shares a forward,
    so a row may read its last token but one again beside a row that lacks it.
    Rows whose text has outgrown the draft model's context are no longer drafted for.
    Raises InputError where the vocabularies or devices differ or a number is not positive.
    """

    feature_names = ("best_log_q",)

    def __init__(
        self,
        draft: Target,
        target: Target,
        depth: int = 4,
        width: int = 1,
        seeded: bool = True,
        temperature: float | None = None,
        nodes: int | None = None,
        budget: NodeBudget | None = None,
    ):
        if width < 1 or depth < 1:
            raise InputError(f"draft model: width {width} and depth {depth} must be positive")
        if nodes is not None and nodes < 1:
            raise InputError(f"draft model: nodes {nodes} must be positive; the root is one")
        if temperature is not None and not temperature > 0:
            raise InputError(
                f"draft model: temperature {temperature} must be positive; for the likeliest "
                "token whatever the noise, set seeded to false"
            )
        if draft.device != target.device:
            raise InputError(
                f"draft model {draft.name} is on {draft.device}, the target on {target.device}: "
                "load both on one device"
            )
        check_vocabulary(target, draft)
        self.draft, self.seeded, self.temperature = draft, seeded, temperature
        # Ids that only one of the two lm_heads has are padding.
        self.vocab_size = min(draft.vocab_size, target.vocab_size)
        self.width = min(width, self.vocab_size)
        self.max_depth, self.max_nodes = depth, 1 + self.width * depth
        self.nodes, self.budget = nodes, budget
        if nodes is not None:
            self.max_nodes = min(self.max_nodes, nodes)
        if budget is not None:
            self.max_nodes = min(self.max_nodes, budget.max_nodes)
        self._sees_all = list(draft.windows.values()) == [None]

    def begin(self, seqs: Sequences) -> None:
        """Reads the prompts: all that is known but the root."""
        super().begin(seqs)
        batch, capacity = seqs.ids.shape
        device = seqs.ids.device
        # Positions that the draft model has; the loop asks for none past the ids' end.
        context = self.draft.max_positions
        self._context = capacity if context is None else min(context, capacity)
        slots = self._context + self.width * self.max_depth
        self._cache = RowCache(self.draft.n_layers, batch, slots, device)
        self._zeros = torch.zeros(1, 1, 1, slots, dtype=self.draft.dtype, device=device)
        self._arange = torch.arange(slots, device=device)
        self._n_read = 0  # levels of the last tree whose nodes are in the cache
        stop = (seqs.length - 1).clamp(max=self._context)
        stops = stop.tolist()
        self._read(stop, stops, max(stops))

    def start(self) -> None:
        """Bring the cache up to the text, the root included. The step's one read of the host."""
        seqs, root = self.seqs, self.seqs.root[:, None]
        path, agreed = self._agreed()
        stop = seqs.length.clamp(max=self._context)
        kept = torch.minimum(agreed, stop - 1)  # the root's logits are always needed
        # Depth d is said by the token at position L + d - 2, which must be in the context.
        self._room = self._context + 1 - seqs.length  # (B,) levels
        room = torch.where(seqs.live, self._room, 0)
        keeps, stops, rooms = torch.stack([kept, stop, room]).tolist()
        self._levels = max(rooms)
        if self._n_read and self.width > 1:
            self._cache.commit([n - 1 for n in self._stops])  # the root is node 0 of the path
            self._cache.commit(keeps, path)
        self._n_read = 0
        if self._levels > 0:
            missing = max(s - k for s, k in zip(stops, keeps, strict=True))
            self._logits = self._read(stop, stops, missing)
        self.tokens, self.parents = [root], [torch.zeros_like(root)]
        self.log_q = [torch.zeros(root.shape, dtype=score_dtype(self.draft.dtype)).to(root.device)]
        self._seen = torch.ones_like(root, dtype=torch.bool)[:, :, None]
        self.noise = seqs.noise if self.seeded else None
        self._ended = False
        if self.budget:
            self.budget.start(seqs.live, self.max_nodes)

    def extend(self, level: int) -> Tensor:
        """Features (B, 1): cumulative log-score of the level's best node; -inf in rows whose
        text has left the draft model's context, and once the budget has ended the draft."""
        if self._ended:
            return torch.full_like(self.log_q[0], float("-inf"))
        if level > self._levels:
            return self._append_nothing()
        if level > 1:
            self._logits = self._read_frontier(level)
        scores = self._logits[..., : self.vocab_size].to(self.log_q[0].dtype)  # (B, w, V)
        if self.seqs.noise is not None:
            scores = scores / (self.temperature or self.seqs.temperature)
        if self.noise is not None:
            noise = self.noise[:, level - 1 : level, : self.vocab_size]
            scores = scores + noise.to(scores.dtype)
        # The best W of all children are among the best W of each parent.
        top, ids = scores.topk(self.width, dim=-1)
        total = top + (self.log_q[-1] - scores.logsumexp(-1))[:, :, None]
        best, index = total.flatten(1).topk(self.width, dim=-1)
        self.tokens.append(ids.flatten(1).gather(1, index))
        self.parents.append(level_start(level - 1, self.width) + index // self.width)
        self.log_q.append(best.masked_fill((level > self._room)[:, None], float("-inf")))
        if self.budget:
            self._ended = not self.budget.go_on(self.log_q[-1])
        return self.log_q[-1][:, :1]

    def tree(self) -> TokenTree:
        tokens, log_q = torch.cat(self.tokens, 1), torch.cat(self.log_q, 1)
        depth = level_depths(tokens.shape[1], self.width, tokens.device).expand_as(tokens)
        valid = log_q > float("-inf")
        tree = TokenTree(tokens, torch.cat(self.parents, 1), depth, valid, log_q)
        if self.budget:
            return self.budget.prune(tree)
        return best_nodes(tree, self.max_nodes)  # the cache keeps what is cut off here

    def observe(self, truth: Truth) -> None:
        if self.budget:
            self.budget.observe(truth)

    def _append_nothing(self) -> Tensor:
        """A level of invalid nodes, without a forward."""
        tokens = self.tokens[0].expand(-1, self.width)
        self.tokens.append(tokens)
        self.parents.append(torch.zeros_like(tokens))
        nothing = torch.full_like(self.log_q[0], float("-inf"))
        self.log_q.append(nothing.expand(-1, self.width))
        return nothing

    # -- the draft model's cache -----------------------------------------------------------

    def _agreed(self) -> tuple[Tensor, Tensor]:
        """What the cache holds of the present text, found by comparing tokens, so that it is right
        too where the text came from elsewhere or steps were skipped.

        Returns path (B, 1 + levels read): the root and the node of each level that became text;
        and (B,), how many entries are text once the path's nodes follow the root.
        """
        agreed, ids = self._known, self.seqs.ids
        node = torch.zeros_like(agreed)
        good, path = torch.ones_like(agreed, dtype=torch.bool), [node]
        for level in range(1, self._n_read + 1):
            where = (self._known + level - 1).clamp(max=ids.shape[1] - 1)
            fits = self.tokens[level] == ids.gather(1, where[:, None])
            fits &= good[:, None] & (self.parents[level] == node[:, None])
            good = fits.any(1)
            node = level_start(level, self.width) + fits.int().argmax(1)
            path.append(node)
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

    def _read_frontier(self, level: int) -> Tensor:
        """Read the nodes of the level before; their keys go behind the text. (B, W, V) logits."""
        tokens, parents, cache = self.tokens[-1], self.parents[-1], self._cache
        cache.prepare(self.width)
        position = (self._known + level - 2).clamp(max=self._context - 1)[:, None]
        if self.width == 1:
            masks = self._causal(position)
        else:
            beam = (parents - level_start(level - 2, self.width))[:, :, None]
            seen = self._seen.gather(1, beam.expand(-1, -1, self._seen.shape[2]))
            own = torch.eye(self.width, dtype=torch.bool, device=seen.device)
            self._seen = torch.cat([seen, own.expand(len(seen), -1, -1)], 2)  # (B, W, n)
            position = position.expand_as(tokens)
            masks = self._tree_masks(position)
        out = self.draft.forward(tokens, position, masks, cache)
        cache.commit([n + self.width for n in cache.lengths])
        self._n_read = level - 1
        return out.logits

    def _causal(self, position: Tensor):
        """Masks for keys that lie in the order of the text. position: (B, N)"""
        if position.shape[1] == 1 and self._sees_all and self._cache.uniform:
            return self._zeros[..., : self._cache.width]  # as in plain decoding: all keys
        keys = self._arange[: self._cache.width]
        allowed = keys <= position[:, :, None]
        return self.draft.masks(allowed, position, keys.expand(len(position), -1))

    def _tree_masks(self, position: Tensor):
        """Masks for a frontier at `position` (B, W) that sees the text and its ancestors."""
        keys, n = self._arange[: self._cache.width], self._seen.shape[2]
        allowed = (keys < self._known[:, None])[:, None].repeat(1, self.width, 1)
        root = self._known[:, None] - 1
        column = root + self._arange[:n]  # (B, n): where node j lies
        allowed.scatter_(2, column[:, None].expand_as(self._seen), self._seen)
        own = root + level_depths(n, self.width, root.device)
        key_position = keys.repeat(len(position), 1).scatter_(1, column, own)
        return self.draft.masks(allowed, position, key_position)


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
