"""A step reads the host once for the whole batch, whoever drafts: what a drafter needs there the
loop has already read."""

import pytest
from head_kinds import make_head
from models import Recorder, endless, prompts, replays, settings, tiny
from test_prefix import make_head as reading

from redrafter.config import TreeConfig
from redrafter.decode.speculative import speculative
from redrafter.drafters.recurrent import RecurrentDrafter
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.evaluation.operations import per_step

MODES = {"greedy": {}, "seeded": dict(do_sample=True, temperature=0.8)}


def drafters(target):
    texts = endless(target, prompts(), settings())
    return {
        "head": RecurrentDrafter(make_head(target, "recurrent"), target, TreeConfig(3, 3)),
        "medusa": RecurrentDrafter(make_head(target, "medusa"), target, TreeConfig(3, 3)),
        "prefix": RecurrentDrafter(reading(target), target, TreeConfig(3, 3)),
        "suffix": SuffixDrafter(depth=4),
        "replay": replays(texts)["half"],
    }


@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["head", "medusa", "prefix", "suffix"])
def test_a_step_reads_the_host_once(name, mode, n_rows):
    target = tiny("llama")
    drafter, rows = drafters(target)[name], prompts()[:n_rows]

    def decode(config):
        return speculative(target, rows, config, drafter=drafter)

    def wanted(n):
        return settings(max_new_tokens=n, eos_token_id=-1, **MODES[mode])

    found = per_step(decode, wanted, (6, 18))
    assert found["steps"] > 2 and found["host_reads"] == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_what_the_host_is_told_is_what_the_device_has(mode):
    target = tiny("llama")
    recorder = Recorder(drafters(target)["replay"])
    speculative(target, prompts(), settings(**MODES[mode]), drafter=recorder)
    counts = set()
    for _, truth, _, live in recorder.steps:
        assert truth.told is not None
        told, truth.told = truth.told, None
        assert truth.rows() == told
        counts |= {len(row) for row, on in zip(told, live, strict=True) if on}
    assert {0, 1, 2, 3} <= counts
