"""One of several drafters per step: the one that pays, learned while decoding.

What pays is tokens per second, so an arm's worth is the sum of the tokens that its steps emitted
over the sum of the seconds that they took (a mean of per-step rates would be biased). A step's
seconds run from its draft to the end of its verification as the host sees them, what an arm must
catch up on after being idle included. Which arm drafted has no influence on the text.

ucb    tries an arm again when its worth is uncertain: worth_i + c * scale * sqrt(ln t / n_i), with
       n_i the arm's own number of steps (BanditSpec, arXiv 2505.15141; its code divides by the
       total)
hedge  every arm drafts in every step, one is verified; once the text has outgrown a draft it is
       known what each arm would have brought (`hindsight.py`): exponential weights over the gains
       tokens_i - lambda * seconds_i, lambda being the tokens per second achieved (HedgeSpec,
       2510.20064, with the cost added). For arms whose drafts cost next to nothing.
Both forget: older steps count less, since a stream of prompts changes its domain. Ours.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from redrafter.contracts import Drafter, InputError, RowState, TokenTree, Truth
from redrafter.decode.tree import bucket
from redrafter.drafters.compose import Composite
from redrafter.drafters.hindsight import Past

POLICIES = ("ucb", "hedge")


class Arms:
    """Tokens, seconds and steps per arm, older ones counting less.

    memory_steps: after so many steps a step counts 1 / e
    """

    def __init__(self, n: int, memory_steps: float):
        self.keep = math.exp(-1 / memory_steps)
        self.tokens, self.seconds, self.steps = [0.0] * n, [0.0] * n, [0.0] * n

    def add(self, arm: int, tokens: float, seconds: float) -> None:
        for column in (self.tokens, self.seconds, self.steps):
            column[:] = [self.keep * x for x in column]
        self.tokens[arm] += tokens
        self.seconds[arm] += seconds
        self.steps[arm] += 1.0

    def worth(self, arm: int) -> float:
        """Tokens per second; infinite where the arm was never tried."""
        return self.tokens[arm] / self.seconds[arm] if self.seconds[arm] > 0 else math.inf

    def overall(self) -> float:
        """Tokens per second of all arms together, as they were chosen."""
        seconds = sum(self.seconds)
        return sum(self.tokens) / seconds if seconds > 0 else 0.0

    def ucb(self, exploration: float) -> int:
        """The arm of the highest upper bound."""
        total, scale = sum(self.steps), self.overall()

        def bound(arm: int) -> float:
            if self.steps[arm] < 1e-9:
                return math.inf
            spread = math.sqrt(math.log(1 + total) / self.steps[arm])
            return self.worth(arm) + exploration * scale * spread

        return max(range(len(self.steps)), key=bound)


class Selector(Composite):
    """Drafts with one of its members per step, for the whole batch.

    members: name -> drafter
    policy: "ucb" or "hedge"
    exploration: c of `ucb`, as a share of the speed achieved; 0.1 loses more by finding the best
        arm late than 0.3 by trying others (5.8 and 2.5 % of the time of the best of four arms,
        gsm-stories-6m, 120 prompts)
    eta: rate of `hedge`, per token
    memory_steps: see `Arms`
    clock: seconds, for tests
    What was learned is kept from generation to generation.
    """

    def __init__(
        self,
        members: Mapping[str, Drafter],
        policy: str = "ucb",
        exploration: float = 0.3,
        eta: float = 0.1,
        memory_steps: float = 400.0,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__("selector", members, together=policy == "hedge")
        if policy not in POLICIES:
            raise InputError(f"selector: policy {policy!r} is not one of {', '.join(POLICIES)}")
        if exploration < 0 or not eta > 0 or not memory_steps > 0:
            raise InputError(
                f"selector: exploration {exploration} must not be negative, eta {eta} and "
                f"memory_steps {memory_steps} must be positive"
            )
        self.policy, self.clock = policy, clock
        self.exploration, self.eta = exploration, eta
        self.drafts_alike = False
        self.arms = Arms(len(members), memory_steps)
        self._gain = [0.0] * len(members)
        #: of `hedge`: mean seconds of verifying a tree, by its bucket, and of an arm's draft
        self._verify_s: dict[int, float] = {}
        self._random = random.Random(seed)

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.chosen: list[int] = []
        self._past: list[tuple[list[Past], list[float]]] = []
        self._started: float | None = None

    def start(self) -> None:
        self._started, self._known = self.clock(), self.seqs.length
        if self.policy == "hedge":
            self._learn()
            arm = self._weighted()
        else:
            arm = self.arms.ucb(self.exploration)
        self.chosen.append(arm)
        self._members = list(self.members.values())
        self._drafting = self._members if self.policy == "hedge" else [self._members[arm]]
        self._own_s = [0.0] * len(self._drafting)
        for i, member in enumerate(self._drafting):
            self._timed(i, member.start)

    def _timed(self, i: int, call: Callable, *args: Any) -> Any:
        clock = self.clock()
        out = call(*args)
        self._own_s[i] += self.clock() - clock
        return out

    def extend(self, level: int) -> None:
        for i, member in enumerate(self._drafting):
            if level <= member.max_depth:
                self._timed(i, member.extend, level)

    def tree(self) -> TokenTree:
        trees = [self._timed(i, member.tree) for i, member in enumerate(self._drafting)]
        if self.policy == "ucb":
            return trees[0]
        tree = trees[self.chosen[-1]]
        # The loop narrows `valid` of the tree that it is given: what is judged is a copy.
        past = [
            Past(replace(t, valid=t.valid.clone()), self.seqs.length, self.seqs.live) for t in trees
        ]
        self._past.append((past, self._own_s))
        self._verified, self._drafted_at = bucket(tree.n_nodes), self.clock()
        return tree

    def observe(self, truth: Truth) -> None:
        now = self.clock()  # before the arms learn: all do in every step, whoever drafted
        super().observe(truth)
        if self._started is None:
            return  # the prefill
        # Not by `truth.count`: that is 0 for a row that has just ended.
        tokens = float((self.seqs.length - self._known).sum())
        if tokens:
            self.arms.add(self.chosen[-1], tokens, now - self._started)
        if self.policy == "hedge":
            size, seconds = self._verified, now - self._drafted_at
            self._verify_s[size] = 0.9 * self._verify_s.get(size, seconds) + 0.1 * seconds
        self._started = None

    # -- hedge -----------------------------------------------------------------------------

    def _weighted(self) -> int:
        """An arm with probability proportional to exp(eta * gain)."""
        best = max(self._gain)
        weights = [math.exp(self.eta * (gain - best)) for gain in self._gain]
        return self._random.choices(range(len(weights)), weights)[0]

    def _learn(self) -> None:
        """Gains of the steps that the text has outgrown."""
        while self._past and all(past.ripe(self.seqs) for past in self._past[0][0]):
            trees, own_s = self._past.pop(0)
            speed = self.arms.overall()
            self._gain = [self.arms.keep * gain for gain in self._gain]
            for arm, (past, seconds) in enumerate(zip(trees, own_s, strict=True)):
                right, known = past.right(self.seqs)
                reached = torch.where(right & known, past.tree.depth, 0).amax(1)
                tokens = float((reached + 1)[past.live].sum())
                cost = seconds + self._cost_of(past.tree.n_nodes)
                self._gain[arm] += tokens - speed * cost

    def _cost_of(self, nodes: int) -> float:
        """Seconds of verifying so many nodes: of the nearest size that was seen."""
        if not self._verify_s:
            return 0.0
        size = min(self._verify_s, key=lambda known: abs(known - nodes))
        return self._verify_s[size]

    def report(self) -> dict[str, Any]:
        """Per arm: its share of the steps, its tokens per second of late, its own report."""
        steps = max(1, len(self.chosen))
        return {
            name: {
                "share_of_steps": self.chosen.count(i) / steps,
                "tokens_per_second": self.arms.worth(i) if self.arms.steps[i] else None,
                **member.report(),
            }
            for i, (name, member) in enumerate(self.members.items())
        }
