"""Drift: whether a head's drafts are still accepted as far as its profile says, by a sequential
test that may be looked at after every generation, for ever.

The null hypothesis, for a depth k whose drafts the profile says are accepted at rate p_k: of the
n drafts that a generation makes to that depth, m are accepted, and whatever came before,

    E[p n - m | the past] <= 0,    p = (1 - margin) p_k

Generations are the units, and nothing is assumed of the steps within one (which depend on each
other), nor that generations are alike. A generation's tokens have a limit T, and a draft whose
first k levels are accepted takes k + 1 of them: n + k m <= T, so m - p n <= (1 - p) T / (k + 1),
and

    x = (p n - m) (k + 1) / ((1 - p) T) >= -1

For every stake f in (0, 1) the product of (1 + f x) over generations is then a nonnegative
supermartingale: the wealth of whoever bets on drift. So is an average of such, here over stakes,
depths, and the generation j from which on it is bet, with weights 1 / (j (j + 1)), so that a drift
after a long time without one is found as well. By Ville's inequality it ever reaches 1 / alpha with
probability alpha at most.

Sources: testing by betting on bounded means, Waudby-Smith & Ramdas (arXiv 2010.09686, eq. 23 for a
product of bets); averages over beginnings, as in e-detectors (Shin, Ramdas, Rinaldo, arXiv
2203.03532); the bound of x, ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redrafter.config import TreeConfig
from redrafter.contracts import Drafter, InputError, StepStats
from redrafter.hub.profile import PROFILE

#: shares of the wealth that are staked: small ones find small drifts, large ones large drifts soon
_STAKES = np.array([1 / 32, 1 / 8, 1 / 2, 0.95])
_CERTAIN = 0.99  # no rate is promised above this one


class Evidence:
    """The wealth, of one stream or of many side by side.

    rates: (K,), what is promised to be accepted of the drafts, by depth
    shape: of the streams
    wealth: (*shape), an e-value: at most 1 in expectation, whenever it is looked at
    """

    def __init__(self, rates: Sequence[float], shape: tuple[int, ...] = ()):
        self.rates = np.minimum(np.asarray(rates, dtype=float), _CERTAIN)
        self._begun = np.zeros((*shape, len(self.rates), len(_STAKES)))
        self._n = 0
        self.wealth = np.ones(shape)

    def add(self, drafted: np.ndarray, accepted: np.ndarray, limit: int) -> None:
        """One more generation.

        drafted, accepted: (*shape, K), drafts to each depth, and those accepted to there
        limit: T, tokens that its steps could make at most, known before it began
        """
        self._n += 1
        depth, p = np.arange(1, len(self.rates) + 1), self.rates
        x = (p * drafted - accepted) * (depth + 1) / ((1 - p) * limit)
        new = 1 / (self._n * (self._n + 1))  # weight of the bets that begin now
        grown = (self._begun + new) * (1 + x[..., None] * _STAKES)
        self._begun = np.minimum(grown, 1e300)  # JSON knows of no infinity
        not_begun = 1 / (self._n + 1)
        self.wealth = self._begun.mean((-2, -1)) + not_begun


class DriftAlarm:
    """Watches one stream of generations; says once that the head should be retrained.

    profiles: entries of a `speculation_profile.json`; of several the smallest rate counts
    alpha: probability of a false alarm, ever
    margin: what counts as no drift, see above
    """

    def __init__(self, profiles: Sequence[dict[str, Any]], alpha: float, margin: float):
        self.alpha = alpha
        rates = [entry["marginal_accept_rates"] for entry in profiles]
        self.promised = [min(at) for at in zip(*rates, strict=True)]
        names = (entry["measurement_conditions"]["dataset"] for entry in profiles)
        self.measured_on = ", ".join(dict.fromkeys(names))
        self.evidence = Evidence([(1 - margin) * rate for rate in self.promised])
        self.n = 0
        self.alarm_after: int | None = None
        self._drafted = np.zeros(len(self.promised))
        self._accepted = np.zeros(len(self.promised))

    def observe(self, stats: StepStats, max_new_tokens: int) -> str | None:
        """One generation more. Returns the alarm, the first time that there is one.

        max_new_tokens: what it was asked for, per row
        """
        depth = len(self.promised)
        if len(stats.drafted_at) != depth:
            raise InputError(
                f"drift alarm: the profile tells of {depth} depths, the drafter has "
                f"{len(stats.drafted_at)}: watch what was measured"
            )
        drafted, accepted = np.array(stats.drafted_at), np.array(stats.matched_at)
        # What is accepted behind a stop is counted, as engines do: up to K tokens past the limit.
        self.evidence.add(drafted, accepted, len(stats.steps) * (max_new_tokens + depth))
        self._drafted += drafted
        self._accepted += accepted
        self.n += 1
        if self.alarm_after is None and self.evidence.wealth >= 1 / self.alpha:
            self.alarm_after = self.n
            return self.text()
        return None

    def seen(self) -> list[float | None]:
        """Accepted share of the drafts to each depth, so far."""
        pairs = zip(self._accepted.tolist(), self._drafted.tolist(), strict=True)
        return [accepted / drafted if drafted else None for accepted, drafted in pairs]

    def text(self) -> str:
        def shown(rates: Sequence[float | None]) -> str:
            return " ".join("-" if rate is None else f"{rate:.2f}" for rate in rates)

        return (
            f"drift: after {self.n} generation{'s' * (self.n != 1)} the drafts are accepted to "
            f"depth 1..{len(self.promised)} at {shown(self.seen())}, the head's profile "
            f"({self.measured_on}) says {shown(self.promised)} (e-value "
            f"{float(self.evidence.wealth):.3g}, false alarms at most {self.alpha:.2g}): retrain "
            "the head on text of this kind"
        )

    def report(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "generations": self.n, "e_value": float(self.evidence.wealth), "alpha": self.alpha,
            "alarm_after": self.alarm_after, "promised": self.promised, "seen": self.seen(),
            "measured_on": self.measured_on,
        }  # fmt: skip


def alarm_for(
    file: Path, head: Any, methods: Sequence[str], depth: int, temperature: float, alpha: float,
    margin: float,
) -> DriftAlarm | str:  # fmt: skip
    """The alarm of a head, or, where its profile says nothing of this drafter, why there is none.

    file: its `speculation_profile.json`; methods: names that the drafter may have there; depth: of
        its drafts
    Raises InputError where the profile is damaged or another head's.
    """
    if not file.is_file():
        return f"no drift alarm: {file} is not there; eval/speed.py --out HEAD/speed.json makes it"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        head_of, entries = content["head"], content["profiles"]
        found = [
            entry for entry in entries
            if entry["method"] in methods and entry["temperature"] == temperature
            and entry["num_speculative_tokens"] == depth  # `head` is of whatever tree was given
        ]  # fmt: skip
        if head_of == head.fingerprint() and found:
            return DriftAlarm(found, alpha, margin)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error!r}): measure the head again") from None
    if head_of != head.fingerprint():
        raise InputError(f"{file} was measured on another head: measure this one again")
    return (
        f"no drift alarm: {file} has no figures of {methods[0]} to depth {depth} at temperature "
        f"{temperature:g}; "
        "measure it with eval/speed.py --methods"
    )


def methods_of(drafter: str | None, tree: TreeConfig) -> list[str]:
    """Names under which a profile may have a drafter."""
    if drafter not in (None, "head"):
        return [drafter]
    plain = TreeConfig(tree.width, tree.depth)
    same = [f"head:{tree.width}x{tree.depth}"] if tree == plain else []
    return [*same, "head"] if tree == TreeConfig() else same or ["head"]


def watched(config: Any, name: str | None, drafter: Drafter, head: Any) -> DriftAlarm | str:
    """The drift alarm of a command's head, or why there is none.

    config: with `head`, `tree`, `temperature` and `learning`; name: of the drafter
    """
    file, methods = Path(head.name_or_path) / PROFILE, methods_of(name, config.tree)
    wanted = config.learning
    return alarm_for(
        file, head, methods, drafter.max_depth, config.temperature, wanted.false_alarms,
        wanted.drift_margin,
    )  # fmt: skip
