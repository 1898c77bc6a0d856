"""Counted bigrams: after token a come the tokens that most often followed it in given texts.

Counted on the target's own answers this is a stronger baseline than a table probed from its
weights, and it costs next to nothing to draft with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from redrafter.contracts import Drafter, InputError, RowState, TokenTree
from redrafter.decode.tree import level_depths, level_start
from redrafter.drafters.features import TABLE_FEATURES, best_score
from redrafter.files import digest_weights, plain_values, write_tensors

FORMAT = 1
_METADATA = "redrafter_bigrams"
# New pairs are merged into the known ones when they are this many, and as many as those.
_MERGE_PAIRS = 1 << 20


@dataclass(frozen=True)
class BigramTable:
    """The most frequent successors of every token.

    tokens: (V, width) int64, most frequent first, the smaller id at equal counts; 0 where fewer
        successors were seen
    log_p: (V, width) float32, log of count / all successors counted; -inf where fewer were seen
    unigram: (n,) int64 or None, distinct tokens to try after any token, the best one first
    """

    tokens: Tensor
    log_p: Tensor
    unigram: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def n_seen(self) -> int:
        """Tokens with at least one successor."""
        return int((self.log_p[:, 0] > float("-inf")).sum())


class PairCounts:
    """How often each pair of tokens came, in memory for the distinct pairs however long the text.

    A pair (a, b) is the number a * V + b.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._pair = self._count = torch.zeros(0, dtype=torch.long)  # distinct and ascending
        self._new: list[tuple[Tensor, Tensor]] = []
        self._n_new = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """first, second: (S,) int64, ids below V; pair i is (first[i], second[i])."""
        pair, count = (first * self.vocab_size + second).unique(return_counts=True)
        if len(pair):
            self._new.append((pair, count))
            self._n_new += len(pair)
        # A merge sorts all pairs: rare enough for its cost to be that of a few sorts in total.
        if self._n_new >= max(len(self._pair), _MERGE_PAIRS):
            self._merge()

    def _merge(self) -> None:
        pair = torch.cat([self._pair, *(pair for pair, _ in self._new)])
        count = torch.cat([self._count, *(count for _, count in self._new)])
        self._pair, place = pair.unique(return_inverse=True)
        self._count = torch.zeros_like(self._pair).index_add_(0, place, count)
        self._new, self._n_new = [], 0

    def table(self, width: int) -> BigramTable:
        """Raises InputError where no pair was counted."""
        if width < 1:
            raise InputError(f"bigram: width {width} must be positive")
        self._merge()
        if not len(self._pair):
            raise InputError("bigram: no two successive tokens to count; give longer answers")
        # Two stable sorts: by count, then by first token; ids ascend from the merge.
        order = self._count.argsort(stable=True, descending=True)
        order = order[(self._pair[order] // self.vocab_size).argsort(stable=True)]
        pair, count = self._pair[order], self._count[order].double()
        first, second = pair // self.vocab_size, pair % self.vocab_size
        total = torch.zeros(self.vocab_size, dtype=torch.double).index_add_(0, first, count)
        # searchsorted gives the index where this first token's run begins
        rank = torch.arange(len(first)) - torch.searchsorted(first, first)
        kept = rank < width
        first, rank = first[kept], rank[kept]
        tokens = torch.zeros(self.vocab_size, width, dtype=torch.long)
        log_p = torch.full((self.vocab_size, width), float("-inf"))
        tokens[first, rank] = second[kept]
        log_p[first, rank] = (count[kept] / total[first]).log().float()
        return BigramTable(tokens, log_p)


def count_bigrams(rows: Iterable[Sequence[int]], vocab_size: int, width: int) -> BigramTable:
    """The `width` most frequent successors of every token.

    rows: token ids; pairs are counted within a row only
    Raises InputError for an id outside the vocabulary or no pair.
    """
    counts = PairCounts(vocab_size)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row, dtype=torch.long)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(f"bigram: row {i} has a token id outside the vocabulary {vocab_size}")
        counts.add(ids[:-1], ids[1:])
    return counts.table(width)


# ------------------------------------------------------------------------------------ on disk


def save_bigrams(path: str | Path, table: BigramTable, identity: dict[str, Any]) -> None:
    """One safetensors file, whole or absent.

    identity: JSON-able; what was counted, and `tokenizer` (digest) where it is known
    """
    about = {
        **identity, "format": FORMAT, "vocab_size": table.vocab_size, "width": table.width
    }  # fmt: skip
    tensors = {"tokens": table.tokens.contiguous(), "log_p": table.log_p.contiguous()}
    if table.unigram is not None:
        tensors["unigram"] = table.unigram.contiguous()
    write_tensors(path, tensors, {_METADATA: json.dumps(plain_values(about), sort_keys=True)})


def load_bigrams(path: str | Path, vocab_size: int) -> tuple[BigramTable, dict[str, Any]]:
    """What `save_bigrams` wrote: the table and its identity.

    vocab_size: V of the target that will be drafted for
    Raises InputError naming a file that is missing, damaged, something else or of another V.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: make it with data/bigrams.py")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            if not isinstance(about, dict):
                raise InputError(f"{path} is no table of bigrams: make one with data/bigrams.py")
            if about.get("format") != FORMAT:
                raise InputError(
                    f"{path} has bigram format {about.get('format')!r}, this version reads and "
                    f"writes {FORMAT}: make it anew with data/bigrams.py"
                )
            unigram = file.get_tensor("unigram") if "unigram" in file.keys() else None  # noqa: SIM118
            table = BigramTable(file.get_tensor("tokens"), file.get_tensor("log_p"), unigram)
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        message = f"{path} cannot be read ({error}): make it anew with data/bigrams.py"
        raise InputError(message) from None
    if about.get("vocab_size") != vocab_size:
        raise InputError(
            f"{path} was counted for a vocabulary of {about.get('vocab_size')} tokens, this "
            f"target has {vocab_size}: count on answers of this target"
        )
    _check_table(path, table, (vocab_size, about.get("width")))
    return table, about


def _check_table(path: str | Path, table: BigramTable, shape: tuple[int, Any]) -> None:
    """A wrong id would be looked up out of bounds, on an accelerator without a message."""
    whole = (
        table.tokens.shape == table.log_p.shape == shape
        and (table.tokens.dtype, table.log_p.dtype) == (torch.int64, torch.float32)
        and 0 <= int(table.tokens.min()) <= int(table.tokens.max()) < shape[0]
    )
    if table.unigram is not None:
        ids = table.unigram
        whole &= ids.dtype == torch.int64 and ids.dim() == 1 and len(ids) > 0
        whole = whole and 0 <= int(ids.min()) <= int(ids.max()) < shape[0]
    if not whole:
        raise InputError(f"{path} is damaged: make it anew with data/bigrams.py")


# ------------------------------------------------------------------------------------ drafting


class CountedBigrams(Drafter):
    """All-levels tree: each level keeps the `width` paths of highest cumulative log-probability.

    table: counted on the target's answers, best of all
    width: W, nodes per level and successors looked at per token; depth: K
    Raises InputError where the table has fewer successors per token.
    """

    feature_names = TABLE_FEATURES
    sees_noise = "none"

    def __init__(
        self,
        table: BigramTable,
        width: int = 4,
        depth: int = 4,
        device: torch.device | str = "cpu",
    ):
        if width < 1 or depth < 1:
            raise InputError(f"bigram: width {width} and depth {depth} must be positive")
        if width > table.width:
            raise InputError(
                f"bigram: width {width} needs as many successors per token, the table has "
                f"{table.width}: draft narrower, or count again with --width {width}"
            )
        self.next_tokens = table.tokens[:, :width].contiguous().to(device)
        self.next_log_p = table.log_p[:, :width].contiguous().to(device)
        self.width, self.max_depth, self.max_nodes = width, depth, 1 + width * depth
        self.one_path = width == 1

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self._zeros = torch.zeros_like(seqs.length)[:, None]

    def identity(self) -> dict[str, Any]:
        table = [("tokens", self.next_tokens), ("log_p", self.next_log_p)]
        return super().identity() | {"width": self.width, "table": digest_weights(table)}

    def start(self) -> None:
        self.tokens, self.parents = [self.seqs.root[:, None]], [self._zeros]
        self.log_q = [self._zeros.to(self.next_log_p.dtype)]

    def extend(self, level: int) -> None:
        frontier = self.tokens[-1]  # (B, w)
        total = self.log_q[-1][:, :, None] + self.next_log_p[frontier]  # (B, w, W)
        best, index = total.flatten(1).topk(self.width, dim=-1)
        self.tokens.append(self.next_tokens[frontier].flatten(1).gather(1, index))
        self.parents.append(level_start(level - 1, self.width) + index // self.width)
        self.log_q.append(best)

    def features(self, names: Sequence[str] | None = None) -> Tensor:
        return best_score(self.log_q, names)

    def tree(self) -> TokenTree:
        tokens, log_q = torch.cat(self.tokens, 1), torch.cat(self.log_q, 1)
        depth = level_depths(tokens.shape[1], self.width, tokens.device).expand_as(tokens)
        # A token without enough counted successors leaves nodes of probability 0.
        return TokenTree(tokens, torch.cat(self.parents, 1), depth, log_q > float("-inf"), log_q)
