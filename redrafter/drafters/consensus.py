"""Samples of a prompt draft for each other: a row goes on as its siblings did after the same text.

Siblings are the rows of a batch that have the same prompt. They share one suffix automaton of what
the prompt and all of them have said so far. A row looks up the longest suffix of its own text that
something followed anywhere in there, and drafts the tree of what followed: the more of them went on
so, the likelier. After Li et al. 2025 (arXiv 2503.05330), who merge such continuations into one
chain; the automaton, the tree and the chances are ours. Siblings change how much of a row's text is
guessed, never the text.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth, root_tree
from redrafter.decode.tree import bucket
from redrafter.drafters.features import LEAST, TABLE_FEATURES, columns
from redrafter.drafters.suffix import ROOT, SuffixStates


class Guess(NamedTuple):
    """A node of a row's tree. parent: place in the list, the root's is 0; log_q: cumulative"""

    token: int
    parent: int
    depth: int
    log_q: float


_ROOT = Guess(0, 0, 0, 0.0)
_PADDING = Guess(0, 0, 0, float("-inf"))


class SharedTexts(SuffixStates):
    """One automaton over several texts that begin alike and grow token by token, in any order.

    prompt: what all begin with; it has a voice of its own, and counts once however many they are
    n_texts: how many
    said_by[s]: bit i is set iff the strings of state s end somewhere in text i behind the prompt;
        bit `n_texts`, iff they end in the prompt
    """

    def __init__(self, prompt: Iterable[int], n_texts: int):
        super().__init__()
        self.said_by = [-1]  # the empty string: everybody
        self.ends = [ROOT] * (n_texts + 1)  # per voice, the state of its whole text
        for token in prompt:
            self.extend(n_texts, token)
        self.ends = [self.ends[n_texts]] * (n_texts + 1)

    def extend(self, text: int, token: int) -> None:
        """Append a token to a text. Of its suffixes, those that the text has said before are the
        shorter ones: no state is marked twice by the same text."""
        state = self.ends[text] = self._append(self.ends[text], token)
        bit = 1 << text
        while not self.said_by[state] & bit:
            self.said_by[state] |= bit
            state = self.link[state]
            self.operations += 1

    def _made(self, source: int | None) -> None:
        self.said_by.append(0 if source is None else self.said_by[source])

    def match(self, text: int) -> tuple[int, int]:
        """(state, tokens) of the longest suffix of a text that something followed, in any text.

        The states that are passed end where texts end and nowhere else: no more than there are.
        """
        state = self.ends[text]
        while state != ROOT and not self.next[state]:
            state = self.link[state]
        return state, self.longest[state]

    def guesses(self, text: int, n: int, depth: int, min_match: int) -> list[Guess]:
        """The root and the likeliest continuations of a text, n nodes at most, best first.

        depth: tokens; min_match: of the match that the continuations follow, else there are none
        After m tokens that match, a token that v of the V voices went on with is right with
        probability v / (V + 1 + 3 / m); on 12 prompts of gsm8k (gsm-stories-6m, T = 0.7, 8 samples)
        what one voice said alone was right in 19, 37, 49 % of the cases for m = 1, 2, 3. (What the
        verifier's noise for a token says of it was worth 0.3 % of the tokens per step there.)
        """
        state, matched = self.match(text)
        if matched < min_match:
            return [_ROOT]
        order, found = itertools.count(), list[Guess]()
        queue = [(0.0, next(order), state, _ROOT)]
        while queue and len(found) < n:
            cost, _, state, guess = heapq.heappop(queue)
            found.append(guess)
            following = self.next[state]
            if guess.depth == depth or not following:
                continue
            voices = [self.said_by[s].bit_count() for s in following.values()]
            total = sum(voices) + 1 + 3 / (matched + guess.depth)
            for (token, s), count in zip(following.items(), voices, strict=True):
                more = cost - math.log(count / total)
                child = Guess(token, len(found) - 1, guess.depth + 1, -more)
                heapq.heappush(queue, (more, next(order), s, child))
        return found


class Consensus(Drafter):
    """The likeliest nodes of what the prompt and all of its rows said after the longest suffix of a
    row's text that anything followed there.

    depth: K, tokens drafted at most
    min_match: tokens; nothing is drafted after a shorter match
    nodes: N, the root counted
    A row without siblings drafts from the prompt and itself. What a row that has ended said stays.
    About 0.4 kB of the host's memory per token, a prompt's counted once.
    """

    feature_names = TABLE_FEATURES
    sees_noise = "none"

    def __init__(self, depth: int = 8, min_match: int = 1, nodes: int = 17):
        if depth < 1 or min_match < 1:
            raise InputError(f"consensus: depth {depth} and min_match {min_match} must be positive")
        if nodes < 2:
            raise InputError(f"consensus: nodes {nodes} must be at least 2, the root counted")
        self.max_depth, self.max_nodes, self.min_match = depth, nodes, min_match

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        of_prompt: dict[tuple[int, ...], list[int]] = {}
        given = zip(seqs.ids.tolist(), seqs.prompt_length.tolist(), strict=True)
        for row, (ids, length) in enumerate(given):
            of_prompt.setdefault(tuple(ids[:length]), []).append(row)
        #: per row, the texts of its prompt, and which of them is its own
        self.texts: dict[int, tuple[SharedTexts, int]] = {}
        for prompt, rows in of_prompt.items():
            shared = SharedTexts(prompt, len(rows))
            self.texts |= {row: (shared, i) for i, row in enumerate(rows)}
        self._known = seqs.prompt_length.tolist()
        self._ended = [False] * len(self._known)

    def observe(self, truth: Truth) -> None:
        """One read of the host per step. Of a row that has just ended the count is 0: what it said
        last is what its length has grown by."""
        lengths = torch.stack([truth.count, self.seqs.length], 1)
        told = torch.cat([lengths, truth.tokens], 1).tolist()
        for row, (count, length, *tokens) in enumerate(told):
            if self._ended[row]:
                continue
            self._ended[row] = count == 0
            new = tokens[: count or length - self._known[row]]
            self._known[row] += len(new)
            shared, i = self.texts[row]
            for token in new:
                shared.extend(i, token)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"min_match": self.min_match}

    def start(self) -> None:
        self.level, self._features = 0, None
        self.found = [
            [_ROOT] if ended else self._guesses(*self.texts[row])
            for row, ended in enumerate(self._ended)
        ]

    def _guesses(self, shared: SharedTexts, text: int) -> list[Guess]:
        return shared.guesses(text, self.max_nodes, self.max_depth, self.min_match)

    def extend(self, level: int) -> None:
        self.level = level

    def features(self, names: Sequence[str] | None = None) -> Tensor | None:
        """`TABLE_FEATURES`; those of a level that has no node say that it is never right."""
        if self.level == 0:
            return None
        if self._features is None:
            best = [[LEAST] * (self.max_depth + 1) for _ in self.found]
            for row, guesses in zip(best, self.found, strict=True):
                for guess in guesses:
                    row[guess.depth] = max(row[guess.depth], guess.log_q)
            self._features = torch.tensor(best, device=self.seqs.ids.device)
        return columns(self._features[:, self.level : self.level + 1], TABLE_FEATURES, names)

    def tree(self) -> TokenTree:
        """As wide as the last node of any row that is not too deep."""
        used = 1 + max(
            place for guesses in self.found
            for place, guess in enumerate(guesses) if guess.depth <= self.level
        )  # fmt: skip
        if used == 1:
            return root_tree(self.seqs.root)
        n = min(bucket(used), self.max_nodes)
        padded = [guesses[:n] + [_PADDING] * (n - len(guesses)) for guesses in self.found]
        # Token ids are exact in float64.
        table = torch.tensor(padded, dtype=torch.float64, device=self.seqs.ids.device)
        tokens, parent, depth = table[:, :, :3].long().unbind(2)
        tokens[:, 0] = self.seqs.root
        valid = (depth > 0) & (depth <= self.level)
        valid[:, 0] = True
        return TokenTree(tokens, parent, depth, valid, table[:, :, 3].float())
