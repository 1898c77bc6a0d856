"""How much faster: ways of decoding on the same prompts, in one process, interleaved.

Every prompt is run by every method in turn, the order rotating from prompt to prompt, after one
run of each that is not counted. Speeds are tokens per second of wall clock, prefill included; a
speedup is the median over prompts of the ratio of two speeds, with a bootstrap interval over
prompts. The figures' definitions are the design's (section 4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import GenerationConfig

from redrafter.bars import Bar
from redrafter.config import SpeedConfig
from redrafter.contracts import StepStats
from redrafter.costs import CostMeter, CostTable
from redrafter.data.answers import generation_config
from redrafter.evaluation.figures import (
    Interval,
    acceptance,
    bootstrap,
    engine_figures,
    loop_share,
    mean_of_ratios,
    median,
    pooled,
    speed_bound,
)
from redrafter.evaluation.methods import Method, PromptBatch, TimedCall, plain_answers
from redrafter.evaluation.runs import Timing
from redrafter.evaluation.votes import votes
from redrafter.targets.model import Target

# Quartile ratio of one forward's times from which a machine counts as busy.
_NOISY = 1.25

Runs = dict[str, list[list[TimedCall]]]  # method -> batch -> repeat


def decoding(config: SpeedConfig) -> GenerationConfig:
    """What every method is asked for."""
    wanted = generation_config(config.temperature, config.max_new_tokens)
    if config.ignore_eos:
        wanted.eos_token_id = -1
    return wanted


def make_batches(
    target: Target, prompts: Sequence[Sequence[int]], config: SpeedConfig
) -> tuple[list[PromptBatch], list[list[int]]]:
    """Prompts in batches, all samples of one in the same, with plain's text on each row alone.
    Returns the answers too, row by row; row i has seed + i."""
    rows = [list(p) for p in prompts for _ in range(config.samples_per_prompt)]
    seeds = [config.seed + i for i in range(len(rows))]
    answers = plain_answers(target, rows, decoding(config), seeds)
    texts = [[*p, *a] for p, a in zip(rows, answers, strict=True)]
    size = config.batch_size * config.samples_per_prompt
    batches = [
        PromptBatch(rows[i:j], seeds[i:j], texts[i:j])
        for i, j in ((i, i + size) for i in range(0, len(rows), size))
    ]
    return batches, answers


def middle_context(batches: Sequence[PromptBatch], answers: Sequence[Sequence[int]]) -> int:
    """Median tokens of a row halfway through its answer: the context that costs are quoted at."""
    prompts = [p for batch in batches for p in batch.prompts]
    return int(np.median([len(p) + len(a) / 2 for p, a in zip(prompts, answers, strict=True)]))


def cost_meter(
    target: Target,
    methods: Sequence[Method],
    batches: Sequence[PromptBatch],
    context: int,
    sizes: set[int],
    temperature: float,
) -> CostMeter:
    """Measures t(n) and every drafter's draft at one context.

    sizes: of trees, seen in the warm-up; others are interpolated
    """
    drafters = {m.name: m.twin or m.drafter for m in methods if m.drafter is not None}
    largest = max([1, *(d.max_nodes for d in drafters.values())])
    limit = target.max_positions
    return CostMeter(
        target,
        new_tokens=sorted({1, largest} | sizes),
        contexts=[context if limit is None else max(1, min(context, limit - largest - 1))],
        batches=[len(batches[0].prompts)],
        drafters=drafters,
        temperature=temperature,
    )


def run_interleaved(
    methods: Sequence[Method],
    batches: Sequence[PromptBatch],
    repeats: int = 1,
    meter: CostMeter | None = None,
    cost_rounds: int = 0,
) -> Runs:
    """Every batch by every method, `repeats` times over, in rotating order.

    meter: measured in between, so that it sees the machine in the same moments
    """
    runs: Runs = {method.name: [[] for _ in batches] for method in methods}
    turns = repeats * len(batches)
    for turn in Bar(range(turns), desc="prompts, every method", unit="prompt", leave=False):
        place, first = turn % len(batches), turn % len(methods)
        for method in [*methods[first:], *methods[:first]]:
            method.prepare(batches[place])
            runs[method.name][place].append(method.run(batches[place]))
        while meter and meter.rounds < math.ceil(cost_rounds * (turn + 1) / turns):
            meter.round()
    return runs


def total_stats(runs: list[list[TimedCall]]) -> StepStats:
    """Counts over all batches of the first repeat (repeats draft alike)."""
    total = StepStats([], [])
    for first in (r[0].stats for r in runs):
        total.steps += first.steps
        total.emitted += first.emitted
        total.forwards += first.forwards
        total.nodes_verified += first.nodes_verified
        for name in ("drafted_at", "accepted_at", "matched_at"):
            own, more = getattr(total, name), getattr(first, name)
            setattr(total, name, [a + b for a, b in zip(own or [0] * len(more), more, strict=True)])
    return total


def _draft_tokens(method: Method, stats: StepStats) -> int:
    """Tokens that were verified besides the roots: of chains those drafted, of trees all nodes."""
    if method.drafter.max_nodes == method.drafter.max_depth + 1:
        return sum(stats.drafted_at)
    return stats.nodes_verified - sum(stats.steps)


def sum_seconds(runs: list[list[TimedCall]]) -> dict[str, float]:
    """Seconds by part over all batches and repeats; "other" is what no part accounts for."""
    parts: dict[str, float] = {}
    for run in (run for r in runs for run in r):
        for part, seconds in run.seconds.items():
            parts[part] = parts.get(part, 0.0) + seconds
    if "verify" in parts:
        known = sum(parts.get(part, 0.0) for part in ("prefill", "draft", "lookahead", "verify"))
        parts["other"] = parts["total"] - known
    return parts


def distinct(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that say something, in order and once each."""
    found: list[dict[str, Any]] = []
    for report in reports:
        if report and report not in found:
            found.append(report)
    return found


class Summary:
    """Figures of all methods from their runs. decode: a row's text, for the votes of samples"""

    def __init__(
        self,
        methods: Sequence[Method],
        runs: Runs,
        batches: Sequence[PromptBatch],
        answers: Sequence[Sequence[int]],
        costs: CostTable,
        config: SpeedConfig,
        decode: Callable[[Sequence[int]], str] | None = None,
    ):
        self.methods, self.runs, self.config, self.costs = methods, runs, config, costs
        self.answers = [list(a) for a in answers]
        self.decode = decode if config.samples_per_prompt > 1 else None
        self.outside = {method.name for method in methods if method.outside}
        prompts = [p for batch in batches for p in batch.prompts]
        self.timing = {name: Timing(r) for name, r in runs.items()}
        self.loop_share = loop_share(list(zip(prompts, answers, strict=True)))
        loops = [name for name in ("stock", "plain") if name in runs]
        self.best_plain = min(loops, key=lambda n: self.timing[n].total_s.sum(), default=None)

    def speedup(self, name: str, over: str | None, decode: bool = False) -> Interval | None:
        """Median over prompts of the ratio of speeds, with its interval.

        decode: of the phase after the prefill. What the prefill of other people's loops takes is
        not known from outside; it is taken to be that of `plain`.
        """
        if over is None or over not in self.timing:
            return None
        own, base = self.timing[name], self.timing[over]
        if not decode:
            return bootstrap(median, own.per_second() / base.per_second())
        ours = self.timing.get("plain")
        prefill = {
            n: t.prefill_s if n not in self.outside or ours is None else ours.prefill_s
            for n, t in ((name, own), (over, base))
        }
        ratio = own.decode_per_second(prefill[name]) / base.decode_per_second(prefill[over])
        ratio = ratio[np.isfinite(ratio)]
        return bootstrap(median, ratio) if len(ratio) else None

    def cpu_speedup(self, name: str, over: str | None) -> Interval | None:
        """`speedup` by the CPU seconds of the process; None where they are not known."""
        if over is None:
            return None
        own, base = self.timing[name], self.timing[over]
        if not (own.cpu_s.all() and base.cpu_s.all()):
            return None
        return bootstrap(median, own.tokens / own.cpu_s / (base.tokens / base.cpu_s))

    def method(self, method: Method) -> dict[str, Any]:
        """The figures of one method; measured ones have their interval in `low` and `high`."""
        name, runs = method.name, self.runs[method.name]
        out: dict[str, Any] = {}
        low: dict[str, float] = {}
        high: dict[str, float] = {}

        def put(key: str, interval: Interval | None) -> None:
            out[key] = None if interval is None else interval[0]
            if interval is not None:
                low[key], high[key] = interval[1:]

        stats = None if runs[0][0].stats is None else total_stats(runs)
        if stats is None:  # one token per forward by construction
            out |= {"tokens_per_step": 1.0, "tokens_per_step_mean": 1.0}
        else:
            emitted, steps = self._of_prompts(stats.emitted), self._of_prompts(stats.steps)
            put("tokens_per_step", bootstrap(pooled, emitted, steps))
            put("tokens_per_step_mean", bootstrap(mean_of_ratios, emitted, steps))
        put("speedup_stock", self.speedup(name, "stock"))
        put("speedup_plain", self.speedup(name, self.best_plain))
        put("decode_speedup_plain", self.speedup(name, self.best_plain, decode=True))
        put("cpu_speedup_plain", self.cpu_speedup(name, self.best_plain))
        out |= self._bound(method, out["tokens_per_step"], stats)
        decode = out["decode_speedup_plain"]
        out["efficiency"] = decode / out["bound"] if decode and out["bound"] else None
        if out["efficiency"] is not None:
            for side in (low, high):
                side["efficiency"] = side["decode_speedup_plain"] / out["bound"]
        out["loop_share"] = self.loop_share
        made = [row for r in runs for row in r[0].tokens]
        if method.drafter is not None:
            out["acceptance"] = acceptance(stats.drafted_at, stats.accepted_at)
            out["engine"] = engine_figures(stats, sum(map(len, made)), _draft_tokens(method, stats))
            out["drafter_reports"] = distinct(r[0].report for r in runs)
        equal = sum(a == b for a, b in zip(made, self.answers, strict=True))
        out |= {
            "equal_rows": equal,
            "equal_share": equal / len(made),
            "law_only": method.law_only,
            "tokens": sum(map(len, made)),
            "steps": None if stats is None else sum(stats.steps),
            "tokens_per_second": float(
                self.timing[name].tokens.sum() / self.timing[name].total_s.sum()
            ),
            **self._parts(name, runs),
            "low": low,
            "high": high,
        }
        return out

    def _of_prompts(self, of_rows: Sequence[int]) -> np.ndarray:
        """Sums over the samples of each prompt, which are no prompts of their own."""
        return np.reshape(of_rows, (-1, self.config.samples_per_prompt)).sum(1)

    def per_prompt(self, name: str) -> dict[str, Any]:
        """Of every batch: tokens, steps (None where they are not known), seconds; of every prompt
        the vote of its samples."""
        timing, first = self.timing[name], [r[0].stats for r in self.runs[name]]
        made = [row for r in self.runs[name] for row in r[0].tokens]
        return {
            "tokens": timing.tokens.astype(int).tolist(),
            "steps": None if None in first else [sum(stats.steps) for stats in first],
            "seconds": [round(s, 5) for s in timing.total_s.tolist()],
            "cpu_seconds": [round(s, 5) for s in timing.cpu_s.tolist()],
            **self._votes(made),
        }

    def _votes(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        if self.decode is None:
            return {}
        return {"votes": votes(rows, self.config.samples_per_prompt, self.decode)}

    def _bound(self, method: Method, tau: float, stats: StepStats | None) -> dict[str, Any]:
        """t(N) is the mean over the sizes of the trees that were verified."""
        if method.drafter is None:
            return {"bound": None if method.outside else 1.0}
        if not method.drafter.drafts_alike:
            return {"bound": None}
        at = self.costs.target[0]
        sizes = Counter(n for r in self.runs[method.name] for run in r for n in run.nodes)
        steps = max(1, sizes.total())
        t_n = sum(k * self.costs.t(n, at.context, at.batch) for n, k in sizes.items()) / steps
        drafted = [n / max(1, sum(stats.steps)) for n in stats.drafted_at]
        budget = getattr(method.drafter, "budget", None)
        if budget is not None:  # it ends a draft by what it reads, and nothing is read in a bench
            draft = budget.draft_s(drafted)
        else:
            draft = self.costs.draft(method.name, drafted if method.stops_early else None)
        t_1 = self.costs.t(1, at.context, at.batch)
        return {
            "bound": speed_bound(tau, t_1, draft, t_n) if sizes else None,
            "bound_parts": {
                "t_1_s": t_1, "t_n_s": t_n, "draft_s": draft,
                "nodes": sum(n * k for n, k in sizes.items()) / steps,
                "context": at.context, "batch": at.batch,
            },
        }  # fmt: skip

    def _parts(self, name: str, runs: list[list[TimedCall]]) -> dict[str, Any]:
        """Where the time went."""
        seconds = sum_seconds(runs)
        out: dict[str, Any] = {"seconds": seconds}
        if "verify" in seconds:
            decode = seconds["total"] - seconds["prefill"]
            out["outside_share"] = seconds["other"] / decode if decode > 0 else None
            if name == "plain" and seconds["forward"] > 0:
                # All of plain's time after the prefill over that inside bare target forwards.
                out["plain_overhead"] = decode / seconds["forward"]
        return out

    def body(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        drafting = [m.name for m in self.methods if m.drafter is not None and not m.law_only]
        figures = {m.name: self.method(m) for m in self.methods}
        return {
            "methods": figures,
            "best_plain": self.best_plain,
            "exact": all(figures[n]["equal_share"] == 1.0 for n in drafting) if drafting else None,
            "loop_share": self.loop_share,
            "n_prompts": len(self.answers) // self.config.samples_per_prompt,
            "samples_per_prompt": self.config.samples_per_prompt,
            **self._votes(self.answers),
            "per_prompt": {m.name: self.per_prompt(m.name) for m in self.methods},
            "temperature": self.config.temperature,
            "batch_size": self.config.batch_size,
            "costs": asdict(self.costs),
        }


def measure_speed(
    target: Target,
    methods: Sequence[Method],
    batches: Sequence[PromptBatch],
    answers: Sequence[Sequence[int]],
    config: SpeedConfig,
) -> dict[str, Any]:
    """Run and summarise. `batches` and `answers` are from `make_batches`."""
    sizes: set[int] = set()
    for method in methods:  # the warm-up
        method.prepare(batches[0])
        sizes.update(method.run(batches[0]).nodes)
    context = middle_context(batches, answers)
    meter = cost_meter(target, methods, batches, context, sizes, config.temperature)
    runs = run_interleaved(methods, batches, config.repeats, meter, config.cost_rounds)
    decode = target.tokenizer and target.tokenizer.decode
    body = Summary(methods, runs, batches, answers, meter.table(), config, decode).body()
    return {**body, "warnings": noise_warning(meter.table())}


def noise_warning(costs: CostTable) -> list[str]:
    """Says so where the middle half of equal forwards differs much."""
    spread = max(entry.cost.q3_s / entry.cost.q1_s for entry in costs.target)
    if spread <= _NOISY:
        return []
    return [
        f"equal forwards differ by a factor of {spread:.1f} between their quartiles: the machine "
        "is busy, seconds and speedups are rough"
    ]
