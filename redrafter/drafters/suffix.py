"""Suffix automaton: the text goes on as it did after the longest suffix of it that occurred before.

Prompt lookup (`lookup.py`) without its cap on the match, at amortised O(1) per token, and with
reference texts beside the row's own. After SAM-Decoding (2411.10666): draft length by match
length; the automaton is Blumer et al.'s (1985). Ours: the earlier occurrence is the most recent
one, not the first; a copy that reaches the text's end goes on with what it copied, so that a loop
is drafted to full depth; in the reference texts the most frequent continuation is followed, since
they have no "recent" and counts say more than the place in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.drafters.lookup import CHAIN_FEATURES, chain_features, chain_tree

ROOT = 0  # the state of the empty string
_END = -1  # stands behind every reference text; no token has this id, so no match crosses it
OWN_TEXT, REFERENCE = 1.0, 2.0  # the feature `source`; 0 where nothing is drafted


class SuffixStates:
    """The states of a suffix automaton over texts that grow token by token.

    A state is a class of substrings that end at the same places. Lists over the states:
    next[s]: token -> state of the string continued
    link[s]: state of the longest suffix that ends at more places (-1 for the root)
    longest[s]: tokens of the class's longest string
    operations: elementary steps so far (states made or passed, transitions written or copied)
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.longest = [-1], [0]
        self.operations = 0

    def _append(self, last: int, token: int) -> int:
        """The state of the whole text of state `last` and then `token`: amortised O(1)."""
        if token in self.next[last]:  # as another text went on
            return self._string(last, token)
        new = self._add({}, ROOT, self.longest[last] + 1)
        self._made(None)
        state = last
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
            self.operations += 1
        if state >= 0:
            self.link[new] = self._string(state, token)
        return new

    def _add(self, following: dict[int, int], link: int, longest: int) -> int:
        self.next.append(following)
        self.link.append(link)
        self.longest.append(longest)
        self.operations += 1 + len(following)
        return len(self.next) - 1

    def _made(self, source: int | None) -> None:
        """A state was made, a new one or one split off from `source`: note what is kept of it."""
        raise NotImplementedError

    def _string(self, state: int, token: int) -> int:
        """The state whose longest string is that of `state` and then `token`, which occurred."""
        target = self.next[state][token]
        longest = self.longest[state] + 1
        self.operations += 1
        if self.longest[target] == longest:
            return target
        # The longer strings of the class have not just occurred once more: split them off.
        clone = self._add(self.next[target].copy(), self.link[target], longest)
        self._made(target)
        self.link[target] = clone
        while state >= 0 and self.next[state].get(token) == target:
            self.next[state][token] = clone
            state = self.link[state]
            self.operations += 1
        return clone


class SuffixAutomaton(SuffixStates):
    """All substrings of one text.

    recent[s]: of a state, the position behind an occurrence, the most recent one that was noted

    refresh_links: an occurrence is noted for this many suffixes of the text that occurred before,
        the longest ones first. Noting it for all makes `recent` exact at the price of a walk that
        is quadratic on runs; with fewer, a shorter suffix may show an older occurrence, which is
        an occurrence all the same. None means all. Measured as in `SuffixDrafter`: 0, 1, 2, 4,
        all give 1.837, 1.901, 1.906, 1.903, 1.903 and 2.432, 2.509, 2.520, 2.520, 2.520.
    """

    def __init__(self, tokens: Iterable[int] = (), refresh_links: int | None = 4):
        super().__init__()
        self.text: list[int] = []
        self.recent = [0]
        self.refresh_links = refresh_links
        self._last = ROOT  # the state of the whole text
        #: position behind the earlier occurrence of the text's longest repeated suffix, and the
        #: suffix's tokens; (0, 0) if no suffix occurred before
        self.match = (0, 0)
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        """Append a token: amortised O(1).

        The suffixes of the new text that end nowhere else make up its own state, so the longest
        one that occurred before is its link's longest string: the match needs no search.
        """
        self.text.append(token)
        self._last = self._append(self._last, token)
        found = self.link[self._last]
        self.match = (self.recent[found], self.longest[found])
        self._note(found, len(self.text))

    def _made(self, source: int | None) -> None:
        self.recent.append(len(self.text) if source is None else self.recent[source])

    def _note(self, state: int, place: int) -> None:
        left = len(self.next) if self.refresh_links is None else self.refresh_links
        while state != ROOT and left:
            self.recent[state] = place
            state, left = self.link[state], left - 1
            self.operations += 1

    def continuation(self, n: int) -> list[int]:
        """n tokens that followed the match, [] without one. What lies behind the text's end is
        the copy itself: ... a b a b gives a b a b a."""
        place, length = self.match
        if not length:
            return []
        period = len(self.text) - place
        return [self.text[place + i % period] for i in range(n)]


class ReferenceTexts:
    """An automaton over given texts, with the most frequent continuation; never written again, so
    that any number of rows and drafters can share it.

    texts: token ids of each. About 0.6 kB of memory per token.
    Raises InputError for a negative id.
    """

    def __init__(self, texts: Iterable[Sequence[int]]):
        self.automaton = SuffixAutomaton(refresh_links=0)
        for i, text in enumerate(texts):
            for token in text:
                if token < 0:
                    raise InputError(f"suffix: reference text {i} has the token id {token}")
                self.automaton.extend(int(token))
            self.automaton.extend(_END)
        count = self._occurrences()
        #: per state, the token that most often followed (the smaller id at equal counts), or _END
        self.best = [_most_frequent(following, count) for following in self.automaton.next]

    def _occurrences(self) -> list[int]:
        """How often the strings of each state occur: the prefixes that they are a suffix of."""
        sam = self.automaton
        count = [0] * len(sam.next)
        state = ROOT
        for token in sam.text:
            state = sam.next[state][token]
            count[state] = 1
        for state in sorted(range(1, len(count)), key=sam.longest.__getitem__, reverse=True):
            count[sam.link[state]] += count[state]
        return count

    def continuation(self, state: int, n: int) -> list[int]:
        """At most n tokens after the strings of a state, each the most frequent one after all
        before it; fewer where only ends of texts follow."""
        tokens: list[int] = []
        while len(tokens) < n and self.best[state] != _END:
            tokens.append(self.best[state])
            state = self.automaton.next[state][tokens[-1]]
        return tokens


def _most_frequent(following: dict[int, int], count: list[int]) -> int:
    """The token whose state occurs most often, _END if there is none."""
    tokens = (token for token in following if token != _END)
    return max(tokens, key=lambda token: (count[following[token]], -token), default=_END)


class Cursor:
    """The longest suffix of a row's text that occurs in the reference texts, carried along.

    state, length: its state there and its tokens; operations: elementary steps so far
    """

    def __init__(self, automaton: SuffixAutomaton):
        self.automaton, self.state, self.length, self.operations = automaton, ROOT, 0, 0

    def advance(self, token: int) -> None:
        """The text went on with `token`: amortised O(1), a match shrinks by what it grew."""
        sam = self.automaton
        self.operations += 1
        while self.state != ROOT and token not in sam.next[self.state]:
            self.state = sam.link[self.state]
            self.length = sam.longest[self.state]
            self.operations += 1
        if token in sam.next[self.state]:
            self.state, self.length = sam.next[self.state][token], self.length + 1


class _Row:
    """One row's text so far, in its own automaton and as a place in the reference texts."""

    def __init__(self, reference: ReferenceTexts | None):
        self.own = SuffixAutomaton()
        self.reference = reference
        self.cursor = Cursor(reference.automaton) if reference else None

    def feed(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.own.extend(token)
            if self.cursor:
                self.cursor.advance(token)

    def draft(self, min_match: int, factor: float, depth: int) -> tuple[list[int], int, float]:
        """Tokens, match length and source."""

        def budget(length: int) -> int:
            return max(1, int(min(depth, factor * length))) if length >= min_match else 0

        own = self.own.match[1]
        if self.cursor and self.cursor.length > own:
            length = self.cursor.length
            tokens = self.reference.continuation(self.cursor.state, budget(length))
            if tokens:  # none where the match is the end of its text
                return tokens, length, REFERENCE
        return self.own.continuation(budget(own)), own, OWN_TEXT


class SuffixDrafter(Drafter):
    """One chain: the continuation of the longest match, in the row's own text or, where that one is
    longer, in reference texts.

    depth: K, tokens drafted at most
    min_match: tokens; nothing is drafted after a shorter match
    factor: tokens drafted per token matched: min(depth, max(1, floor(factor * match)))
    reference: texts to draft from beside the row's own, built once and shared
    Defaults from greedy answers of gsm-stories-6m to 60 gsm8k and 60 tinystories prompts (tokens
    per step / nodes verified per step, depth 10): min_match 1, 2, 3 give 1.90/3.1, 1.72/2.4,
    1.62/2.1 and 2.52/3.7, 2.33/3.1, 2.15/2.7; factor 1, 2, 4 give 1.80/2.4, 1.90/3.1, 1.95/4.0
    and 2.37/3.0, 2.52/3.7, 2.60/4.6. The leftmost occurrence: 1.84 and 2.43.
    """

    one_path = True
    feature_names = ("source", *CHAIN_FEATURES)
    early_features = True
    sees_noise = "own"

    def __init__(
        self,
        depth: int = 10,
        min_match: int = 1,
        factor: float = 2.0,
        reference: ReferenceTexts | None = None,
    ):
        if depth < 1 or min_match < 1 or not factor > 0:
            raise InputError(
                f"suffix: depth {depth}, min_match {min_match} and factor {factor} must be positive"
            )
        self.max_depth, self.max_nodes = depth, 1 + depth
        self.min_match, self.factor, self.reference = min_match, factor, reference

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.rows = [_Row(self.reference) for _ in range(len(seqs.ids))]
        prompts = zip(self.rows, seqs.ids.tolist(), seqs.prompt_length.tolist(), strict=True)
        for row, ids, length in prompts:
            row.feed(ids[:length])

    def observe(self, truth: Truth) -> None:
        for row, tokens in zip(self.rows, truth.rows(), strict=True):
            row.feed(tokens)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "min_match": self.min_match, "factor": self.factor,
            "reference": self.reference is not None,
        }  # fmt: skip

    def start(self) -> None:
        live = self.seqs.live_rows()
        drafts = [
            row.draft(self.min_match, self.factor, self.max_depth) if on else ([], 0, 0.0)
            for row, on in zip(self.rows, live, strict=True)
        ]
        self.lengths = [len(tokens) for tokens, _, _ in drafts]
        padded = [tokens + [0] * (self.max_depth - len(tokens)) for tokens, _, _ in drafts]
        device = self.seqs.ids.device
        self.tokens = torch.tensor(padded, device=device)  # (B, K)
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        self.valid = torch.arange(self.max_depth, device=device) < lengths
        told = [[float(matched), source] for _, matched, source in drafts]
        self.matched, self.source = torch.tensor(told, device=device).unbind(1)  # (B,) each
        self.level, self._features = 0, {}

    def extend(self, level: int) -> None:
        self.level = level

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        """Where the match is (1 own text, 2 reference texts), and `CHAIN_FEATURES`; all 0 where
        nothing can be drafted at the level to come."""
        names = self.feature_names if names is None else tuple(names)
        if names not in self._features:
            self._features[names] = chain_features(
                self.tokens, self.valid, self.matched, self.seqs.noise, names, source=self.source
            )
        return self._features[names][:, self.level]

    def tree(self) -> TokenTree:
        longest = min(max(self.lengths), self.level)
        valid = self.valid[:, : self.level]
        return chain_tree(
            self.seqs.root, self.tokens, valid, longest, self.matched, self.seqs.noise
        )
