"""A drafter that already knows the text, for tests and for upper bounds.

At each level it proposes the true token with a set probability among wrong siblings, so every
branch of the loop can be forced: nothing accepted, everything accepted, the true path under any
sibling, equal siblings, a true token under a wrong parent.
"""

from __future__ import annotations

import torch

from redrafter.contracts import Drafter, TokenTree


class ReplayDrafter(Drafter):
    """texts: per row, all its tokens (prompt and continuation) as `plain` made them.

    acceptance: probability that a level's true token is proposed under the true path
    width: siblings per level; duplicates: one sibling repeats the true token
    """

    def __init__(
        self,
        texts: list[list[int]],
        vocab_size: int,
        depth: int = 4,
        width: int = 3,
        acceptance: float = 1.0,
        duplicates: bool = False,
        seed: int = 0,
    ):
        self.texts, self.vocab_size, self.width = texts, vocab_size, width
        self.one_path = width == 1
        self.acceptance, self.duplicates = acceptance, duplicates
        self.max_depth, self.max_nodes = depth, 1 + width * depth
        self.random = torch.Generator().manual_seed(seed)

    def start(self) -> None:
        self.rows: list[list[tuple[int, int]]] = [[] for _ in self.texts]  # (token, parent)
        self.chain = [0] * len(self.texts)  # the node under which each row goes on

    def extend(self, level: int) -> None:
        for b, text in enumerate(self.texts):
            place = int(self.seqs.length[b]) - 1 + level
            # Past the known text any token is as good as another.
            true = text[place] if place < len(text) else 0
            wrong = [(true + 1 + i) % self.vocab_size for i in range(self.width)]
            tokens = wrong[: self.width]
            slot = self._pick(self.width)
            if torch.rand((), generator=self.random) < self.acceptance:
                tokens[slot] = true
                if self.duplicates and self.width > 1:
                    tokens[(slot + 1) % self.width] = true
                    slot = (slot + self._pick(2)) % self.width
            first = 1 + len(self.rows[b])
            self.rows[b] += [(token, self.chain[b]) for token in tokens]
            self.chain[b] = first + slot

    def tree(self) -> TokenTree:
        nodes = torch.tensor(self.rows, device=self.seqs.ids.device)  # (B, N - 1, 2)
        root = self.seqs.root[:, None]
        zero = torch.zeros_like(root)
        level = torch.arange(nodes.shape[1], device=root.device) // self.width + 1
        return TokenTree(
            tokens=torch.cat([root, nodes[:, :, 0]], 1),
            parent=torch.cat([zero, nodes[:, :, 1]], 1),
            depth=torch.cat([zero, level.expand(len(root), -1)], 1),
            valid=torch.ones(len(root), 1 + nodes.shape[1], dtype=torch.bool, device=root.device),
        )

    def _pick(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.random))
