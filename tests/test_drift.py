"""The drift alarm: how often it is wrong, how soon it is right, and what it says."""

import functools
import json

import numpy as np
import pytest

from redrafter.config import TreeConfig
from redrafter.contracts import InputError, StepStats
from redrafter.learning.drift import DriftAlarm, Evidence, alarm_for, methods_of

ALPHA = 0.05
DEPTH, TOKENS = 4, 64


@functools.cache
def population(mean: float, size: int = 4000, seed: int = 0):
    """Generations as they are: some texts are easy, some hard, and a text's steps are alike.

    Returns drafted and accepted, (size, DEPTH) each; a generation ends after TOKENS tokens.
    """
    random = np.random.default_rng(seed)
    easy = random.beta(2 * mean, 2 * (1 - mean), size)
    drafted, accepted = np.zeros((size, DEPTH)), np.zeros((size, DEPTH))
    left = np.full(size, TOKENS)
    while (left > 0).any():
        level = (random.random((size, DEPTH)) < easy[:, None]).cumprod(1)
        level *= np.arange(1, DEPTH + 1) < left[:, None]
        drafted += (left > 0)[:, None]
        accepted += level
        left = np.maximum(0, left - 1 - level.sum(1)).astype(int)
    return drafted, accepted


def rates(drafted, accepted):
    return accepted.sum(0) / drafted.sum(0)


def drawn(pool, streams: int, n: int, seed: int):
    """n generations for each of some streams: pairs of (streams, DEPTH)."""
    random = np.random.default_rng(seed)
    for _ in range(n):
        chosen = random.integers(len(pool[0]), size=streams)
        yield pool[0][chosen], pool[1][chosen]


def test_false_alarms_are_as_rare_as_is_said():
    """Against exactly the promised rates, looked at after each of 300 generations."""
    pool, streams = population(0.6), 1000
    evidence = Evidence(rates(*pool), (streams,))
    ever = np.zeros(streams, dtype=bool)
    for drafted, accepted in drawn(pool, streams, 300, seed=1):
        evidence.add(drafted, accepted, TOKENS + DEPTH)
        ever |= evidence.wealth >= 1 / ALPHA
    assert ever.mean() <= ALPHA
    assert ever.any(), "a test that never errs shows nothing of its level"


def test_steps_taken_for_units_alarm_falsely():
    """Why generations are the units: the steps of a hard text are all bad."""
    random, promised = np.random.default_rng(2), rates(*population(0.6))
    streams, ever = 1000, np.zeros(1000, dtype=bool)
    evidence = Evidence(promised, (streams,))
    for _ in range(20):
        easy = random.beta(1.2, 0.8, streams)
        for _ in range(20):
            level = (random.random((streams, DEPTH)) < easy[:, None]).cumprod(1)
            evidence.add(np.ones((streams, DEPTH)), level, 1 + DEPTH)
            ever |= evidence.wealth >= 1 / ALPHA
    assert ever.mean() > ALPHA + 4 * (ALPHA * (1 - ALPHA) / streams) ** 0.5


@pytest.mark.parametrize(("before", "within"), [(0, 25), (200, 50)])
def test_a_drift_is_found_soon(before, within):
    """From a head that fits to one that accepts a quarter as much, as on text of another kind: at
    once, and after a long time without drift. False alarms: one in a hundred."""
    pool, other, streams = population(0.6), population(0.15), 300
    evidence = Evidence(0.95 * rates(*pool), (streams,))
    for drafted, accepted in drawn(pool, streams, before, seed=3):
        evidence.add(drafted, accepted, TOKENS + DEPTH)
    ever = np.zeros(streams, dtype=bool)
    for drafted, accepted in drawn(other, streams, within, seed=4):
        evidence.add(drafted, accepted, TOKENS + DEPTH)
        ever |= evidence.wealth >= 100
    assert ever.mean() >= 0.95


def test_a_bet_loses_at_most_its_stake():
    """Everything accepted, the best that can happen to a head, in the fewest steps."""
    evidence = Evidence([0.9, 0.5])
    for _ in range(50):
        evidence.add(np.array([10, 10]), np.array([10, 10]), 30)
        assert 0 < evidence.wealth <= 1
    evidence = Evidence([1.0])
    evidence.add(np.array([10]), np.array([9]), 20)
    assert np.isfinite(evidence.wealth) and evidence.wealth > 1


def entry(method, accepted, temperature=0.0, dataset="gsm.jsonl"):
    return {
        "method": method, "temperature": temperature, "num_speculative_tokens": len(accepted),
        "marginal_accept_rates": accepted, "measurement_conditions": {"dataset": dataset},
    }  # fmt: skip


def stats(drafts, *accepted):
    return StepStats([drafts], [0], [drafts] * len(accepted), list(accepted),
                     matched_at=list(accepted))  # fmt: skip


def test_the_alarm_says_once_to_retrain():
    alarm = DriftAlarm([entry("head", [0.8, 0.6]), entry("head", [0.7, 0.65])], 0.01, 0.05)
    assert alarm.promised == [0.7, 0.6]
    said = [alarm.observe(stats(50, 5, 1), 64) for _ in range(12)]
    (text,) = filter(None, said)
    assert said.index(text) + 1 == alarm.alarm_after == alarm.report()["alarm_after"]
    assert "\n" not in text and "retrain" in text and "at 0.10 0.02" in text
    assert "says 0.70 0.60" in text and "gsm.jsonl" in text and "at most 0.01" in text
    good = DriftAlarm([entry("head", [0.8, 0.6])], 0.01, 0.05)
    assert not any(good.observe(stats(20, 16, 12), 64) for _ in range(100))
    with pytest.raises(InputError, match="tells of 2 depths"):
        good.observe(stats(20, 16, 12, 3), 64)


class _Head:
    def fingerprint(self):
        return "aa"


def test_which_profile_counts(tmp_path):
    file = tmp_path / "speculation_profile.json"

    def found(methods=("head:4x4", "head"), temperature=0.0, depth=2):
        return alarm_for(file, _Head(), methods, depth, temperature, 0.01, 0.05)

    assert "is not there" in found()
    profiles = [entry("head:4x4", [0.8, 0.6]), entry("head", [0.7, 0.5]),
                entry("head:2x8", [0.6] * 8), entry("head", [0.5, 0.2], 1.0),
                entry("head", [0.9, 0.8, 0.7])]  # with another tree  # fmt: skip
    content = {"head": "aa", "profiles": profiles}
    file.write_text(json.dumps(content))
    assert found().promised == [0.7, 0.5]
    assert found(temperature=1.0).promised == [0.5, 0.2]
    assert found(depth=3).promised == [0.9, 0.8, 0.7]
    assert "no figures of head:9x9" in found(("head:9x9",))
    assert "no figures of head:4x4 to depth 4" in found(depth=4)
    file.write_text(json.dumps({**content, "head": "bb"}))
    with pytest.raises(InputError, match="another head"):
        found()
    file.write_text('{"head": "aa"}')
    with pytest.raises(InputError, match="damaged"):
        found()


def test_names_of_one_drafter():
    assert methods_of(None, TreeConfig()) == methods_of("head", TreeConfig())
    assert methods_of("head", TreeConfig()) == ["head:4x4", "head"]
    assert methods_of("head", TreeConfig(6, 5)) == ["head:6x5"]
    assert methods_of("mix(head:2x2,suffix:4x1)", TreeConfig()) == ["mix(head:2x2,suffix:4x1)"]
