"""Threads that share a target and a head, as a server's do: every text is what it is alone."""

import sys
import threading

import pytest
import torch
from models import alone, prompts, settings, tiny

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target

ROWS = (9, 3, 14, 8, 5, 11, 7, 4)


@pytest.fixture
def in_turns():
    """Threads that take turns at every chance."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def together(works):
    """Each in a thread of its own; what they gave. An error in one is raised."""
    found, failed = [None] * len(works), []

    def run(i):
        try:
            found[i] = works[i]()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


@pytest.fixture(scope="module", params=["float32", "float64"])
def shared(request, tmp_path_factory):
    """A target, by kernels where there are any for its dtype, and a head for it."""
    place = tmp_path_factory.mktemp("model")
    tiny.__wrapped__("llama", num_key_value_heads=2).model.float().save_pretrained(place)
    made = load_target(TargetConfig(path=str(place), device="cpu", dtype=request.param))
    torch.manual_seed(0)
    return made, RecurrentHead.for_target(made).to(made.dtype).eval()


NAMES = ["plain", "head:3x3", "suffix:6x1", "mix(head:2x3,suffix:6x1):nodes=7"]


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_share_a_target_and_a_head(shared, in_turns, name):
    (target, head), rows = shared, prompts(ROWS)
    config = settings(eos_token_id=-1, max_new_tokens=24)
    wanted, _ = alone(target, rows, config)

    def decode(mine):
        if name == "plain":
            return [plain(target, [row], config).tokens[0] for row in mine]
        drafter = build_drafter(name, target, Resources(head=head))
        return [speculative(target, [row], config, drafter=drafter).tokens[0] for row in mine]

    one, other = together([lambda: decode(rows[0::2]), lambda: decode(rows[1::2])])
    assert one == wanted[0::2] and other == wanted[1::2]


@pytest.mark.parametrize("name", ["skip:3:fixed=[1]", "skip:3:max_skipped=1"])
def test_a_thread_that_skips_layers_leaves_others_the_whole_target(in_turns, name):
    """And chooses them by its own forwards."""
    target, rows = tiny("llama"), prompts(ROWS)
    config = settings(eos_token_id=-1, max_new_tokens=24)
    wanted, _ = alone(target, rows, config)
    drafters = [build_drafter(name, target, Resources()) for _ in range(2)]

    def drafting(drafter):
        return [speculative(target, [row], config, drafter=drafter).tokens[0] for row in rows]

    works = [lambda d=d: drafting(d) for d in drafters]
    works.append(lambda: [plain(target, [row], config).tokens[0] for row in rows])
    assert together(works) == [wanted] * 3
    assert not any("forward" in vars(module) for module in target.model.modules())


def test_a_drafter_that_is_serving_says_so_and_is_free_again(in_turns):
    """By the state of one generation it would draft for another: a silently wrong text."""
    target, row, drafter = tiny("llama"), prompts((9,))[0], SuffixDrafter(6, 1)
    config = settings(max_new_tokens=6)
    wanted, _ = alone(target, [row], config)
    refused = []

    class Nosy(SuffixDrafter):
        def begin(self, seqs):
            super().begin(seqs)
            with pytest.raises(InputError, match="is serving another generation"):
                speculative(target, [row], config, drafter=self)
            refused.append(True)

    nosy = Nosy(6, 1)
    for _ in range(2):
        assert speculative(target, [row], config, drafter=nosy).tokens == wanted
    assert len(refused) == 2

    class Failing(SuffixDrafter):
        def start(self):
            raise KeyboardInterrupt

    failing = Failing(6, 1)
    for _ in range(2):  # not refused the second time
        with pytest.raises(KeyboardInterrupt):
            speculative(target, [row], config, drafter=failing)
    assert speculative(target, [row], config, drafter=drafter).tokens == wanted
