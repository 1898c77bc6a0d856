"""The cost table: t(n, context, batch) of the target, and what a drafter's levels cost.

Everything is measured in turn, round after round, so that a slow moment of the machine falls on
all alike; medians with quartiles, in seconds. Whole steps of decoding, where asked for, say what
the loop takes besides (masks, verification, emission).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from redrafter.contracts import Drafter, Generation, InputError, RowState, TokenTree, Truth
from redrafter.data.answers import generation_config
from redrafter.decode.noise import gumbel
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import BUCKETS
from redrafter.drafters.budget import NodeBudget
from redrafter.targets.model import Target

NEW_TOKENS = (1, 2, 3, 5, 9, 17, 25, 33, 41)
# Where a drafter is priced: tokens in the cache, and how often.
_PRICE_CONTEXT, _PRICE_ROUNDS = 128, 20
_WARM_UP_ROUNDS = 2
_LOOP_STEPS = 2  # decoded per sample, were every level accepted; mostly it is several times that


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Cost:
    """Seconds of one measured part: the median, and the quartiles around it."""

    median_s: float
    q1_s: float
    q3_s: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Cost:
        q1, middle, q3 = np.percentile(samples, (25, 50, 75))
        return cls(float(middle), float(q1), float(q3))


@dataclass(frozen=True)
class TargetCost:
    """A target forward that brings n new tokens per row, `context` of them already cached."""

    n: int
    context: int
    batch: int
    cost: Cost


@dataclass(frozen=True)
class DrafterCost:
    """One draft of a drafter. `draft` is start + all levels + tree + observe; `levels[k]` is one
    call of `extend`; `rest` all but the levels."""

    name: str
    context: int
    batch: int
    draft: Cost
    levels: list[Cost]
    rest: Cost | None = None


@dataclass(frozen=True)
class LoopCost:
    """A whole step of decoding that verifies n nodes per row: draft, forward, and the rest. name:
    the drafter's, "none" where the loop drafts nothing, "plain" of plain decoding"""

    name: str
    n: int
    context: int
    batch: int
    step: Cost


@dataclass(frozen=True)
class CostTable:
    target: list[TargetCost]
    drafters: list[DrafterCost]
    loop: list[LoopCost] = field(default_factory=list)

    def t(self, n: int, context: int, batch: int) -> float:
        """Seconds of a target forward of n new tokens; between two measured n, in proportion.

        The lower quartile, as for `draft`: where other work shares the machine, the median of a
        short forward says whether it was interrupted, not what it costs. On an idle machine the
        two agree. KeyError if n lies outside of what was measured there.
        """
        known = sorted(
            (entry.n, entry.cost.q1_s)
            for entry in self.target
            if (entry.context, entry.batch) == (context, batch)
        )
        if not known or not known[0][0] <= n <= known[-1][0]:
            raise KeyError((n, context, batch))
        return float(np.interp(n, *zip(*known, strict=True)))

    def draft(self, name: str, drafted: Sequence[float] | None = None) -> float:
        """Seconds of one draft, lower quartile (the first setting measured).

        drafted: per level, the share of the steps that drafted it; None drafts all in every step
        """
        entry = next(entry for entry in self.drafters if entry.name == name)
        saved = 0.0
        for level, share in zip(entry.levels, drafted or (), strict=False):
            saved += (1 - share) * level.q1_s
        return max(0.0, entry.draft.q1_s - saved)


class _Bench:
    """A filled cache, and rows that a drafter can look at, for one context and batch."""

    def __init__(self, target: Target, context: int, batch: int, room: int, temperature: float):
        self.target, self.context, self.batch = target, context, batch
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(target.vocab_size, (batch, context + room), generator=random)
        self.ids = ids.to(target.device)
        self.cache = target.new_cache(batch, context + room)
        out = self._forward(context)
        self.states, self.logits = out.hidden.clone(), out.logits[:, -1:].clone()
        self.cache.commit([context] * batch)
        length = torch.full((batch,), context, device=target.device)
        live = torch.ones_like(length, dtype=torch.bool)
        self.rows = RowState(self.ids, length, length.clone(), live, cache=self.cache)
        self.rows.lengths = [context] * batch
        self.temperature = temperature

    def _inputs(self, n: int):
        self.cache.prepare(n)
        start = self.cache.lengths[0]
        position = torch.arange(start, start + n, device=self.target.device).expand(self.batch, -1)
        keys = torch.arange(self.cache.width, device=self.target.device).expand(self.batch, -1)
        masks = self.target.masks(keys[:, None] <= position[..., None], position, keys)
        return self.ids[:, start : start + n], position, masks

    def _forward(self, n: int):
        return self.target.forward(*self._inputs(n), self.cache)

    def forward_job(self, n: int) -> Callable[[], list[float]]:
        """Times one forward of n new tokens; nothing is committed, so it can be repeated. With it,
        of recurrent layers, what it takes to keep the states behind half of them."""

        def run() -> list[float]:
            inputs = self._inputs(n)
            synchronize(self.target.device)
            clock = time.perf_counter()
            self.target.forward(*inputs, self.cache)
            self.cache.rehearse((n + 1) // 2)
            synchronize(self.target.device)
            return [time.perf_counter() - clock]

        return run

    def draft_job(self, drafter: Drafter) -> Callable[[], list[float]]:
        """Times one draft: [start, each level ..., tree, observe]."""
        depth, noise = torch.arange(drafter.max_depth + 1, device=self.target.device), None
        if self.temperature > 0:
            seeds = torch.arange(self.batch, device=self.target.device)
            self.rows.temperature, self.rows.seeds = self.temperature, seeds
            noise = gumbel(seeds, self.context + depth, self.target.vocab_size)
        one = torch.ones_like(self.rows.length)
        prefill = Truth(self.rows.root[:, None], one, self.states[:, -1:], self.logits)
        begun, step = prefill, {}
        if "prompt_hidden" in drafter.needs:  # a step then has a state of every depth to be read
            begun, width = replace(prefill, prompt_hidden=self.states), drafter.max_depth + 1
            step = {"tokens": prefill.tokens.expand(-1, width),
                    "hidden": prefill.hidden.expand(-1, width, -1)}  # fmt: skip
        # As many logits as there are nodes: some drafters learn from all of them.
        logits = self._forward(drafter.max_nodes).logits.clone()
        drafted: list[TokenTree] = []

        def observe() -> None:
            tree = drafted.pop()
            seen = logits[:, : tree.n_nodes]
            drafter.observe(replace(prefill, tree=tree, tree_logits=seen, **step))

        def run() -> list[float]:
            self.rows.noise = noise  # of this drafter's depth
            drafter.begin(self.rows)
            drafter.observe(begun)
            calls = [drafter.start]
            calls += [lambda k=k: drafter.extend(k) for k in range(1, drafter.max_depth + 1)]
            calls += [lambda: drafted.append(drafter.tree()), observe]
            seconds = []
            for call in calls:
                synchronize(self.target.device)
                clock = time.perf_counter()
                call()
                synchronize(self.target.device)
                seconds.append(time.perf_counter() - clock)
            return seconds

        return run

    def loop_job(
        self, loop: Callable[..., Generation], drafter: Drafter | None, depth: int
    ) -> Callable[[], list[float]]:
        """Times the steps of decoding behind such a context: [seconds per step]."""
        settings = generation_config(self.temperature, _LOOP_STEPS * (depth + 1))
        settings.eos_token_id = -1
        prompts = self.ids[:, : self.context].tolist()

        def run() -> list[float]:
            synchronize(self.target.device)
            made = loop(self.target, prompts, settings, drafter=drafter).stats
            synchronize(self.target.device)
            return [(made.seconds["total"] - made.seconds["prefill"]) / made.forwards]

        return run


class CostMeter:
    """Measures every combination, one round at a time, between whatever else is measured.

    new_tokens: n; contexts: tokens per row in the cache; batches: rows per forward
    drafters: name -> drafter, each measured at every context and batch
    temperature: above 0, drafters are given noise
    loop: also decode with each drafter, with none, and plainly, for what a whole step takes
    Raises InputError where a context does not fit the target.
    """

    @torch.inference_mode()
    def __init__(
        self,
        target: Target,
        *,
        new_tokens: Sequence[int] = NEW_TOKENS,
        contexts: Sequence[int] = (64, 256),
        batches: Sequence[int] = (1,),
        drafters: dict[str, Drafter] | None = None,
        temperature: float = 0.0,
        loop: bool = False,
    ):
        drafters = drafters or {}
        self.drafters = drafters
        depth = max((d.max_depth for d in drafters.values()), default=0)
        nodes = [d.max_nodes for d in drafters.values()]
        new_tokens = {*new_tokens, *([1, *nodes] if loop else [])}
        room = max([*new_tokens, *(n + 1 for n in nodes), _LOOP_STEPS * (depth + 1) * loop])
        limit = target.max_positions
        if limit is not None and max(contexts) + room > limit:
            raise InputError(
                f"contexts: {max(contexts)} and {room} new tokens exceed the {limit} positions of "
                f"{target.name}"
            )
        self.jobs: dict[tuple, Callable[[], list[float]]] = {}
        for context in contexts:
            for batch in batches:
                bench = _Bench(target, context, batch, room, temperature)
                for n in sorted(set(new_tokens)):
                    self.jobs["target", n, context, batch] = bench.forward_job(n)
                for name, drafter in drafters.items():
                    self.jobs["drafter", name, context, batch] = bench.draft_job(drafter)
                for name, drafter in {"plain": None, "none": None, **drafters}.items():
                    if loop:
                        decode = plain if name == "plain" else speculative
                        job = bench.loop_job(decode, drafter, depth)
                        self.jobs["loop", name, context, batch] = job
        self.samples: dict[tuple, list[list[float]]] = {name: [] for name in self.jobs}
        self.rounds = -_WARM_UP_ROUNDS

    @torch.inference_mode()
    def round(self) -> None:
        """One sample of everything; each round starts one job later than the one before."""
        names = list(self.jobs)
        start = self.rounds % len(names)
        for name in names[start:] + names[:start]:
            row = self.jobs[name]()
            if self.rounds >= 0:
                self.samples[name].append(row)
        self.rounds += 1

    def run(self, rounds: int) -> CostTable:
        """Measure until there are `rounds` samples of everything."""
        while self.rounds < rounds:
            self.round()
        return self.table()

    def table(self) -> CostTable:
        costs = CostTable([], [])
        for (kind, what, context, batch), rows in self.samples.items():
            if kind == "target":
                cost = Cost.of([row[0] for row in rows])
                costs.target.append(TargetCost(what, context, batch, cost))
            elif kind == "drafter":
                draft = Cost.of([sum(row) for row in rows])
                levels = [Cost.of(level) for level in list(zip(*rows, strict=True))[1:-2]]
                rest = Cost.of([row[0] + sum(row[-2:]) for row in rows])
                costs.drafters.append(DrafterCost(what, context, batch, draft, levels, rest))
            else:
                n = self.drafters[what].max_nodes if what in self.drafters else 1
                step = Cost.of([row[0] for row in rows])
                costs.loop.append(LoopCost(what, n, context, batch, step))
        return costs


def price(target: Target, drafter: Drafter, batch_size: int = 1) -> NodeBudget:
    """What a drafter's levels and the target's forwards cost here, measured now."""
    sizes = [n for n in BUCKETS if n < drafter.max_nodes] + [drafter.max_nodes]
    limit, room = target.max_positions, max(sizes) + 1
    context = _PRICE_CONTEXT if limit is None else max(1, min(_PRICE_CONTEXT, limit - room))
    meter = CostMeter(
        target, new_tokens=[1, *sizes], contexts=[context], batches=[batch_size],
        drafters={"this": drafter},
    )  # fmt: skip
    return NodeBudget.from_costs(asdict(meter.run(_PRICE_ROUNDS)), batch_size)
