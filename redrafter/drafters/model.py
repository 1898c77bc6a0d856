"""Drafting with a second, smaller causal LM.

The draft model says what comes next by itself, token by token: a chain, or with `width` > 1 a tree
that keeps the `width` best nodes of each level. Verification is the seeded (membership) rule: at
temperature > 0 each token is the argmax of log q + noise, with the verifier's own Gumbel noise, so
the proposal is what the target would say were p equal to q. One candidate is then accepted with
probability at least (1 - TV) / (1 + TV), TV being the distance between p and q, and the text is
plain decoding's whatever is drafted. The ratio rule of the papers (draw x from q on its own, accept
with min(1, p(x) / q(x)), else draw from the rest) is accepted with probability 1 - TV, which is
more, and gives a text of the same law but one that changes with the drafter: see `multi.py`.
Sources: two-model drafting, arXiv 2302.01318 and 2211.17192; proposing with the shared noise,
Gumbel coupling (Daliri, Musco, Suresh 2024); all-levels trees, EAGLE-2; the bookkeeping, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.decode.tree import best_nodes, level_depths, level_start
from redrafter.decode.warp import score_dtype
from redrafter.drafters.beams import best_children
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.features import MODEL_FEATURES, model_features
from redrafter.drafters.frontier import ModelFrontier
from redrafter.targets.model import Target


class DraftModel(Drafter):
    """K tokens (a chain) or W nodes on each of K levels, from a smaller model.

    draft: the smaller model, loaded like a target; on the target's device, with its vocabulary
    depth: K; width: W, 1 is a chain
    seeded: propose with the verifier's noise when sampling; False proposes what q holds likeliest
    temperature: what the draft model's logits are divided by when sampling; None is the target's
    nodes: N, of the 1 + W x K nodes verify those of highest cumulative score; None verifies all
    budget: chooses N in every step, at most `nodes`, and how many levels are drafted, at most K

    A step that drafts l levels costs l forwards of the draft model (see `ModelFrontier`). Rows
    whose text has outgrown the draft model's context are no longer drafted for.
    Raises InputError where the vocabularies or devices differ or a number is not positive.
    """

    feature_names = MODEL_FEATURES

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
        self.draft, self.seeded, self.temperature = draft, seeded, temperature
        self.sees_noise = "all" if seeded else "none"
        width = 1 if target.verifies == "chains" else width
        # Ids that only one of the two lm_heads has are padding.
        self.width = min(width, draft.vocab_size, target.vocab_size)
        self.frontier = ModelFrontier(draft, target, 1 + self.width * depth)
        self.max_depth, self.max_nodes = depth, 1 + self.width * depth
        self.one_path = self.width == 1
        self.nodes, self.budget = nodes, budget
        if nodes is not None:
            self.max_nodes = min(self.max_nodes, nodes)
        if budget is not None:
            self.max_nodes = min(self.max_nodes, budget.max_nodes)

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.frontier.begin(seqs)

    def start(self) -> None:
        seqs, root = self.seqs, self.seqs.root[:, None]
        self._logits = self.frontier.start()
        self._room = self.frontier.room()
        self.tokens, self.parents = [root], [torch.zeros_like(root)]
        self.log_q = [torch.zeros(root.shape, dtype=score_dtype(self.draft.dtype)).to(root.device)]
        self.noise = seqs.noise if self.seeded else None
        self._ended = False
        if self.budget:
            self.budget.start(seqs.live, self.max_nodes)

    def extend(self, level: int) -> None:
        self._ended |= level > self.frontier.levels  # no row has room in the draft model's context
        if self._ended:
            return
        if level > 1:
            self._logits = self.frontier.advance(self.tokens[-1], self._place)
        scores = self._logits.to(self.log_q[0].dtype)  # (B, w, V)
        if self.seqs.noise is not None:
            scores = scores / (self.temperature or self.seqs.temperature)
        if self.noise is not None:
            scores = scores + self.noise[:, level - 1 : level].to(scores.dtype)
        found = best_children(scores, self.log_q[-1], self.width)
        self._scores, self._place = scores, found.place
        self.tokens.append(found.tokens)
        self.parents.append(level_start(level - 1, self.width) + found.place)
        self.log_q.append(found.log_q.masked_fill((level > self._room)[:, None], float("-inf")))
        if self.budget:
            self._ended = not self.budget.go_on(self.log_q[-1])

    def features(self, names: Sequence[str] | None = None) -> Tensor | None:
        if len(self.log_q) == 1:
            return None
        noise = None if self.noise is None else self.noise[:, len(self.log_q) - 2]
        return model_features(self._scores, self.log_q, self.tokens[-1], noise, names)

    def tree(self) -> TokenTree:
        tokens, log_q = torch.cat(self.tokens, 1), torch.cat(self.log_q, 1)
        depth = level_depths(tokens.shape[1], self.width, tokens.device).expand_as(tokens)
        valid = log_q > float("-inf")
        tree = TokenTree(tokens, torch.cat(self.parents, 1), depth, valid, log_q)
        if self.budget:
            return self.budget.prune(tree)
        return best_nodes(tree, self.max_nodes)  # the cache keeps what is cut off here

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "draft": self.draft.fingerprint(), "width": self.width, "nodes": self.nodes,
            "seeded": self.seeded, "temperature": self.temperature,
        }  # fmt: skip

    def observe(self, truth: Truth) -> None:
        if self.budget:
            self.budget.observe(truth)
