"""A step reads the host once for the whole batch, whoever drafts: what a drafter needs there the
loop has already read. And it asks for no more operations than it did."""

import pytest
from head_kinds import make_head
from models import Recorder, endless, paired, prompts, replays, settings, tiny
from test_prefix import make_head as reading

from redrafter.config import TreeConfig
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.evaluation.operations import of_decoding, per_step
from redrafter.targets.fused import FusedForward
from redrafter.targets.model import Target

MODES = {"greedy": {}, "seeded": dict(do_sample=True, temperature=0.8)}


def drafters(target):
    texts = endless(target, prompts(), settings())
    return {
        "head": HeadDrafter(make_head(target, "recurrent"), target, TreeConfig(3, 3)),
        "medusa": HeadDrafter(make_head(target, "medusa"), target, TreeConfig(3, 3)),
        "prefix": HeadDrafter(reading(target), target, TreeConfig(3, 3)),
        "suffix": SuffixDrafter(depth=4),
        "replay": replays(texts)["half"],
    }


@pytest.mark.parametrize(
    ("name", "mode", "n_rows"), paired(("head", "medusa", "prefix", "suffix"), MODES, (1, 4))
)
def test_a_step_reads_the_host_once(name, mode, n_rows):
    target = tiny("llama")
    drafter, rows = drafters(target)[name], prompts()[:n_rows]

    def decode(config):
        return speculative(target, rows, config, drafter=drafter)

    def wanted(n):
        return settings(max_new_tokens=n, eos_token_id=-1, **MODES[mode])

    found = per_step(decode, wanted, (3, 9))
    assert found["steps"] > 2 and found["host_reads"] == 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mix(head:3x3,suffix)", "model:3x3"])
def test_a_drafter_that_must_know_more_reads_once_more(name, mode):
    """How many nodes a mixture has, and how far a draft model's cache still holds the text."""
    target = tiny("llama")
    parts = Resources(head=make_head(target, "recurrent"), draft=tiny("llama", num_hidden_layers=1))
    drafter = build_drafter(name, target, parts)

    def decode(config):
        return speculative(target, prompts()[:2], config, drafter=drafter)

    def wanted(n):
        return settings(max_new_tokens=n, eos_token_id=-1, **MODES[mode])

    found = per_step(decode, wanted, (3, 9))
    assert found["steps"] > 2 and found["host_reads"] == 2.0


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


#: Launches per step on two fused layers, as docs/results/costs.md says, by torch's operations and
#: where kernels do what they can; fewer is better
LAUNCHES = {
    "torch": {"plain": 63, "suffix:4": 123, "head:1x4": 227, "head:4x4": 234},
    "kernels": {"plain": 29, "suffix:4": 86, "head:1x4": 129, "head:4x4": 132},
}


@pytest.mark.parametrize("way", LAUNCHES)
def test_a_step_asks_for_no_more_operations_than_it_did(way, request):
    request.getfixturevalue("made" if way == "kernels" else "no_kernels")
    target = Target(tiny.__wrapped__("llama").model.float())
    target.fused = FusedForward(target.backbone, target.config)
    head = make_head(target, "recurrent").float()
    drafters = {
        "suffix:4": SuffixDrafter(depth=4),
        "head:1x4": HeadDrafter(head, target, TreeConfig(1, 4)),
        "head:4x4": HeadDrafter(head, target, TreeConfig(4, 4)),
    }
    found = of_decoding(target, prompts()[0], drafters)
    found = {name: counts["launches"] for name, counts in found.items()}
    assert all(found[name] <= most for name, most in LAUNCHES[way].items()), found
