"""Heads that read other layers' hidden states: whose they are, what is made of them, and kept."""

import functools
import itertools

import pytest
import torch
from models import alone, prompts, settings, tiny
from test_prefix import Watching, counts_of_decoding, counts_of_training, overfitted
from transformers import LlamaConfig, LlamaForCausalLM

from redrafter.config import (
    DataConfig,
    HeadConfig,
    StatesConfig,
    TargetConfig,
    TrainConfig,
    TreeConfig,
)
from redrafter.contracts import InputError
from redrafter.data.reading import Stored
from redrafter.data.rows import Rows, offsets_of
from redrafter.data.states import StateMaker, decoded
from redrafter.data.store import Job, Store
from redrafter.decode.request import Request
from redrafter.decode.speculative import speculative
from redrafter.drafters.context import HeadContext
from redrafter.drafters.head import HeadDrafter
from redrafter.export.layouts import convert
from redrafter.heads.load import head_class
from redrafter.planning.speed import bound
from redrafter.serve.chain import check_depth
from redrafter.targets.aux_layers import picked
from redrafter.targets.fused import choose_forward
from redrafter.targets.model import Target
from redrafter.training.data import check_settings, load_training_data

LAYERS = 3
KINDS = {"recurrent": {}, "medusa": {"num_heads": 3}, "hydra": {"num_heads": 3}}


@pytest.fixture
def target():
    """One for these tests alone, for it changes; as it was when each of them begins."""
    found = tiny("llama", num_hidden_layers=LAYERS)
    found.aux_layers = ()
    return found


def make_head(target, kind="recurrent", layers=(1, 2), scale=1.0, **fields):
    """In float64, every weight moved from where it begins."""
    torch.manual_seed(3)
    fields = {**KINDS[kind], "aux_layers": layers, **fields}
    head = head_class(kind).for_target(target, **fields).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * scale / p.shape[-1] ** 0.5)
    return head.eval()


# ------------------------------------------------------------------------------------- the states


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "deepseek_v3"])
def test_a_target_shows_what_its_layers_give(family):
    """In a pass over texts, in a ragged prefill and in a step behind it, by the fused forward and
    by a class's own."""
    target = tiny(family, num_hidden_layers=LAYERS)
    target.aux_layers = ()
    narrow = target.states(torch.tensor([[3, 4]]))
    target.show([2])
    target.show([1])
    assert target.aux_layers == (1, 2) and target.state_size == 3 * target.hidden_size
    # Gemma's own attention has its softmax in float32
    tolerance = 1e-5 if family == "gemma2" else 1e-10
    close = functools.partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    rows = prompts((9, 3))
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            own = target.model(input_ids=ids, output_hidden_states=True).hidden_states
            wanted = torch.cat([own[-1], own[1], own[2]], -1)
            close(target.states(ids), wanted)
        request = Request(target, rows, settings(), [0, 0], None, None, None, None)
        seqs = request.sequences(slack=4)
        _, logits, hidden = request.prefill(seqs, 4, whole=True)
        for i, row in enumerate(rows):
            wanted = target.states(torch.tensor([row]))[0]
            close(hidden[i, : len(row)], wanted)
            close(logits[i], target.model(input_ids=torch.tensor([row])).logits[0, -1])
    assert torch.equal(target.pick(target.states(torch.tensor([[3, 4]])), ()), narrow)


def test_what_is_picked_of_what_is_shown():
    hidden = torch.arange(24.0).view(2, 12)  # of layers: last, 2, 5, 7
    assert picked(hidden, (2, 5, 7), (2, 7)).tolist()[0] == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert picked(hidden, (2, 5, 7), ()).tolist()[1] == [12, 13, 14]
    assert picked(hidden, (2, 5, 7), [2, 5, 7]) is hidden


# -------------------------------------------------------------------------------------- the head


@torch.no_grad()
def test_the_context_is_the_written_formula(target):
    torch.manual_seed(3)
    head = head_class("recurrent").for_target(target, aux_layers=(1, 2)).double()
    hidden = torch.randn(4, 3 * target.hidden_size, dtype=torch.float64)
    last, *others = hidden.chunk(3, -1)
    assert torch.equal(head.contexts(target, hidden), last), "a new head's c is h_t"
    weight = head.layer_mix.linear.weight
    weight.copy_(torch.randn_like(weight))
    normed = [x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt() for x in (last, *others)]
    wanted = last + torch.cat(normed, -1) @ weight.t()
    torch.testing.assert_close(head.contexts(target, hidden), wanted, atol=1e-11, rtol=1e-11)
    size = sum(p.numel() for p in head.layer_mix.parameters())
    assert size == 3 * target.hidden_size**2
    without = make_head(target, layers=())
    assert bound(head, target, 3).context_bytes == 8 * size
    assert bound(head, target, 3).level_bytes == bound(without, target, 3).level_bytes


def test_bytes_read_are_those_of_the_weights_where_kernels_multiply(target):
    """Kernels read copies of them, which no trace of operations sees."""
    config = {**target.model.config.to_dict(), "hidden_size": 64, "intermediate_size": 96,
              "head_dim": 16, "vocab_size": 600}  # fmt: skip
    torch.manual_seed(0)
    small = Target(LlamaForCausalLM(LlamaConfig(**config)).float())
    choose_forward(small, "auto", lambda _: None)
    assert small.fused.own_steps is not None, "no compiler: nothing is tested"
    head = head_class("recurrent").for_target(small, num_draft_layers=1)
    found = bound(head, small, 3)
    read = [head.rnn_w, head.rnn_u, head.lm_head]
    assert found.level_bytes == 4 * sum(p.numel() for m in read for p in m.parameters())
    embedded = small.model.get_input_embeddings().weight.numel()
    tied = small.lm_head_weight is small.embedding_weight
    weights = sum(p.numel() for p in small.model.parameters())
    assert found.target_bytes == 4 * (weights if tied else weights - embedded)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_plain_decoding(kind, target):
    """In float64, alone and in a ragged batch of four, greedily and for a seed."""
    rows, seeds, accepted = prompts(), [3, 4, 5, 6], 0
    wanted = {}
    for sampled in (False, True):
        options = dict(do_sample=True, temperature=1.3, top_k=9) if sampled else {}
        wanted[sampled] = alone(target, rows, settings(**options), seeds=seeds)[0]
    prefix = {} if kind == "medusa" else {"prefix": "attention"}
    for fields in ({}, prefix):
        head = make_head(target, kind, scale=0.3, **fields)
        drafter = HeadDrafter(head, target, TreeConfig(3, 3))
        for sampled, texts in wanted.items():
            options = dict(do_sample=True, temperature=1.3, top_k=9) if sampled else {}
            made = speculative(target, rows, settings(**options), seeds=seeds, drafter=drafter)
            assert made.tokens == texts
            one = speculative(target, rows[:1], settings(**options), seeds=3, drafter=drafter)
            assert one.tokens == texts[:1]
            accepted += sum(made.stats.accepted_at)
    assert accepted > 0, "nothing was accepted: equality says little"


@torch.no_grad()
def test_each_head_reads_its_own_layers_of_those_that_are_shown(target):
    """Where several heads draft for one target, which then shows the layers of all."""
    rows = prompts()[:2]
    heads = [make_head(target, layers=layers) for layers in ((2,), (), (1, 2))]
    for head in heads:
        drafter = Watching(HeadDrafter(head, target, TreeConfig(2, 3)))
        made = speculative(target, rows, settings(), drafter=drafter)
        assert len(drafter.seen) > 4
        for row, known, c in drafter.seen:
            text = torch.tensor([(rows[row] + made.tokens[row])[: known - 1]])
            own = target.model(input_ids=text, output_hidden_states=True).hidden_states
            hidden = torch.cat([own[-1], *(own[a] for a in head.aux_layers)], -1)
            wanted = head.contexts(target, hidden)[0, -1]
            torch.testing.assert_close(c, wanted, atol=1e-9, rtol=1e-9)


# --------------------------------------------------- what training counts, and what decoding counts


@pytest.fixture
def learned(target):
    head = overfitted(target, row_starts=None, aux_layers=(1, 2))
    return head.bind(target)  # it shows them again


def test_decoding_accepts_what_training_counts(learned, target):
    """Exactly, depth by depth, on the same greedy rows."""
    drafted, accepted = counts_of_training(learned, target)
    assert (drafted, accepted) == counts_of_decoding(learned, target)
    assert all(0 < a < d for d, a in zip(drafted, accepted, strict=True)), "nothing to compare"
    assert learned.layer_mix.linear.weight.abs().min(0).values.max() > 1e-4, "nothing was learned"


def other_layers(monkeypatch, target):
    """Decoding takes the shown layers in another order."""
    own = HeadContext._own

    def exchanged(self, hidden):
        last, one, other = own(self, hidden).chunk(3, -1)
        return torch.cat((last, other, one), -1)

    monkeypatch.setattr(HeadContext, "_own", exchanged)


def a_layer_late(monkeypatch, target):
    """The fused forward shows what a layer later gives."""
    fused = target.fused

    class Late:
        untouched, widens = True, False
        renew, new_cache = fused.renew, fused.new_cache

        def __call__(self, *given):
            *given, shown = given
            late = [min(a + 1, LAYERS - 1) for a in shown]
            made = fused(*given, tuple(sorted({*late, *shown})))
            return target.pick(made, shown) if late == list(shown) else torch.cat(
                [made[..., : target.hidden_size], *[made[..., -target.hidden_size :]] * len(shown)],
                -1,
            )

    monkeypatch.setattr(target, "fused", Late())


@pytest.mark.parametrize("fault", [other_layers, a_layer_late])
def test_the_comparison_sees(fault, learned, target, monkeypatch):
    expected = counts_of_training(learned, target)
    fault(monkeypatch, target)
    assert counts_of_decoding(learned, target) != expected


# --------------------------------------------------------------------------------------- the store


def store_of(target, folder, **config):
    """Of two rows, as data/states.py writes it."""
    rows = prompts((9, 5))
    tokens = torch.tensor(list(itertools.chain(*rows)))
    known = Rows(tokens, torch.ones(14, dtype=torch.bool), offsets_of(torch.tensor([9, 5])))
    maker = StateMaker(target, StatesConfig(**config))
    job = Job(folder, "states", {**maker.identity(), "rows": "r"})
    number = torch.arange(2)
    about = {"row": number, "source_row": number.clone(), "length": torch.tensor([9, 5]).int()}
    text = {"tokens": tokens.int(), "supervised": known.supervised}
    job.write(0, {**about, **text, **maker.columns(known)})
    job.finish(1)
    return Store(folder)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_a_store_keeps_them_and_gives_each_head_its_own(target, tmp_path, dtype):
    assert "aux_layers" not in StateMaker(target, StatesConfig()).identity()
    target.show([1, 2])
    store = store_of(target, tmp_path / "s", dtype=dtype)
    assert store.identity["aux_layers"] == [1, 2]
    whole = target.states(torch.tensor([prompts((9, 5))[0]]))[0]
    place, rows = torch.arange(9), torch.tensor([0])
    for layers in ((1, 2), (2,), ()):
        read = Stored(store, layers=layers).load(rows, (0, 0))
        found = decoded(read, place, torch.float64)
        wanted = target.pick(whole, layers)
        assert found.shape == wanted.shape
        # one scale for each layer: half a step of each one's own largest number
        parts = wanted.unflatten(-1, (-1, target.hidden_size))
        most = parts.abs().amax(-1, keepdim=True) * (1e-9 if dtype == "float64" else 0.51 / 127)
        off = (found - wanted).abs().unflatten(-1, (-1, target.hidden_size))
        assert bool((off <= most).all())
        last = decoded(read, place, torch.float64, target.hidden_size)
        assert torch.equal(last, found[:, : target.hidden_size])
    size = torch.empty(0, dtype=store.columns["states"][0]).element_size()
    per_token = StateMaker(target, StatesConfig(dtype=dtype)).bytes_per_token()
    assert per_token == 5 + 3 * target.hidden_size * size + (12 if dtype == "int8" else 0)


def test_a_store_without_them_is_refused_with_the_remedy(target, tmp_path):
    target.show([1])
    store_of(target, tmp_path / "s")
    config = TrainConfig(TargetConfig("t"), DataConfig(stores=(str(tmp_path / "s"),)), "o")
    data = load_training_data(config, target)
    target.show([2])
    with pytest.raises(InputError, match=r"layers \[2\], which head\.aux_layers.*--states"):
        load_training_data(config, target)
    target.aux_layers = ()
    assert load_training_data(config, target).digest != data.digest, "other content"


# --------------------------------------------------------------------------------------- refusals


def test_what_it_cannot_do_is_refused_by_name(target, tmp_path):
    for layers in ([0], [LAYERS], [1, 9]):
        with pytest.raises(InputError, match=rf"{LAYERS} layers, of which 1 to {LAYERS - 1}"):
            target.show(layers)
    assert target.aux_layers == ()
    head = make_head(target)
    with pytest.raises(InputError, match=r"layers \[1, 2\] \(head\.aux_layers\).*engine"):
        check_depth(head, 2, "num_speculative_tokens")
    head.save_pretrained(tmp_path / "head")
    for layout in ("apple", "vllm-medusa"):
        with pytest.raises(InputError, match="no place for a context of layers"):
            convert(tmp_path / "head", layout, tmp_path / layout, target)
    made = head_class("recurrent").config_class
    for layers in ([2, 1], [1, 1], [0], ["1"], [1, "2"]):
        with pytest.raises(InputError, match=r"aux_layers = .*ascending"):
            made(vocab_size=9, hidden_size=8, aux_layers=layers).check()
    with pytest.raises(ValueError, match=r"head\.aux_layers is an option of recurrent"):
        HeadConfig(kind="mlp_speculator", aux_layers=(1,))
    given = DataConfig(stores=("s",), states=StatesConfig(aux_layers=(1,)))
    with pytest.raises(InputError, match=r"data\.states\.aux_layers is for data/states\.py"):
        check_settings(TrainConfig(TargetConfig("t"), given, "o"))


@pytest.mark.parametrize("why", ["sharded", "has_states"])
def test_targets_that_cannot_show_them_say_so(why, target, monkeypatch):
    monkeypatch.setattr(target, why, True)
    with pytest.raises(InputError, match="shows no layers but the last"):
        target.show([1])


def test_a_class_that_does_not_give_them_says_so(target, monkeypatch):
    forward = target.backbone.forward

    def silent(*args, output_hidden_states=False, **given):
        return forward(*args, **given)

    monkeypatch.setattr(target.backbone, "forward", silent)
    with pytest.raises(InputError, match="does not give its layers' hidden states"):
        target.show([1])
    assert target.aux_layers == ()
