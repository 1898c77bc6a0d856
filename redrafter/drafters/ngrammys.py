"""The N-Grammys: rows of guesses from the row's own text and from tables of the target's n-grams.

Stewart et al. 2024 (arXiv 2411.03786) verify k rows of w guesses as a batch. Here the same rows are
merged to one tree, which accepts the same tokens with fewer nodes and one copy of the keys and
values; `evaluation/rows.py` is the k-row reference. The sources of rows, in this order:
1. context: what followed earlier occurrences of the last q tokens, the most frequent continuation
   first, of equally frequent ones the most recent; none runs past the end of the text
2. bigram: the r-th most probable successor of the last token, then again and again the most
   probable successor of what stands last
3. unigram: the r-th token of a ranking without context, then as 2

What the paper leaves open is an option. How rows are shared out, which rows count as equal, and
that unigram rows go on by bigrams: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.decode.tree import bucket
from redrafter.drafters.bigram import BigramTable
from redrafter.drafters.features import columns
from redrafter.files import digest_weights

SOURCES = ("context", "bigram", "unigram")
#: the feature `source`: 1 + place in SOURCES, 0 where nothing is drafted
CONTEXT, BIGRAM, UNIGRAM = 1, 2, 3
Found = tuple[tuple[int, ...], int, int]  # a row's tokens, its source, occurrences (context)


class ContextIndex:
    """What followed each q-gram of a text that grows token by token.

    q: tokens of a query; w: tokens of a continuation. A token costs O(q + w), a query as much as
    there are distinct continuations of its q-gram, the text's length plays no part.
    """

    def __init__(self, q: int, w: int):
        self.q, self.w = q, w
        self.text: list[int] = []
        #: q-gram -> {the w tokens behind it: (occurrences, place of the most recent one)}
        self.after: dict[tuple[int, ...], dict[tuple[int, ...], tuple[int, int]]] = {}

    def extend(self, token: int) -> None:
        self.text.append(token)
        place = len(self.text) - self.w  # whose w tokens are now complete
        if place >= self.q:
            known = self.after.setdefault(self._query(place), {})
            row = tuple(self.text[place:])
            known[row] = known.get(row, (0, 0))[0] + 1, place

    def _query(self, place: int) -> tuple[int, ...]:
        return tuple(self.text[place - self.q : place])

    def candidates(self) -> list[tuple[tuple[int, ...], int]]:
        """Distinct continuations of the text, the best first, with their occurrences. Those that
        the text's end cuts short are shorter than w."""
        end = len(self.text)
        if end < self.q:
            return []
        query = self._query(end)
        found = dict(self.after.get(query, {}))
        for place in range(max(self.q, end - self.w + 1), end):
            if self._query(place) == query:
                found[tuple(self.text[place:])] = 1, place  # distinct: no two are of one length
        best = sorted(found.items(), key=lambda item: item[1], reverse=True)
        return [(row, occurrences) for row, (occurrences, _) in best]


def share_out(
    found: Sequence[Sequence[Found]],
    k: int,
    allocation: Sequence[int],
    spill: Sequence[int],
    by_first: bool,
) -> list[Found]:
    """At most k rows: each source's share in turn, then what is missing in the order of `spill`.

    found: candidates per source, the best first; a row that an earlier one makes useless counts for
    no share: by_first: one that begins with the same token, else one that is its beginning
    """
    rows: list[Found] = []
    firsts: set[int] = set()
    place = [0] * len(found)

    def take(source: int, n: int) -> None:
        while n > 0 and len(rows) < k and place[source] < len(found[source]):
            row = found[source][place[source]]
            place[source] += 1
            tokens = row[0]
            same = tokens[0] in firsts
            if same and not by_first:
                same = any(other[: len(tokens)] == tokens for other, _, _ in rows)
            if not same:
                rows.append(row)
                firsts.add(tokens[0])
                n -= 1

    for source, n in enumerate(allocation):
        take(source, n)
    for source in spill:
        take(source, k)
    return rows


def merge(rows: Iterable[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Rows below one root as a trie: token, parent and depth of its nodes; node 0 is the root,
    its token 0. The first row is the nodes 1, 2, ...; a parent stands before its children."""
    tokens, parent, depth = [0], [0], [0]
    child: dict[tuple[int, int], int] = {}
    for row in rows:
        at = 0
        for level, token in enumerate(row, start=1):
            node = child.setdefault((at, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parent.append(at)
                depth.append(level)
            at = node
    return tokens, parent, depth


class NGrammys(Drafter):
    """k rows of w guesses, merged to one tree.

    table: probed (data/probe.py) or counted bigrams, with or without a unigram
    k: rows; w: guesses per row
    query: q, tokens that an earlier occurrence must share with the end of the text
    allocation: rows that (context, bigram, unigram) may take at first; None is (k, 0, 0)
    spill: sources that fill the rows then left over, one after the other; those without candidates
        give none, and k rows need not come together
    dedupe: `row` leaves out a row that is the beginning of an earlier one; `first` also one that
        has its first token in common with an earlier one
    seeded: when sampling, choose among a token's successors by log p / temperature + the
        verifier's noise, which is how the target will
    device: the target's

    Defaults from greedy answers of gsm-stories-6m to 20 gsm8k and 20 tinystories prompts, a probed
    table (tokens per step at w = 4, k = 5 and 10): as they are 2.58 2.78 and 3.06 3.26; dedupe
    `first` 2.52 2.71 and 2.99 3.16; query 2 2.45 2.64 and 2.92 3.13; allocation (k/2, k/2, 0) 2.53
    2.76 and 3.04 3.25. Context alone (dedupe `first`) 2.03 2.04 and 2.39 2.39, bigrams alone 1.59
    1.75 and 1.76 1.99, unigrams alone 1.14 1.30 and 1.34 1.39.
    Raises InputError naming what does not fit.
    """

    feature_names = ("source", "occurrences", "rows")
    early_features = True

    def __init__(
        self,
        table: BigramTable,
        k: int = 10,
        w: int = 4,
        *,
        query: int = 1,
        allocation: tuple[int, int, int] | None = None,
        spill: Sequence[str] = ("bigram", "unigram"),
        dedupe: Literal["first", "row"] = "row",
        seeded: bool = True,
        device: torch.device | str = "cpu",
    ):
        if k < 1 or w < 1 or query < 1:
            raise InputError(f"ngrammys: k {k}, w {w} and query {query} must be positive")
        allocation = (k, 0, 0) if allocation is None else tuple(allocation)
        if len(allocation) != 3 or min(allocation) < 0 or sum(allocation) > k:
            raise InputError(
                f"ngrammys: allocation {allocation} must be rows of {', '.join(SOURCES)}, none "
                f"below 0 and together at most k = {k}"
            )
        if not set(spill) <= set(SOURCES) or len(set(spill)) < len(spill):
            raise InputError(f"ngrammys: spill {tuple(spill)} must be of {SOURCES}, each once")
        if not sum(allocation) and not spill:
            raise InputError("ngrammys: allocation and spill leave no source to draft from")
        if allocation[2] and table.unigram is None:
            raise InputError(
                f"ngrammys: allocation {allocation} needs a unigram, which the table lacks: probe "
                "one with data/probe.py, or give these rows to another source"
            )
        if dedupe not in ("first", "row"):
            raise InputError(f"ngrammys: dedupe {dedupe!r} is neither first nor row")
        self.k, self.w, self.query, self.seeded = k, w, query, seeded
        self.allocation = allocation
        self.spill = [SOURCES.index(name) for name in spill]
        self.by_first = dedupe == "first"
        used = [n > 0 or place in self.spill for place, n in enumerate(allocation)]
        self.max_depth, self.max_nodes = w, 1 + k * w
        self.next_tokens = table.tokens.to(device)
        self.next_log_p = table.log_p.to(device)
        # k rows before it can make useless at most k candidates of a source.
        self.n_bigram = min(2 * k, table.width) if used[1] else 0
        ranked = table.unigram if used[2] and table.unigram is not None else table.tokens[0, :0]
        self.unigram = ranked[: 3 * k].to(device)
        self.reads_text = used[0]

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.index = [ContextIndex(self.query, self.w) for _ in range(len(seqs.ids))]
        prompts = zip(seqs.ids.tolist(), seqs.prompt_length.tolist(), strict=True)
        self._feed([ids[:length] for ids, length in prompts])

    def identity(self) -> dict[str, Any]:
        table = [("tokens", self.next_tokens), ("log_p", self.next_log_p),
                 ("unigram", self.unigram)]  # fmt: skip
        return super().identity() | {
            "k": self.k, "query": self.query, "allocation": list(self.allocation),
            "spill": self.spill, "by_first": self.by_first, "seeded": self.seeded,
            "table": digest_weights(table),
        }  # fmt: skip

    def observe(self, truth: Truth) -> None:
        self._feed(truth.rows())

    def _feed(self, rows: list[list[int]]) -> None:
        if self.reads_text:
            for index, tokens in zip(self.index, rows, strict=True):
                for token in tokens:
                    index.extend(token)

    def start(self) -> None:
        """Drafts all rows at once; a second read of the host per step, of the tables' rows."""
        tokens, known = self._table_rows()
        packed = torch.cat([self.seqs.live[:, None], known], 1).tolist()
        self.drafts: list[list[Found]] = []
        for index, (live, *lengths), rows in zip(self.index, packed, tokens.tolist(), strict=True):
            if not live:
                self.drafts.append([])
                continue
            context = [(row, CONTEXT, n) for row, n in index.candidates()]
            cut = [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
            bigram = [(row, BIGRAM, 0) for row in cut[: self.n_bigram] if row]
            unigram = [(row, UNIGRAM, 0) for row in cut[self.n_bigram :] if row]
            found = context, bigram, unigram
            self.drafts.append(share_out(found, self.k, self.allocation, self.spill, self.by_first))
        self.level = 0

    def _table_rows(self) -> tuple[Tensor, Tensor]:
        """All rows that the tables give: (B, R, w) tokens, bigrams first, and (B, R) how many of
        each are known."""
        root = self.seqs.root
        first, log_p = self._successors(root[:, None], 1)  # (B, 1, width)
        first, log_p = first[:, 0, : self.n_bigram], log_p[:, 0, : self.n_bigram]
        unigram = self.unigram.expand(len(root), -1)
        level = torch.cat([first, unigram], 1)
        known = torch.cat([log_p > float("-inf"), torch.ones_like(unigram, dtype=torch.bool)], 1)
        levels, lengths = [level], known.long()
        for depth in range(2, self.w + 1):
            following, log_p = self._successors(level, depth)  # (B, R, ...)
            level = following[..., 0]
            known = known & (log_p[..., 0] > float("-inf"))
            lengths = lengths + known
            levels.append(level)
        return torch.stack(levels, -1), lengths

    def _successors(self, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """What follows tokens (B, R) at a depth, in the order to draft it: ids and scores, both
        (B, R, width); -inf where nothing is known."""
        noise = self.seqs.noise if self.seeded else None
        following, log_p = self.next_tokens[tokens], self.next_log_p[tokens]
        if noise is None:
            return following, log_p
        drawn = noise[:, depth - 1].gather(1, following.flatten(1)).view_as(following)
        score = log_p / self.seqs.temperature + drawn.to(log_p.dtype)
        score, order = score.sort(dim=-1, descending=True, stable=True)
        return following.gather(-1, order), score

    def extend(self, level: int) -> None:
        self.level = level

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        """Of the level to come (all are known from the start): source of the best row that reaches
        it (1 context, 2 bigram, 3 unigram, 0 none), its occurrences in the text (context, else 0),
        rows that reach it."""
        level = self.level + 1
        told = []
        for draft in self.drafts:
            reach = [(source, n) for row, source, n in draft if len(row) >= level]
            told.append([*reach[0], len(reach)] if reach else [0, 0, 0])
        found = torch.tensor(told, dtype=torch.float32, device=self.seqs.ids.device)
        return columns(found, self.feature_names, names)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows as they are, to the drafted level: tokens (B, k, w) int64 and which of them are
        real (B, k, w) bool. A batch of k rows verifies what the tree does."""
        tokens = torch.zeros(len(self.drafts), self.k, self.w, dtype=torch.long)
        valid = torch.zeros_like(tokens, dtype=torch.bool)
        for b, draft in enumerate(self.drafts):
            for r, (row, _, _) in enumerate(draft):
                n = min(len(row), self.level)
                tokens[b, r, :n] = torch.tensor(row[:n])
                valid[b, r, :n] = True
        device = self.seqs.ids.device
        return tokens.to(device), valid.to(device)

    def tree(self) -> TokenTree:
        """The rows of each sequence as a trie, padded to a common usual size."""
        tries = [merge(row[: self.level] for row, _, _ in draft) for draft in self.drafts]
        size = max(len(tokens) for tokens, _, _ in tries)
        n = min(bucket(size), self.max_nodes)
        padded = [
            [x + [0] * (n - len(x)) for x in trie] + [[1] * len(trie[0]) + [0] * (n - len(trie[0]))]
            for trie in tries
        ]
        tokens, parent, depth, valid = torch.tensor(padded, device=self.seqs.ids.device).unbind(1)
        tokens[:, 0] = self.seqs.root
        return TokenTree(tokens, parent, depth, valid.bool())
