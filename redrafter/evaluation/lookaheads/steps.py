"""Decoding step by step, counted: what was drafted, verified and accepted; and predictions, judged.

One row at a time, in passes that nobody times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import GenerationConfig

from redrafter.contracts import Drafter, InputError, Lookahead, RowState, Truth
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import bucket
from redrafter.drafters.compose import Wrapped
from redrafter.drafters.profile import StepCosts
from redrafter.drafting import Strategy, foreseen
from redrafter.evaluation.runs import PromptBatch
from redrafter.lookahead.wrapped import WrappedLookahead
from redrafter.records.policies import Policy, Records, Visit, no_prices, simulate
from redrafter.targets.model import Target


@dataclass
class Step:
    """One step of one row.

    position: tokens of the answer before it
    emitted: tokens of the answer that it added
    nodes: N of the verified tree, and of the target's forward; tokens: those that were drafted
    started: whether a draft was begun; levels: that were really drafted
    drafted, accepted: levels that were verified, and accepted (before any stop)
    """

    position: int
    emitted: int = 0
    nodes: int = 1
    tokens: int = 0
    started: bool = False
    levels: int = 0
    drafted: int = 0
    accepted: int = 0

    def cost_s(self, costs: StepCosts) -> float:
        """Seconds of its forward and of its draft."""
        draft = costs.start_s if self.started and not self.levels else costs.draft_s(self.levels)
        return draft + costs.verify_s(self.nodes)


class _Counted(Wrapped):
    """A drafter whose steps are counted; one row at a time."""

    def __init__(self, inner: Drafter):
        super().__init__(inner)
        self.steps: list[Step] = []
        self._now = Step(0)

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.steps = []
        self._now = Step(self._made())

    def _made(self) -> int:
        return int(self.seqs.length[0] - self.seqs.prompt_length[0])

    def start(self) -> None:
        self._now.started = True
        super().start()

    def extend(self, level: int) -> None:
        self._now.levels += 1
        super().extend(level)

    def observe(self, truth: Truth) -> None:
        super().observe(truth)
        if truth.tree is None:  # the prefill
            return
        now = self._now
        now.nodes, now.tokens = truth.tree.n_nodes, int(truth.tree.valid.sum()) - 1
        now.emitted = self._made() - now.position
        self.steps.append(now)
        self._now = Step(self._made())


class _Watched(WrappedLookahead):
    """A lookahead (None: to full depth), asked as ever; what became of a step is noted."""

    def __init__(self, inner: Lookahead | None, drafter: _Counted):
        super().__init__(inner)
        self.counted = drafter

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        if truth.tree is not None:
            step = self.counted.steps[-1]
            step.drafted, step.accepted = int(drafted), int(accepted)
        super().observe(drafted, accepted, truth)


class _Shadow(_Watched):
    """Drafts to full depth whatever the lookahead says, so that every prediction can be judged.

    It is asked just where it would have been asked, and told what it would have been told.
    judged: (level, P, whether that many levels were accepted), of its `log`
    """

    def __init__(self, inner: Lookahead, drafter: _Counted, max_new_tokens: int):
        super().__init__(inner, drafter)
        self.max_new_tokens = max_new_tokens
        self.judged: list[tuple[int, float, bool]] = []
        inner.log = []

    def plan(self) -> None:
        self.inner.log.clear()
        plan = self.inner.plan()
        depth = self.counted.max_depth
        self.cap = depth if plan is None else min(depth, int(plan))
        self.stopped = None if self.cap else 0

    def go_on(self, features: Tensor | None, level: int) -> bool:
        if self.stopped is None:
            going = level < self.cap and bool(self.inner.go_on(features, level))
            self.stopped = None if going else level
        return True

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        if truth.tree is None:
            return super().observe(drafted, accepted, truth)
        step = self.counted.steps[-1]
        step.drafted, step.accepted = int(drafted), int(accepted)
        room = self.max_new_tokens - step.position  # nothing is known of levels past the limit
        self.judged += [
            (level, float(p), step.accepted >= level)
            for level, p in self.inner.log
            if level <= room
        ]
        own = self.cap if self.stopped is None else self.stopped
        self.inner.observe(drafted.clamp(max=own), accepted.clamp(max=own), truth)


def count_steps(
    target: Target,
    make_strategy: Callable[[list[list[int]]], Strategy],
    config: GenerationConfig,
    batches: Sequence[PromptBatch],
) -> list[list[Step]]:
    """The steps of every batch, which is one row each. make_strategy: from `strategy_maker`, made
    for this"""
    found = []
    for batch in batches:
        drafter, _ = _decode(target, make_strategy, config, batch, _Watched)
        found.append(drafter.steps)
    return found


def simulated_steps(
    records: Records, drafter: Drafter, policy: Policy, looks: bool = False
) -> list[list[Step]]:
    """The steps of every text by a policy, from the records of the drafter: what `count_steps`
    counts, without decoding. looks: see `simulate`"""
    found: list[list[Step]] = [[] for _ in records.length]
    raw = records.nodes

    def visit(step: Visit) -> None:
        for row in step.live.nonzero()[:, 0].tolist():
            asked, nodes = int(step.asked[row]), int(step.nodes[row])
            # What the limit of tokens cuts off stays in the forward, as padding.
            size = int(raw[row, int(step.position[row]), asked])
            if drafter.early_features:  # copies come in trees of the usual sizes
                size = min(bucket(size), drafter.max_nodes)
            found[row].append(Step(
                1 + int(step.position[row]), int(step.emitted[row]), size, nodes - 1,
                bool(step.started[row]), asked, int(step.levels[row]), int(step.accepted[row]),
            ))  # fmt: skip

    simulate(records, policy, no_prices(records), looks=looks, visit=visit)
    return found


def plain_steps(answers: Sequence[Sequence[int]]) -> list[list[Step]]:
    """Those of `plain`, which drafts nothing: a token each, but for the prefill's own."""
    return [[Step(i, emitted=1) for i in range(1, len(answer))] for answer in answers]


def judge(
    target: Target,
    make_strategy: Callable[[list[list[int]]], Strategy],
    config: GenerationConfig,
    batches: Sequence[PromptBatch],
) -> list[tuple[int, float, bool]] | None:
    """What a lookahead that keeps a `log` of predictions predicted, and whether it was so: see
    `_Shadow`. None of one that keeps none."""
    if not hasattr(make_strategy(batches[0].texts).lookahead, "log"):
        return None
    judged = []
    for batch in batches:
        _, shadow = _decode(
            target, make_strategy, config, batch,
            lambda inner, drafter: _Shadow(inner, drafter, config.max_new_tokens),
        )  # fmt: skip
        judged += shadow.judged
        shadow.inner.log = None
    return judged


def _decode(target, make_strategy, config, batch, watched):
    """(drafter, lookahead) as they were watched on one batch."""
    if len(batch.prompts) != 1:
        raise InputError("lookaheads: steps are counted one row at a time")

    def run(strategy: Strategy) -> None:
        speculative(
            target, batch.prompts, config, seeds=batch.seeds,
            drafter=strategy.drafter, lookahead=strategy.lookahead, rule=strategy.rule,
        )  # fmt: skip

    strategy = make_strategy(batch.texts)
    strategy = foreseen(strategy, lambda lookahead: run(replace(strategy, lookahead=lookahead)))
    drafter = _Counted(strategy.drafter)
    lookahead = watched(strategy.lookahead, drafter)
    run(replace(strategy, drafter=drafter, lookahead=lookahead))
    return drafter, lookahead
