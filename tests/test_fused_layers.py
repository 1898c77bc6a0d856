"""All layers in one call: what the kernels compute step by step, to the last bit."""

import copy
import ctypes

import pytest
import torch
from models import tiny

from redrafter import kernels, products
from redrafter.config import TargetConfig
from redrafter.targets.fused_layers import Decoder, Layer, LayersInOneCall, Map
from redrafter.targets.load import load_target
from redrafter.targets.probe import prefilled

FAMILIES = {
    "llama": (dict(num_key_value_heads=2), "float32"),
    "llama-half": (dict(num_key_value_heads=2), "bfloat16"),
    "mistral": (dict(sliding_window=4), "float32"),
    "qwen2-windows": (
        dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
             layer_types=["sliding_attention", "full_attention"]), "float32"
    ),  # a window in one layer of two
    "qwen2": (dict(num_key_value_heads=2), "bfloat16"),  # biases
    "qwen3": ({}, "float32"),  # norms of heads
}


@pytest.fixture(scope="module", params=FAMILIES)
def target(request, tmp_path_factory):
    place, (changes, dtype) = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    model = tiny.__wrapped__(request.param.split("-")[0], **changes).model.float()
    for name, vector in model.named_parameters():
        if vector.dim() == 1:  # norms and biases are alike and zero otherwise
            torch.nn.init.normal_(vector, "norm" in name, 0.2)
    if dtype == "bfloat16":  # values are sums of two: where rows are rounded, many lie between two
        for layer in model.model.layers:
            values = layer.self_attn.v_proj.weight.data.zero_()
            values[:, 0] = values.diagonal()[:] = 1
    model.save_pretrained(place)
    made = load_target(TargetConfig(path=str(place), device="cpu", dtype=dtype))
    if products.kernels is None or made.fused.own_steps is None:
        pytest.skip("no kernels make this target's steps on this machine")
    return made


def forwards(target, monkeypatch, stepwise):
    """Hidden states, keys and values, entries written and how often layers went in one call: of
    ragged rows with three tokens more, of which some are padding; then all committed, of a tree;
    then of rows of one length."""
    done, call = [], LayersInOneCall.__call__

    def watched(self, *given):
        done.append(False if stepwise else call(self, *given))
        return done[-1]

    monkeypatch.setattr(LayersInOneCall, "__call__", watched)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (3, 9), generator=generator)
    found = []
    for lengths in ([9, 4, 6], [5, 5, 5]):
        cache, logits = prefilled(target, tokens, lengths, 8)
        found.append(logits)
        position = cache.length[:, None] + torch.tensor([0, 1, 1])  # the last two are siblings
        among = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
        padding = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
        cache.prepare(3, padding)
        keys = torch.arange(cache.width).expand(3, -1)
        seen = (keys < cache.length[:, None])[:, None].expand(-1, 3, -1).clone()
        place = position.clone()
        for row, start in enumerate(cache.lengths):
            seen[row, :, start : start + 3] = among
        reached = keys.clone()
        for row, start in enumerate(cache.lengths):
            reached[row, start : start + 3] = place[row]
        masks = target.masks(seen, position, reached)
        found.append(target.forward(tokens[:, :3], position, masks, cache).hidden)
        found += [store.clone() for store in cache._groups]
        found.append(torch.tensor(cache.bytes_moved))
    monkeypatch.setattr(LayersInOneCall, "__call__", call)
    return found, done


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_in_one_call_are_those_step_by_step(target, monkeypatch, threads):
    torch.set_num_threads(threads)
    monkeypatch.setattr(type(products.kernels), "small", 0)  # all threads, whatever there is to do
    try:
        wanted, none = forwards(target, monkeypatch, stepwise=True)
        found, done = forwards(target, monkeypatch, stepwise=False)
    finally:
        torch.set_num_threads(1)
    # The first forward of a cache makes it, and the first of all lays the weights out.
    assert done == [False, True, False, True] and not any(none)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


@torch.inference_mode()
def test_weights_in_another_place_are_read_there(target, monkeypatch):
    forwards(target, monkeypatch, stepwise=False)
    layer = target.model.model.layers[1]
    norm, kept = layer.input_layernorm, layer.input_layernorm.weight
    with torch.inference_mode(False):
        norm.weight = torch.nn.Parameter(kept.detach() * 2, False)
    try:
        if not target.fused.untouched:  # of bfloat16 the class's own forward stands in
            return
        target.fused.renew()
        wanted, _ = forwards(target, monkeypatch, stepwise=True)
        found, done = forwards(target, monkeypatch, stepwise=False)
        assert any(done) and all(map(torch.equal, found, wanted))
    finally:
        norm.weight = kept
        target.fused.renew(surely=True)


@torch.inference_mode()
def test_matrices_that_change_are_read_anew(target, monkeypatch):
    before, _ = forwards(target, monkeypatch, stepwise=False)
    matrix = target.model.model.layers[0].mlp.down_proj.weight
    matrix.data.mul_(2)  # without a trace, as adapters are merged
    try:
        wanted, _ = forwards(target, monkeypatch, stepwise=True)
        found, done = forwards(target, monkeypatch, stepwise=False)
    finally:
        matrix.data.mul_(0.5)
        target.fused.renew(surely=True)
    assert any(done) and all(map(torch.equal, found, wanted))
    assert not torch.equal(found[1], before[1])


@torch.inference_mode()
def test_a_copy_has_addresses_of_its_own(target, monkeypatch):
    forwards(target, monkeypatch, stepwise=False)
    assert target.fused.in_one_call._known is not None
    copied = copy.deepcopy(target.fused.in_one_call)
    assert copied._known is None and copied._products[0] is not target.fused.layers[0].qkv.product


@torch.inference_mode()
def test_a_position_without_a_rotation_is_an_error(target):
    cache, _ = prefilled(target, torch.tensor([[5, 6, 7]]), [3], 4)
    cache.prepare(1)
    mask = target.masks(torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([[3]]),
                        torch.arange(4)[None])  # fmt: skip
    with pytest.raises(IndexError, match="not all among"):
        target.forward(torch.tensor([[5]]), torch.tensor([[1 << 20]]), mask, cache)


@pytest.mark.parametrize(("structure", "name"), [
    (Map, "map"), (Layer, "layer"), (Decoder, "decoder"),
])  # fmt: skip
def test_structures_are_the_sources(structure, name):
    text = (kernels.SOURCES / "layers.c").read_text()
    text = text.split(f"struct {name} {{", 1)[1].split("};", 1)[0]
    lines = [line.split("/*")[0].strip(" ;") for line in text.splitlines()]
    names = [
        part.strip(" *") for line in lines if line and not line.startswith(("*", "/"))
        for part in line.removeprefix("const ").removeprefix("struct ").split(" ", 1)[1].split(",")
    ]  # fmt: skip
    wanted = ["inputs" if part == "in" else part for part in names]
    assert wanted == [field for field, _ in structure._fields_]
    assert ctypes.sizeof(structure) % 8 == 0
