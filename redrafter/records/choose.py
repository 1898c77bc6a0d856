"""What a DISCO network's decisions are made with: its policies on records, and the choice of their
numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from redrafter.lookahead.disco import Disco, DiscoConfig, DiscoLookahead, begun_s, best_depth
from redrafter.records.policies import Moment, Policy, Prices, Records, Simulated, simulate, static

_ROUNDS = 4  # of the fixed point; it settles within them
_SHARES = tuple(i / 20 for i in range(6, 27))
_NEVER = (2.0, 4.0, 16.0)
_THRESHOLDS = tuple(i / 20 for i in range(1, 20))


def inputs_of(moment: Moment, context: bool) -> Tensor:
    """(R, K+2, I): features of each level, at last none, with what is known when a step begins:
    the context, if that is read, and the step before."""
    n_levels = moment.features.shape[1] - 1
    known = torch.cat([moment.context] * context + [moment.previous / n_levels], 1)
    known = known[:, None].expand(-1, n_levels + 2, -1)
    return torch.cat([torch.nn.functional.pad(moment.features, (0, 0, 0, 1)), known], 2)


def added_s(records: Records, prices: Prices, early_features: bool) -> Tensor:
    """(K,) seconds that each level adds to a step, drafting and verifying, at the mean tree size of
    the records. The first level also carries what every draft costs, unless that is spent before
    the decision (`Drafter.early_features`)."""
    there = torch.arange(records.nodes.shape[1]) < records.length[:, None]
    nodes = records.nodes[there]  # (M, K+1)
    full = nodes[nodes[:, -1] > nodes[:, 0]] if bool((nodes[:, -1] > nodes[:, 0]).any()) else nodes
    # A tree that stops growing before level K (a copy that ends) adds nothing there: what a level
    # costs is asked of the trees that have it.
    grows = full.diff(dim=1) > 0
    verify = prices.verify_s[full].diff(dim=1)
    mean = (verify * grows).sum(0) / grows.sum(0).clamp(min=1)
    draft = prices.level_s.clone() if early_features else prices.draft_s.diff()
    return draft + mean


def level_policy(
    network: Disco, first_price: Tensor, price: Tensor, start_price: Tensor | None = None
) -> Policy:
    """`DiscoLookahead` with when="level", rule="cost". Prices: (K,) lambda s_j, before the first
    level and after it, and before the drafter is begun (None: it always is)."""

    def policy(moment: Moment) -> Tensor:
        p = _log_p(network, moment).exp()  # (R, K+1, K)
        go_on = torch.ones(len(p), dtype=torch.bool)
        levels = torch.zeros(len(p), dtype=torch.long)
        for level in range(p.shape[2]):
            cost = price if level else first_price
            go_on = go_on & ((p[:, level, level:] - cost[level:]).cumsum(-1).amax(-1) > 0)
            levels += go_on
        return _unless_idle(levels, p, start_price)

    return policy


def step_policy(network: Disco, price: Tensor, start_price: Tensor | None = None) -> Policy:
    """`DiscoLookahead` with when="step". Prices: (K,)"""

    def policy(moment: Moment) -> Tensor:
        p = _log_p(network, moment).exp()
        return _unless_idle(best_depth((p[:, 0] - price).cumsum(-1)), p, start_price)

    return policy


def _unless_idle(levels: Tensor, p: Tensor, start_price: Tensor | None) -> Tensor:
    """-1 where the drafter is not even begun."""
    if start_price is None:
        return levels
    return torch.where((p[:, -1] - start_price).cumsum(-1).amax(-1) > 0, levels, -1)


def threshold_policy(network: Disco, threshold: float) -> Policy:
    """`DiscoLookahead` with rule="threshold": the paper's."""

    def policy(moment: Moment) -> Tensor:
        p = _log_p(network, moment).exp()
        own = torch.stack([p[:, g, g - 1] for g in range(1, p.shape[2])], 1)  # P_g after level g
        return 1 + (own >= threshold).long().cumprod(1).sum(1)

    return policy


def policy_of(lookahead: DiscoLookahead) -> Policy:
    """The policy that a lookahead follows."""
    network = lookahead.network
    if lookahead.rule == "threshold":
        return threshold_policy(network, lookahead.threshold)
    first, later, start = lookahead.config.prices(lookahead.when)
    start_price = start if lookahead.early_features else None
    if lookahead.when == "step":
        return step_policy(network, first, start_price)
    return level_policy(network, first, later, start_price)


def _log_p(network: Disco, moment: Moment) -> Tensor:
    level = torch.arange(network.config.n_levels + 2).expand(len(moment.accepted), -1)
    return network.log_p(inputs_of(moment, network.config.context), level)


def choose(
    network: Disco, records: Records, prices: Prices, early_features: bool
) -> tuple[DiscoConfig, dict[str, Simulated]]:
    """The numbers that decisions are made with, each by what it achieves on the records: the
    threshold as in the paper, by sweep; lambda of the rule asked once per step, where the best one
    is the rate that results (Dinkelbach), by iteration and sweep; and the two of the rule asked
    level by level, one after the other. Ours but for the threshold.

    Returns the completed configuration and what each policy did.
    """
    added = added_s(records, prices, early_features).float()

    def run(policy: Policy) -> Simulated:
        return simulate(records, policy, prices, looks=early_features)

    def best(values, make: Callable[[float], Policy]) -> tuple[float, Simulated]:
        return max(((v, run(make(v))) for v in values), key=lambda one: one[1].rate())

    threshold, by_threshold = best(_THRESHOLDS, lambda x: threshold_policy(network, x))
    plain = simulate(records, static(0), prices).rate()
    rates, rate = [plain], plain
    for _ in range(_ROUNDS):
        rate = run(step_policy(network, added * rate)).rate()
        rates.append(rate)
    step_rate, by_step = best(
        rates + [x * rate for x in _SHARES], lambda x: step_policy(network, added * x)
    )
    base = max(by_threshold.rate(), by_step.rate())
    levels = {}

    def by_rates(first: float, rate: float) -> Policy:
        return level_policy(network, added * first, added * rate)

    for start in (0.0, base):  # draft always at first, or as if nothing more were learned
        rate, _ = best([x * base for x in _SHARES], partial(by_rates, start))
        first, done = best(
            [start, *(x * base for x in (0.0, *_SHARES))], partial(by_rates, rate=rate)
        )
        levels[rate, first] = done
    (rate, first), by_level = max(levels.items(), key=lambda item: item[1].rate())
    start_rate = 0.0
    if early_features:  # whether to look: by the level rule, and the step rule takes it over
        begun = begun_s(added, prices.start_s)
        start_rate, by_level = best(
            [0.0, *(x * base for x in (*_SHARES, *_NEVER))],
            lambda x: level_policy(network, added * first, added * rate, begun * x),
        )
        by_step = run(step_policy(network, added * step_rate, begun * start_rate))
    config = replace(
        network.config, threshold=threshold, rate=rate, first_rate=first, step_rate=step_rate,
        start_rate=start_rate, added_s=tuple(added.tolist()),
        start_s=prices.start_s if early_features else 0.0,
    )  # fmt: skip
    return config, {"threshold": by_threshold, "step": by_step, "level": by_level}
