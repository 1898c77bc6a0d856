"""Drafting with a head of any kind: beams grown level by level, verified as one tree.

Scores are log-probabilities of the head, summed along the path. At temperature > 0 the verifier's
own Gumbel noise is added first: the token that the target will pick at depth d is
argmax(log p + noise_d), so softmax(log q + noise_d) is the drafter's belief about *that* token, and
no longer about a random one. The text stays exact either way; only acceptance changes.
Sources: beam search and recurrence, ReDrafter (arXiv 2403.09919); all-levels trees, EAGLE-2;
proposing with the shared noise, Gumbel coupling (Daliri, Musco, Suresh 2024); its use in beams,
ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redrafter.config import TreeConfig
from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.decode.tree import best_nodes, final_beams, level_depths, level_start
from redrafter.drafters.beams import best_children
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.context import HeadContext
from redrafter.drafters.features import MODEL_FEATURES, model_features
from redrafter.heads.base import DraftHead
from redrafter.targets.model import Target

#: in the identities of lookaheads and records, the first of which are older than the class's name
_KIND = "RecurrentDrafter"


class HeadDrafter(Drafter):
    """W beams of depth K from a head, as a tree of one of `TreeConfig`'s shapes.

    head: of any kind
    budget: chooses in every step how many of the W x K nodes are verified, the best ones, at most
        `tree.nodes`, and how many levels are drafted, at most K; instead of `tree.shape`
    """

    feature_names = MODEL_FEATURES

    def __init__(
        self,
        head: DraftHead,
        target: Target,
        tree: TreeConfig | None = None,
        budget: NodeBudget | None = None,
    ):
        tree = tree or TreeConfig(depth=head.max_depth or TreeConfig.depth)
        if tree.width < 1 or tree.depth < 1:
            raise InputError(f"tree: width {tree.width} and depth {tree.depth} must be positive")
        if head.max_depth is not None and tree.depth > head.max_depth:
            raise InputError(
                f"tree: depth {tree.depth}, but this head drafts {head.max_depth} tokens ahead at "
                f"most: name it head:{tree.width}x{head.max_depth}, or set tree.depth"
            )
        if budget is None and tree.shape == "best" and not tree.nodes:
            raise InputError("tree.shape 'best' needs tree.nodes, the number of nodes N to verify")
        self.head, self.target, self.shape = head, target, tree
        self._reader = HeadContext(head, target, tree.rounded)
        self.needs = self._reader.needs
        self.sees_noise = "all" if tree.seeded else "none"
        widest = 1 if target.verifies == "chains" else tree.width
        self.width = min(widest, head.draft_vocab_size)
        self.one_path = self.width == 1
        self.max_depth = tree.depth
        self.max_nodes = 1 + self.width * tree.depth
        #: depth and validity of a whole tree, and where the level above each node begins
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        self.budget = budget
        if budget is not None:
            self.max_nodes = min(self.max_nodes, budget.max_nodes, tree.nodes or self.max_nodes)
        elif tree.shape == "best":
            self.max_nodes = min(self.max_nodes, tree.nodes)

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self._reader.begin(seqs)
        rows = torch.zeros_like(seqs.length)[:, None]
        self._zeros = rows

    def observe(self, truth: Truth) -> None:
        """Keep c (B, 1, H) of the new root."""
        self.context = self._reader.observe(truth)
        if self.budget:
            self.budget.observe(truth)

    def identity(self) -> dict[str, Any]:
        tree = self.shape
        return super().identity() | {
            "kind": _KIND, "head": self.head.fingerprint(), "width": self.width,
            "shape": tree.shape, "nodes": tree.nodes, "seeded": tree.seeded,
        }  # fmt: skip

    def start(self) -> None:
        root = self.seqs.root[:, None]
        self.tokens, self.places = [root], [self._zeros]  # places: of parents, in their level
        self.log_q = [torch.zeros(root.shape, dtype=self.context.dtype, device=root.device)]
        self.states: Tensor | None = None  # (B, w, S), of the level that was read last
        noise = self.seqs.noise if self.shape.seeded else None
        if noise is not None and self.head.config.draft_vocab_size is not None:
            noise = noise[..., self.head.draft_ids]
        self.noise = noise
        self._ended = False
        if self.budget:
            self.budget.start(self.seqs.live, self.max_nodes)

    def extend(self, level: int) -> None:
        """The head reads the frontier (B, w), of whose children the best W are kept."""
        if self._ended:
            return
        states, scores = self.head.read(  # (B, w, S) and (B, w, Vd)
            self.target, self.tokens[-1], self.context, self._states_before(), level
        )
        if self.noise is not None:
            noise = self.noise[:, level - 1 : level].to(scores.dtype)
            scores = torch.add(noise, scores, alpha=1 / self.seqs.temperature)
        found = best_children(scores, self.log_q[-1], self.width)
        self.states, self._scores = states, scores
        self.tokens.append(self.head.to_vocab_ids(found.tokens))
        self.places.append(found.place)
        self.log_q.append(found.log_q)
        if self.budget:
            self._ended = not self.budget.go_on(found.log_q)

    def _states_before(self) -> Tensor | None:
        """(B, w, S), of the frontier's parents."""
        states = self.states
        if states is None or self.width == 1:
            return states
        if states.shape[1] == 1:
            return states.expand(-1, self.width, -1)
        return states.gather(1, self.places[-1][:, :, None].expand(-1, -1, states.shape[-1]))

    def features(self, names: Sequence[str] | None = None) -> Tensor | None:
        if len(self.log_q) == 1:
            return None
        noise = None if self.noise is None else self.seqs.noise[:, len(self.log_q) - 2]
        return model_features(self._scores, self.log_q, self.tokens[-1], noise, names)

    def tree(self) -> TokenTree:
        tokens = torch.cat(self.tokens, 1)
        levels = len(self.tokens) - 1
        if self._known is None or self._known[0].shape != tokens.shape:
            depth = level_depths(tokens.shape[1], self.width, tokens.device)
            starts = [level_start(k - 1, self.width) for k in range(1, levels + 1)]
            above = torch.tensor([0, *(start for start in starts for _ in range(self.width))])
            above = above.to(tokens.device)
            self._known = depth.expand_as(tokens), torch.ones_like(tokens, dtype=torch.bool), above
        depth, valid, above = self._known
        parents = torch.cat(self.places, 1) + above
        tree = TokenTree(tokens, parents, depth, valid, torch.cat(self.log_q, 1))
        if self.budget:
            return self.budget.prune(tree)
        if self.shape.shape == "best":
            return best_nodes(tree, self.max_nodes)
        if self.shape.shape == "beams" and self.width > 1:
            return final_beams(tree, self.width, levels)
        return tree
