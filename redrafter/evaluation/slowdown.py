"""Which rows are worth verifying: s(k, w, l) = T(k rows, w + 1 tokens, context l) / T(1, 1, l).

A forward costs the same for few tokens as for one while memory bounds it, and then rises; where it
does is a matter of k, w and the context (Stewart et al. 2024, arXiv 2411.03786). Beside the paper's
k rows stands one tree of the same guesses, 1 + k w nodes at most. With the tokens per step of an
N-Grammys drafter on known texts, that gives the best k and w of this device (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redrafter.contracts import InputError
from redrafter.costs import CostMeter, CostTable
from redrafter.drafters.bigram import BigramTable
from redrafter.drafters.ngrammys import NGrammys
from redrafter.evaluation.prompts import number_list
from redrafter.evaluation.report import table
from redrafter.evaluation.walk import walk
from redrafter.targets.model import Target


@dataclass(frozen=True)
class Slowdown:
    """T of the k rows of w + 1 tokens, and of the tree of 1 + k w, over T of one token."""

    k: int
    w: int
    context: int
    rows: float
    tree: float


@dataclass(frozen=True)
class Advice:
    """What k rows of w guesses bring at a context.

    tokens_per_step: walked over plain answers, the same for rows and tree
    nodes: of a tree, mean over the steps; draft_s: seconds of drafting per step
    rows_speedup, tree_speedup: over one forward per token, drafting counted
    """

    k: int
    w: int
    context: int
    tokens_per_step: float
    nodes: float
    draft_s: float
    rows_speedup: float
    tree_speedup: float


def parse_slowdown(text: str) -> tuple[list[int], list[int]]:
    """ "1,5,10x2,4" -> ([1, 5, 10], [2, 4]). Raises InputError."""
    parts = text.split("x")
    if len(parts) != 2:
        raise InputError(f"slowdown: {text!r} is not rows x lengths; write e.g. 1,5,10x2,4,8")
    ks, ws = (number_list("slowdown", part, int, 1) for part in parts)
    return sorted(ks), sorted(ws)


class SlowdownMeter:
    """Measures every k, w and context in turn, round after round.

    Both ways write into caches that are already filled. What the paper's k rows cost besides, to
    copy the winner's keys and values to all rows, is not measured.
    """

    def __init__(self, target: Target, ks: Sequence[int], ws: Sequence[int], contexts: list[int]):
        self.ks, self.ws, self.contexts = ks, ws, contexts
        nodes = {1, *(1 + k * w for k in ks for w in ws)}
        self._tree = CostMeter(target, new_tokens=sorted(nodes), contexts=contexts, batches=(1,))
        lengths = [w + 1 for w in ws]
        self._rows = CostMeter(target, new_tokens=lengths, contexts=contexts, batches=ks)
        self.tree: CostTable | None = None
        self.rows: CostTable | None = None

    def run(self, rounds: int) -> list[Slowdown]:
        while self._tree.rounds < rounds:
            self._tree.round()
            self._rows.round()
        self.tree, self.rows = self._tree.table(), self._rows.table()
        return [
            Slowdown(
                k, w, context,
                self.rows.t(w + 1, context, k) / self.tree.t(1, context, 1),
                self.tree.t(1 + k * w, context, 1) / self.tree.t(1, context, 1),
            )
            for context in self.contexts for k in self.ks for w in self.ws
        ]  # fmt: skip

    def advise(
        self,
        bigrams: BigramTable,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        max_new_tokens: int,
        device="cpu",
    ) -> list[Advice]:
        """After `run`: what each k and w of an N-Grammys drafter brings on these answers, greedy.

        Raises InputError where no answer has a second token.
        """
        found = []
        for k in self.ks:
            for w in self.ws:
                drafter = NGrammys(bigrams, k, w, device=device)
                stats = walk(drafter, prompts, answers, max_new_tokens, device)
                n = sum(stats.steps)
                if not n:
                    raise InputError("prompts: no answer has a second token; give other prompts")
                tau, nodes = stats.tokens_per_step, stats.nodes_verified / n
                draft_s = stats.seconds["draft"] / n
                for context in self.contexts:
                    one = self.tree.t(1, context, 1)
                    rows_s = self.rows.t(w + 1, context, k) + draft_s
                    tree_s = self.tree.t(nodes, context, 1) + draft_s
                    gains = tau * one / rows_s, tau * one / tree_s
                    found.append(Advice(k, w, context, tau, nodes, draft_s, *gains))
        return found


def best(advice: Sequence[Advice], context: int) -> tuple[Advice, Advice]:
    """The advice of highest speedup at a context, for rows and for the tree; the fewer guesses
    where two are equal."""
    here = sorted((a for a in advice if a.context == context), key=lambda a: (a.k * a.w, a.k))
    return max(here, key=lambda a: a.rows_speedup), max(here, key=lambda a: a.tree_speedup)


def show_slowdown(cells: Sequence[Slowdown]) -> str:
    """A table per context: a line per k, and per w the slowdown of the rows and of the tree."""
    shown = []
    for context in dict.fromkeys(cell.context for cell in cells):
        here = {(cell.k, cell.w): cell for cell in cells if cell.context == context}
        ks, ws = (list(dict.fromkeys(pair[i] for pair in here)) for i in (0, 1))
        columns = ["k", *(f"{kind} w={w}" for w in ws for kind in ("rows", "tree"))]
        lines = [
            [str(k), *(ratio for w in ws for ratio in (here[k, w].rows, here[k, w].tree))]
            for k in ks
        ]
        title = f"slowdown over one new token, context {context}"
        shown.append(f"{title}\n{table(columns, lines)}")
    return "\n\n".join(shown)


def show_advice(advice: Sequence[Advice]) -> str:
    """A line per k and w, then the recommended ones per context."""
    contexts = list(dict.fromkeys(a.context for a in advice))
    columns = ["k x w", "tokens/step", "nodes", "draft ms"]
    columns += [f"{kind} @{context}" for context in contexts for kind in ("rows", "tree")]
    by_size: dict[tuple[int, int], list[Advice]] = {}
    for a in advice:
        by_size.setdefault((a.k, a.w), []).append(a)
    lines = [
        [f"{k}x{w}", found[0].tokens_per_step, found[0].nodes, 1e3 * found[0].draft_s,
         *(gain for a in found for gain in (a.rows_speedup, a.tree_speedup))]
        for (k, w), found in by_size.items()
    ]  # fmt: skip
    shown = ["speedup over one forward per token, drafting counted", table(columns, lines)]
    for context in contexts:
        rows, tree = best(advice, context)
        shown.append(
            f"recommended at context {context}: rows {rows.k}x{rows.w} ({rows.rows_speedup:.2f}), "
            f"tree {tree.k}x{tree.w} ({tree.tree_speedup:.2f})"
        )
    return "\n".join(shown)
