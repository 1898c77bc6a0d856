"""What a lookahead is worth beside every static length of the same drafter.

Steps are counted in a pass of their own, from a fresh start and in the order of the prompts, and
priced by costs measured in between the timed runs: `cost_s` of a step is the forward over the tree
that it verified, and of the draft the start and the levels that were really drafted. What the
lookahead itself takes is not in it (that is the metric of DISCO, arXiv 2405.04304, with measured
costs); it is in the seconds of the clock. Both speeds are tokens after the prefill's own per second
after the prefill, all prompts together, and are compared on the same prompts drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redrafter.drafters.options import parse_name
from redrafter.drafters.profile import StepCosts
from redrafter.evaluation.figures import bootstrap
from redrafter.evaluation.lookaheads.steps import Step
from redrafter.evaluation.runs import TimedCall

#: Kinds of drafters whose levels are no forward of anything.
TABLES = frozenset({"lookup", "suffix", "bigram", "ngrammys", "recycling", "replay", "none"})

# --------------------------------------------------------------------------------- predictions


def reliability(
    probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = 10
) -> dict[str, Any]:
    """How often what was held likely came true.

    probabilities: predicted, in [0, 1]; outcomes: whether it was so
    Returns {"n", "ece", "bins"}: the predictions, their expected calibration error (mean over the
    predictions of |mean predicted - observed| of their bin), and of each of the equally wide bins
    that holds any its `low` and `high` end, `n`, mean `predicted` and `observed` share.
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        here = place == b
        if here.any():
            found.append({
                "low": b / bins, "high": (b + 1) / bins, "n": int(here.sum()),
                "predicted": float(p[here].mean()), "observed": float(y[here].mean()),
            })  # fmt: skip
    off = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in found)
    return {"n": len(p), "ece": float(off / len(p)) if len(p) else None, "bins": found}


# ------------------------------------------------------------------------------------- figures


def rate(tokens: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Tokens per second of all prompts together."""
    return tokens.sum(-1) / np.maximum(seconds.sum(-1), 1e-12)


def rate_ratio(own: np.ndarray, own_s: np.ndarray, base: np.ndarray, base_s: np.ndarray):
    """own, base: tokens"""
    return rate(own, own_s) / np.maximum(rate(base, base_s), 1e-12)


def gain_share(own, own_s, base, base_s, oracle, oracle_s):
    """Of what the oracle gains over the base, the part that is gained; nan where it gains none."""
    low = rate(base, base_s)
    gain = rate(oracle, oracle_s) - low
    return np.where(gain > 0, (rate(own, own_s) - low) / np.where(gain > 0, gain, 1.0), np.nan)


@dataclass(frozen=True)
class Measured:
    """One lookahead on all prompts of a set.

    name: of the method; length: of a static one, 0 for plain decoding, None of the others
    steps: of every prompt; runs: timed, of every prompt and repeat, None where it was only counted
    """

    name: str
    length: int | None
    steps: list[list[Step]]
    runs: list[list[TimedCall]] | None

    def columns(self, costs: StepCosts) -> dict[str, np.ndarray]:
        """Per prompt: `tokens` and `cost_s` as counted, `timed` tokens and `clock_s`."""
        columns = {
            "tokens": np.array([sum(s.emitted for s in p) for p in self.steps], dtype=float),
            "cost_s": np.array([sum(s.cost_s(costs) for s in p) for p in self.steps]),
        }
        if self.runs is None:
            return columns
        seconds = [[r.seconds["total"] - r.seconds["prefill"] for r in runs] for runs in self.runs]
        return columns | {
            "timed": np.array([sum(len(t) - 1 for t in r[0].tokens) for r in self.runs], float),
            "clock_s": np.array([np.median(row) for row in seconds]),
        }


def summary(
    measured: Mapping[str, Measured],
    costs: StepCosts,
    answers: Sequence[Sequence[int]],
    drafter: str,
    oracle: str | None,
) -> dict[str, Any]:
    """All figures of one drafter on one set of prompts, ready for JSON.

    measured: by the names that tables show; drafter: its name; oracle: that of the oracle
    """
    columns = {label: m.columns(costs) for label, m in measured.items()}
    static = [label for label, m in measured.items() if m.length is not None]
    speed = {label: float(rate(c["tokens"], c["cost_s"])) for label, c in columns.items()}
    clock = {label: float(rate(c["timed"], c["clock_s"])) for label, c in columns.items()
             if "timed" in c}  # fmt: skip
    best = max(static, key=speed.__getitem__)  # the shortest of equal ones: they come in order
    # Which one that would be was foreseen from fewer measurements: a neighbour may have been timed.
    timed = [label for label in static if label in clock]
    against = best if best in timed else max(timed, key=speed.__getitem__)
    drafting = [label for label in static if measured[label].length]
    forwards = parse_name(drafter).kind not in TABLES
    return {
        "methods": {
            label: _figures(
                m, label, columns, {"cost": best, "clock": against}, oracle, answers, forwards
            )
            for label, m in measured.items()
        },
        "best_static": best,
        "best_static_by_clock": max(timed, key=clock.__getitem__),
        "clock_against": against,
        "best_drafting": max(drafting, key=speed.__getitem__, default=None),
        "oracle": oracle,
        "n_prompts": len(answers),
        "per_prompt": {
            label: {key: values.round(6).tolist() for key, values in c.items()}
            for label, c in columns.items()
        },
        "verified": {
            label: _histogram(step.drafted for row in m.steps for step in row)
            for label, m in measured.items()
        },
    }


def _figures(
    m: Measured,
    label: str,
    columns: Mapping[str, Mapping[str, np.ndarray]],
    against: Mapping[str, str],
    oracle: str | None,
    answers: Sequence[Sequence[int]],
    forwards: bool,
) -> dict[str, Any]:
    steps = [step for row in m.steps for step in row]
    n, levels = max(1, len(steps)), sum(step.levels for step in steps)
    parts: dict[str, float] = {}
    for run in (run for runs in m.runs or () for run in runs):
        for part, seconds in run.seconds.items():
            parts[part] = parts.get(part, 0.0) + seconds
    decode = parts["total"] - parts["prefill"] if parts else 0.0
    out: dict[str, Any] = {
        "name": m.name,
        "static": m.length,
        "levels_per_step": levels / n,
        "drafted_tokens": sum(step.tokens for step in steps),
        "target_forwards": len(steps),
        "draft_forwards": levels if forwards else 0,
        "lookahead_share": parts.get("lookahead", 0.0) / decode if decode > 0 else None,
        "equal_rows": None
        if m.runs is None
        else sum(r[0].tokens[0] == list(a) for r, a in zip(m.runs, answers, strict=True)),
    }
    low: dict[str, float] = {}
    high: dict[str, float] = {}

    def put(key: str, statistic: Callable, *data: Sequence[float]) -> None:
        value, *ends = bootstrap(statistic, *data)
        out[key] = value if np.isfinite(value) else None
        if np.isfinite([value, *ends]).all():
            low[key], high[key] = ends

    own = columns[label]
    per_prompt = [len(row) for row in m.steps]
    put("tokens_per_step", lambda t, s: t.sum(-1) / np.maximum(s.sum(-1), 1), own["tokens"],
        per_prompt)  # fmt: skip
    for key, tokens, seconds in (("clock", "timed", "clock_s"), ("cost", "tokens", "cost_s")):
        if tokens not in own:
            out |= {f"{key}_{name}": None for name in ("tokens_per_second", "ratio", "share")}
            continue
        base = columns[against[key]]
        mine, theirs = (own[tokens], own[seconds]), (base[tokens], base[seconds])
        put(f"{key}_tokens_per_second", rate, *mine)
        put(f"{key}_ratio", rate_ratio, *mine, *theirs)
        if oracle is not None and tokens in columns[oracle]:
            known = columns[oracle]
            put(f"{key}_share", gain_share, *mine, *theirs, known[tokens], known[seconds])
    return {**out, "low": low, "high": high}


def _histogram(values) -> list[int]:
    """How often each of 0, 1, 2, ... occurs."""
    found = list(values)
    return np.bincount(found).tolist() if found else []


def shown(steps: Sequence[Step]) -> list[dict[str, int]]:
    """The steps of one prompt, for a picture."""
    return [{"position": s.position, "drafted": s.drafted, "accepted": s.accepted} for s in steps]
