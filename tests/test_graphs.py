"""A fused forward that is recorded and replayed: the same texts, few recordings, memory used again.

There is no GPU here, so `Tape` stands in for CUDA graphs: it keeps the operations of a run with the
tensors that they read and wrote, and a replay is those operations again. No Python runs, so what
was a number on the host when it was recorded stays what it was, as in a graph.
"""

import copy
import gc
from functools import partial

import pytest
import torch
from models import endless, prompts, settings, tiny
from test_fused import CASES, MODES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from redrafter.config import TargetConfig, TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.skipping import LayerSkipping
from redrafter.heads.load import head_class
from redrafter.targets import graphs
from redrafter.targets.fused import choose_forward
from redrafter.targets.graphs import GraphForward, width_of
from redrafter.targets.load import load_target
from redrafter.targets.model import Target


class Tape(TorchDispatchMode):
    """Operations, in order, on the tensors of the run that was recorded."""

    def __init__(self):
        super().__init__()
        self.steps, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        self.replays += 1
        for func, args, kwargs, made in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorder(tapes):
    """As `graphs.CudaRecorder`: what is recorded is not the run that counts."""

    def record(run):
        tapes.append(Tape())
        with tapes[-1]:
            run()
        return tapes[-1].replay

    return record


def graphed(model, tapes):
    made = Target(copy.deepcopy(model), check=lambda _: None)
    make = partial(GraphForward, record=recorder(tapes))
    choose_forward(made, "graphs", lambda _: None, make)
    return made


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Widths that texts of 30 tokens grow out of."""
    monkeypatch.setattr(graphs, "_LEAST_WIDTH", 8)


def head_of(target):
    torch.manual_seed(0)
    return head_class("recurrent").for_target(target, output="target").double().eval()


@pytest.mark.parametrize(("case", "mode"), [*((c, "seeded") for c in CASES), ("llama", "greedy")])
def test_texts_are_those_without(case, mode):
    """Plain, a tree and a chain, of ragged rows, again on memory that another text has left."""
    own, tapes = tiny.__wrapped__(case.split("-")[0], **CASES[case]), []
    target, rows, config = graphed(own.model, tapes), prompts(), settings(**MODES[mode])
    want = plain(own, rows, config)
    drafter = HeadDrafter(head_of(own), target, TreeConfig(2, 3))
    for n_rows in (4, 4, 1):
        for made in (
            plain(target, rows[:n_rows], config),
            speculative(target, rows[:n_rows], config, drafter=drafter),
        ):
            assert made.tokens == want.tokens[: len(made.tokens)]
            assert made.finish == want.finish[: len(made.finish)]
    n, widths = target.fused.n_recorded, {width_of(n) for n in range(3, 40)}
    assert len(tapes) == n <= 4 * len(widths), "one for each shape and width"
    assert sum(tape.replays for tape in tapes) > 4 * n


def test_nothing_is_recorded_twice_while_its_memory_is_kept():
    own, tapes = tiny("llama"), []
    target, rows = graphed(own.model, tapes), prompts()[:2]
    config = settings(eos_token_id=-1)
    first = plain(target, rows, config)
    n = len(tapes)
    assert n > 1 and plain(target, rows, config).tokens == first.tokens and len(tapes) == n
    held = target.new_cache(2, 30)
    other = target.new_cache(2, 30)
    assert held.memory is not other.memory, "one that is still in use"
    memory, held.memory.store[:] = held.memory, float("nan")
    del held
    gc.collect()
    again = target.new_cache(2, 30)
    assert again.memory is memory and not memory.store.any(), "what was left there is gone"
    assert again.lengths == [0, 0] and again.get_max_cache_shape() == 30


@torch.inference_mode()
def test_what_a_step_gave_stays_when_the_next_one_runs():
    target = graphed(tiny("llama").model, [])
    cache, given = target.new_cache(1, 12), []
    for place, token in enumerate([3, 4, 5, 6]):
        cache.prepare(1)
        one, at = torch.tensor([[token]]), torch.tensor([[place]])
        hidden = target.forward(one, at, target.no_mask(cache.width), cache).hidden
        given.append((hidden, hidden.clone()))
        cache.commit([place + 1])
    assert all(torch.equal(now, then) for now, then in given)
    assert target.fused.n_recorded == 1
    cache.prepare(2, torch.tensor([[False, True]]))
    masks = torch.zeros(1, 1, 2, cache.width, dtype=target.dtype)
    target.forward(torch.tensor([[7, 0]]), torch.tensor([[4, 5]]), masks, cache)
    assert target.fused.n_recorded == 1, "padding is not written by a recording"


def test_little_is_kept():
    target = graphed(tiny("llama").model, [])
    for n_rows in range(1, 6):
        target.new_cache(n_rows, 20)
    gc.collect()
    assert [m.store.shape[1] for m in target.fused._free] == [4, 5]


def test_a_recordings_tables_outlive_longer_texts():
    own, tapes = tiny("llama"), []
    target, config = graphed(own.model, tapes), settings(max_new_tokens=6, eos_token_id=-1)
    short, long = [[3, 4, 5]], [list(range(3, 40))]
    want = [plain(own, rows, config).tokens for rows in (short, long, short)]
    assert [plain(target, rows, config).tokens for rows in (short, long, short)] == want
    recorded = [r for m in target.fused._free for r in m.recorded.values()]
    assert len({r.tables[0].data_ptr() for r in recorded}) > 1, "a longer table was made"


def test_prompts_and_who_looks_into_the_model_run_without():
    own, tapes = tiny("llama"), []
    target, config = graphed(own.model, tapes), settings(max_new_tokens=1)
    for rows in (prompts(), prompts((7, 7))):  # with padding and without
        assert plain(target, rows, config).tokens == plain(own, rows, config).tokens
    assert not tapes, "a prompt's shape is its own"
    config, rows = settings(), prompts()
    want = plain(own, rows, config).tokens
    drafter = LayerSkipping(target, 3, fixed=(0,))
    assert speculative(target, rows, config, drafter=drafter).tokens == want
    n, seen = len(tapes), []
    hook = target.model.base_model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert plain(target, rows, config).tokens == want and seen and len(tapes) == n
    hook.remove()
    with torch.no_grad():
        target.model.base_model.norm.weight.mul_(-1)
    assert plain(target, rows, config).tokens != want, "weights are read where they lie"
    assert endless(target, rows, config)


def test_where_there_are_none(tmp_path):
    tiny("llama").model.save_pretrained(tmp_path / "llama")
    config = TargetConfig(str(tmp_path / "llama"), device="cpu", forward="graphs")
    with pytest.raises(InputError, match=r"target.forward graphs: they are CUDA's, .* on cpu"):
        load_target(config)
    tiny("gpt2").model.save_pretrained(tmp_path / "gpt2")
    config = TargetConfig(str(tmp_path / "gpt2"), device="cpu", forward="graphs")
    with pytest.raises(InputError, match=r"target.forward graphs: .* has none, as model_type"):
        load_target(config)
