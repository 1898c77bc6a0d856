"""How much is accepted, how much could be: rules side by side, with the oracle of each.

Where a tree was drawn, the run itself knows both distributions at every node that was tested: q of
the drafter and p of the target. From them come what one draw is accepted with (1 - TV) and the most
that any rule can accept of k independent draws, at the very prefixes that were tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig

from redrafter.bars import Bar
from redrafter.config import AcceptanceConfig
from redrafter.contracts import Drafter, RowState, Truth
from redrafter.data.answers import generation_config
from redrafter.decode.speculative import speculative
from redrafter.drafters.compose import Wrapped
from redrafter.drafting import Strategy, build_strategy
from redrafter.evaluation.figures import Interval, bootstrap, pooled
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.optimum import best_acceptance
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.evaluation.report import table, with_interval
from redrafter.lookahead.wrapped import WrappedLookahead
from redrafter.targets.model import Target


@dataclass(frozen=True)
class Acceptance:
    """Figures of one method; each is (value, low, high), the interval over prompts.

    tokens_per_step: as everywhere
    accepted: share of tested levels that were accepted (a level is tested if all above it were
        accepted)
    overlap: mean over the tested nodes of sum_v min(p, q) = 1 - TV; None where nothing was drawn
    optimum: mean of the most that any rule accepts of as many independent draws; None likewise
    nodes: verified per step, the root counted
    """

    tokens_per_step: Interval
    accepted: Interval
    overlap: Interval | None
    optimum: Interval | None
    nodes: float


class Counter(WrappedLookahead):
    """Counts what was tested, before any stop: the steps that end texts are long ones, and leaving
    them or what they accepted out would flatter no one.
    """

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.tested = self.accepted = 0

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        self.accepted += int(accepted.sum())
        self.tested += int(torch.minimum(accepted + 1, drafted).sum())
        super().observe(drafted, accepted, truth)


class Watcher(Wrapped):
    """Drafts as another drafter does, and sums up the oracles over the nodes that were tested, in
    all steps but the one that ends a text (of which a drafter is not told).

    tested: nodes; overlap, optimum: sums over them
    """

    def __init__(self, inner: Drafter, temperature: float):
        super().__init__(inner, frozenset({"tree_logits"}))
        self.temperature = temperature

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.tested = 0
        self.overlap = self.optimum = 0.0
        self.drawn = False

    def observe(self, truth: Truth) -> None:
        super().observe(truth)
        if truth.tree is None:
            return
        tree = truth.tree
        children = torch.zeros_like(tree.parent)
        children.scatter_add_(1, tree.parent[:, 1:], tree.valid[:, 1:].long())
        for row, count in enumerate(truth.count.tolist()):
            node = 0
            for d in range(count):  # the nodes of the path, the root first
                if not children[row, node]:
                    break
                self.tested += 1
                self._oracle(truth, row, node)
                if d == count - 1:
                    break
                token = truth.tokens[row, d]
                fits = (tree.parent[row] == node) & (tree.tokens[row] == token) & tree.valid[row]
                fits[0] = False
                node = int(fits.nonzero()[0, 0])

    def _oracle(self, truth: Truth, row: int, node: int) -> None:
        draws = truth.tree.draws
        if draws is None or draws.mode != "iid" or draws.source is not None:
            return
        self.drawn = True
        p = (truth.tree_logits[row, node].double() / self.temperature).softmax(-1)
        q = draws.q(row, node, len(p))[0]
        k = int((draws.order[row, node] >= 0).sum())
        self.overlap += float(torch.minimum(p, q).sum())
        self.optimum += best_acceptance(p, q, k)


def measure_acceptance(
    target: Target,
    strategy: Strategy,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    name: str = "acceptance",
) -> Acceptance:
    """Decode every prompt by itself and look at what was tested."""
    temperature = float(config.temperature or 1.0) if config.do_sample else 1.0
    watcher, counter, rows = Watcher(strategy.drafter, temperature), Counter(strategy.lookahead), []
    bar = Bar(prompts, desc=name, unit="prompt", leave=False)
    for prompt, seed in zip(bar, seeds, strict=True):
        made = speculative(
            target, [prompt], config, seeds=[seed], drafter=watcher, lookahead=counter,
            rule=strategy.rule,
        )  # fmt: skip
        stats = made.stats
        rows.append((sum(stats.emitted), sum(stats.steps), stats.nodes_verified, counter.accepted,
                     counter.tested, watcher.overlap, watcher.optimum, watcher.tested))  # fmt: skip
    emitted, steps, nodes, accepted, tested, *oracles, seen = np.array(rows, dtype=float).T
    overlap, optimum = oracles

    def oracle(total: np.ndarray) -> Interval | None:
        return bootstrap(pooled, total, seen) if watcher.drawn else None

    return Acceptance(
        bootstrap(pooled, emitted, steps),
        bootstrap(pooled, accepted, tested),
        oracle(overlap),
        oracle(optimum),
        float(nodes.sum() / max(1.0, steps.sum())),
    )


def measure(
    config: AcceptanceConfig, names: Sequence[str], target: Target, head: Module | None
) -> dict[str, Any]:
    """The figures of every method. names: from `drafting_methods`"""
    more = prompts_to_count(names, config)
    prompts, others, warnings = evaluation_prompts(target, config, more)
    wanted = generation_config(config.temperature, config.max_new_tokens)
    resources, _ = load_resources(names, config, target, head, others, wanted)
    rows, seeds = [p.ids for p in prompts], [config.seed + i for i in range(len(prompts))]
    found = {}
    for name in names:
        strategy = build_strategy(name, target, resources)
        found[name] = asdict(measure_acceptance(target, strategy, rows, wanted, seeds, name))
    return {"methods": found, "warnings": warnings}


def show(body: dict[str, Any], config: AcceptanceConfig) -> str:
    """One line per method, then what the columns mean."""
    columns = ["method", "nodes", "tokens/step", "accepted", "1 - TV", "optimum"]
    rows = []
    for name, m in body["methods"].items():
        figures = [with_interval(*(m[key] or (None, None, None)), 3) for key in
                   ("tokens_per_step", "accepted", "overlap", "optimum")]  # fmt: skip
        rows.append([name, m["nodes"], *figures])
    return "\n".join([
        table(columns, rows), "",
        "accepted: of the levels that were tested (all above them were accepted)",
        "1 - TV, optimum: means over the tested nodes of what one draw is accepted with, and the "
        "most that any rule accepts of as many independent draws",
        f"temperature {config.temperature:g}, {config.n_prompts} prompts; intervals: 95 % "
        "bootstrap over prompts",
        *(f"warning: {said}" for said in body["warnings"]),
    ])  # fmt: skip
