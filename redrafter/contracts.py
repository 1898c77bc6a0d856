"""The nouns that every other part is written against. Nothing of ours is imported here.

`RowState` is what the decoding loop shares with a drafter; `TokenTree` is what a drafter hands
back; `Truth` is what it is told after each verification.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # a command that only explains itself, or refuses, must not wait for it
    import torch
    from torch import Tensor


class InputError(ValueError):
    """Bad input from the user. The message names the file, key or value, and the remedy."""


@dataclass
class Draws:
    """How the children of a node were *drawn*, for verifiers that use acceptance ratios.

    The seeded rule tests membership and never reads this. A ratio rule needs every draw, in order
    and with repeats (two equal draws may share a node, never a round).

    order:  (B, N, R) int64, node of the r-th draw below each node, -1 where there is none. The
            draws of a node come first: behind a -1 there are only more
    mode:   `iid`: each from its own distribution, by itself; `without_replacement`: all from one
            distribution, each without those before it; `deterministic`: distinct, not drawn at all
    log_q:  (B, M, Q, Vd) log-probabilities that the draws below each of the first M nodes were made
            from, Q drafters' (one, but for SpecInfer's); the nodes behind them are leaves. None
            where `deterministic`
    source: (B, N, R) int64, which of the Q each draw was made from; None where Q = 1
    ids:    (Vd,) int64, the tokens that the columns of `log_q` are, all others having no
            probability; None: Vd = V
    """

    order: Tensor
    mode: Literal["iid", "without_replacement", "deterministic"]
    log_q: Tensor | None = None
    source: Tensor | None = None
    ids: Tensor | None = None

    def q(self, row: Any, node: Any, vocab_size: int) -> Tensor:
        """(..., Q, V) float64, what the draws below one of the first M nodes were made from.

        row, node: (...) int64, or a number each
        """
        drawn = self.log_q[row, node].double().exp()
        if self.ids is None:
            return drawn
        return drawn.new_zeros((*drawn.shape[:-1], vocab_size)).index_copy_(-1, self.ids, drawn)


@dataclass
class TokenTree:
    """A tree of guesses per row. A parent's index is smaller than its children's.

    tokens: (B, N) int64; node 0 is the last emitted, not yet cached token
    parent: (B, N) int64, index of the parent; the root is its own parent
    depth:  (B, N) int64, 0 for the root
    valid:  (B, N) bool; an invalid node is padding and is never accepted. All children of an
            invalid node are invalid
    log_q:  (B, N) float or None, the drafter's cumulative log-score of each node (root 0), for
            pruning and reports only: exactness never depends on it
    draws:  only where the tree was sampled for a ratio rule
    """

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    valid: Tensor
    log_q: Tensor | None = None
    draws: Draws | None = None

    @property
    def n_nodes(self) -> int:
        return self.tokens.shape[1]


@dataclass
class RowState:
    """What is known of every row of the batch; owned by the loop, read by drafters.

    ids:      (B, M) int64, prompt + emitted tokens, left-aligned; content past `length` is stale
    length:   (B,) int64, tokens known (L), the root included; the cache holds L - 1 of them
    prompt_length: (B,) int64
    live:     (B,) bool, rows still generating
    noise:    (B, K+1, V) float, the Gumbel noise of this step: row k belongs to the token at
              absolute position L + k, that is to the nodes of depth k + 1. None when greedy. A
              drafter may propose with it, and must not write to it.
    temperature: what the target's logits are divided by (1.0 when greedy)
    seeds:    (B,) int64, every row's seed; None when greedy. For a drafter that draws by itself:
              see `noise.private_uniform`
    cache:    the target's keys and values (a `RowCache`), for a drafter that borrows it: it may
              write behind the committed part, and puts `lengths` back before its tree is verified
    alive:    `live` on the host, where the loop has told it; see `live_rows`
    lengths:  `length` on the host, likewise; see `known_lengths`
    """

    ids: Tensor
    length: Tensor
    prompt_length: Tensor
    live: Tensor
    noise: Tensor | None = None
    temperature: float = 1.0
    seeds: Tensor | None = None
    cache: Any = None
    alive: list[bool] | None = None
    lengths: list[int] | None = None

    def live_rows(self) -> list[bool]:
        """`live` on the host; reads it only where the loop has not told it (`alive`)."""
        return self.live.tolist() if self.alive is None else self.alive

    def known_lengths(self) -> list[int]:
        """`length` on the host; reads it only where the loop has not told it (`lengths`)."""
        return self.length.tolist() if self.lengths is None else self.lengths

    @property
    def root(self) -> Tensor:
        """(B,) int64, the last known token of every row."""
        return self.ids.gather(1, self.length[:, None] - 1)[:, 0]


@dataclass
class Truth:
    """What one target forward established, handed to the drafter and the lookahead.

    tokens: (B, K+1) int64, the tokens emitted by this step, in order; the last of the first
            `count` ones is the new root
    count:  (B,) int64, how many of them are real (1..K+1); 0 for a row that is not live
    hidden: (B, K+1, H) or None, hidden state (the tensor that feeds lm_head) whose logits
            produced each of `tokens`; None if neither's `needs` has "hidden"
    logits: (B, K+1, V) or None, the raw target logits that produced them
    last_logits: (B, V) or None, those that produced the new root alone
    tree:   the tree that was verified, and
    tree_logits: (B, N, V), the raw target logits at all of its nodes, accepted or not; None if
            `needs` lacks "tree_logits", and after the prefill
    told:   the real ones of `tokens` on the host, where the loop has told them; see `rows`
    prompt_hidden: (B, T, H), of the prefill alone: the hidden states at all positions of the
            prompts, right-padded (the padding means nothing); None if `needs` lacks it
    After the prefill, K = 0: `tokens[:, 0]` is the first root, and the prompt itself stands in
    `RowState.ids`.
    """

    tokens: Tensor
    count: Tensor
    hidden: Tensor | None = None
    logits: Tensor | None = None
    tree: TokenTree | None = None
    tree_logits: Tensor | None = None
    last_logits: Tensor | None = None
    told: list[list[int]] | None = None
    prompt_hidden: Tensor | None = None

    def rows(self) -> list[list[int]]:
        """Per row the real ones of `tokens`, on the host; reads them only where the loop, which
        knows them, has not told them (`told`)."""
        if self.told is None:
            found = zip(self.tokens.tolist(), self.count.tolist(), strict=True)
            self.told = [tokens[:count] for tokens, count in found]
        return self.told

    def last_hidden(self) -> Tensor:
        """(B, H): the hidden state that produced the new root."""
        last = (self.count - 1).clamp(min=0)[:, None, None]
        return self.hidden.gather(1, last.expand(-1, -1, self.hidden.shape[-1]))[:, 0]


class Drafter(ABC):
    """Who proposes. One object serves one generation at a time; `begin` resets it.

    The loop calls, per generation `begin`, `observe` (prefill), and then per step
    `start`, `extend` once per level, `tree`, `observe`. A step for which the lookahead plans no
    level goes by without the first three; `observe` then sees the bare root as the tree. See
    `drafters/dummy.py` for the shortest complete one.
    """

    #: what `observe` must carry: any of "hidden", "logits", "tree_logits", "prompt_hidden"
    needs: frozenset[str] = frozenset()
    #: the most levels `extend` may be called for in one step (K)
    max_depth: int = 0
    #: the most nodes `tree` returns (N), the root counted
    max_nodes: int = 1
    #: whether it writes to the target's cache (`RowState.cache`) while drafting: two such drafters
    #: cannot draft at the same time
    borrows_cache: bool = False
    #: whether its trees never branch: node i is at depth i, and what is invalid comes last. Of all
    #: others only the best path is verified where the target takes chains alone
    one_path: bool = False
    #: whether all of its drafts cost alike; not where it chooses among drafters step by step
    drafts_alike: bool = True
    #: names of the columns of `features`
    feature_names: tuple[str, ...] = ()
    #: whether `features` say something of the first level before it is drafted, for nothing: the
    #: lookahead's `go_on` is then asked at level 0 too
    early_features: bool = False
    #: what of the verifier's noise its guesses and features depend on: "all"; "own", that of the
    #: guessed tokens alone; "none"
    sees_noise: Literal["all", "own", "none"] = "all"

    def watch(self, prefill: bool) -> AbstractContextManager:
        """Entered around each of the target's own forwards, the prefill (before `begin`) and the
        verifications, by a drafter that looks inside of them."""
        return nullcontext()

    def begin(self, seqs: RowState) -> None:
        """A new generation starts; `seqs` stays the same object to its end."""
        self.seqs = seqs

    @abstractmethod
    def start(self) -> None:
        """Begin the tree of this step at the root `seqs.root`."""

    @abstractmethod
    def extend(self, level: int) -> None:
        """Draft level `level` (1, 2, ...)."""

    def features(self, names: Sequence[str] | None = None) -> Tensor | None:
        """(B, F) float, finite: what there is to say of the level just drafted, and of a drafter
        with `early_features`, of the level to come; None if nothing. Called for a lookahead that
        decides level by level, so it may cost something. names: the columns wanted, of
        `feature_names`; None: all"""
        return None

    @abstractmethod
    def tree(self) -> TokenTree:
        """The tree of all levels drafted in this step."""

    def observe(self, truth: Truth) -> None:  # noqa: B027 - most table drafters need nothing
        """Learn what the target said."""

    def identity(self) -> dict[str, Any]:
        """What a lookahead that was trained for this drafter depends on, JSON-able: weights by
        their fingerprint, and options. What only changes how much is drafted is left out."""
        return {"kind": type(self).__name__, "levels": self.max_depth}

    def report(self) -> dict[str, Any]:
        """What there is to say of the generation that just ended, JSON-able; it becomes
        `Generation.extra["drafter"]`."""
        return {}


class Lookahead:
    """Decides how many levels a row drafts: before the step by `plan`, or after each level by
    `go_on`, or both. One object serves one generation at a time, for one drafter."""

    #: what `observe` must carry of the truth: "hidden", "logits", "last_logits"
    needs: frozenset[str] = frozenset()
    #: whether it decides level by level; False: `go_on` is never asked
    level_by_level: bool = True
    #: the drafter's features that `go_on` is given, in this order; None: all
    reads: Sequence[str] | None = None

    def speculates(self, device: torch.device) -> bool:
        """Whether it may ever draft in a generation on this device. Where it is known beforehand
        that it will not, the generation is plain decoding, and costs that."""
        return True

    def begin(self, seqs: RowState) -> None:
        """A new generation starts. What was learned in earlier ones may be kept."""

    def plan(self) -> Tensor | int | None:
        """Levels to draft at most in the step that begins: (B,) int64, or one number for all rows;
        None is no limit. Asked once per step; where no live row has any, nothing is drafted."""
        return None

    def go_on(self, features: Tensor | None, level: int) -> Tensor | bool:
        """Whether to draft another level. features: (B, F), the drafter's, after the level just
        drafted (0: none yet, asked of drafters with `early_features`). Returns (B,) bool, or one
        Python bool where the answer is the same for all rows and known without the features."""
        return True

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        """What became of a step, and what the target said. drafted, accepted: (B,) int64, levels
        that were verified and those of them accepted (before any stop); 0 and 0 for a row that
        drafted nothing or was not live, and after the prefill."""


@dataclass
class StepStats:
    """Counts of one generation, kept per row; rates are derived in `evaluation/`.

    steps:    (B,) target forwards that a live row took part in, the prefill not counted
    emitted:  (B,) tokens emitted by those steps (the prefill's own first token not counted,
              tokens past a stop not counted)
    drafted_at[k], accepted_at[k]: row-steps that drafted at least depth k+1; whose first k+1
              levels were all accepted (and emitted)
    matched_at[k]: the same, emitted or not: a stop may lie between them. Engines count these
    seconds:  host wall-clock by part: "prefill", "draft", "lookahead", "verify", "total"
    lengths:  (B,) lists, tokens that each step emitted, in order; empty where nobody drafts, a step
              then makes one
    """

    steps: list[int]
    emitted: list[int]
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    nodes_verified: int = 0
    forwards: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    lengths: list[list[int]] = field(default_factory=list)
    matched_at: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float | None:
        """tau, pooled over the rows; None before the first step."""
        steps = sum(self.steps)
        return sum(self.emitted) / steps if steps else None


@dataclass
class Generation:
    """What `plain` and `speculative` return.

    tokens: new token ids per row, prompt excluded; an EOS that ended the row is included
    finish: per row "eos", "stop_string", "criteria" or "length"; "not_finite" where the scores of
        the token to come were nan or infinite, or all -inf: `tokens` ends before it
    """

    tokens: list[list[int]]
    finish: list[str]
    stats: StepStats
    extra: dict[str, Any] = field(default_factory=dict)


def root_tree(root: Tensor) -> TokenTree:
    """The tree of K = 0. root: (B,) int64."""
    tokens = root[:, None]
    zeros = tokens.new_zeros(tokens.shape)
    return TokenTree(tokens, zeros, zeros, valid=zeros == 0)


class NoDraft(Drafter):
    """Every tree is its root: one token per step, as in plain decoding."""

    one_path = True

    def start(self) -> None:
        pass

    def extend(self, level: int) -> None:
        raise AssertionError("there are no levels")

    def tree(self) -> TokenTree:
        return root_tree(self.seqs.root)


class AllLevels(Lookahead):
    """Lets every level stand that the drafter can draft."""

    level_by_level = False
