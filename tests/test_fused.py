"""A target's fused forward gives what its class's own does, and steps aside where it could not."""

import copy
import functools

import pytest
import torch
from head_kinds import make_head
from models import endless, prompts, replays, settings, tiny
from torch import nn
from transformers import DynamicCache

from redrafter import products
from redrafter.config import TargetConfig, TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.request import Request
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.skipping import LayerSkipping
from redrafter.evaluation.operations import of_decoding
from redrafter.products import _available
from redrafter.targets import fused, passed
from redrafter.targets.fused import KNOWN, FusedForward
from redrafter.targets.fused_steps import KernelSteps, TorchSteps
from redrafter.targets.load import load_target
from redrafter.targets.model import Target

#: every family that is fused, and what of a configuration takes another way
CASES = {
    "llama": {},
    "llama-bias": dict(attention_bias=True, mlp_bias=True),
    "llama-scaled": dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "mistral": {},
    "qwen2": dict(num_key_value_heads=1),
    "qwen2-windows": dict(
        num_key_value_heads=2, use_sliding_window=True, sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3": {},
}  # fmt: skip
MODES = {"greedy": {}, "seeded": dict(do_sample=True, temperature=0.8, top_p=0.9)}


def fresh(family, **changes):
    return tiny.__wrapped__(family, **changes).model  # one that is nobody else's


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @functools.cache
    def folder(case):
        model = fresh(case.split("-")[0], **CASES[case])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias") or "norm" in name:  # they are drawn as zeros and ones
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        place = tmp_path_factory.mktemp(case)
        model.save_pretrained(place)
        return place

    return folder


@pytest.fixture(scope="module")
def both(folders):
    """By a case: its target with the model's own forward, and as `auto` has it; in float64."""
    return functools.cache(lambda case: [load(folders(case), way) for way in ("model", "auto")])


@pytest.fixture(autouse=True, scope="module")
def probes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDRAFTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def load(folder, forward, dtype="float64"):
    return load_target(TargetConfig(str(folder), device="cpu", dtype=dtype, forward=forward))


def test_every_family_is_tried():
    assert {case.split("-")[0] for case in CASES} == set(KNOWN)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "n_rows"), [*((c, 4) for c in CASES), ("llama", 1), ("qwen3", 1)])
def test_texts_are_the_models_own(both, case, mode, n_rows):
    own, ours = both(case)
    assert own.fused is None and ours.fused is not None
    rows, config, seeds = prompts()[:n_rows], settings(**MODES[mode]), list(range(n_rows))
    wanted = plain(own, rows, config, seeds=seeds).tokens
    assert plain(ours, rows, config, seeds=seeds).tokens == wanted
    drafters = replays(endless(own, rows, config, seeds))
    for name in ("half", "chain"):
        drafter = drafters[name]
        assert speculative(ours, rows, config, seeds=seeds, drafter=drafter).tokens == wanted


@pytest.mark.parametrize("kind", ["recurrent", "medusa"])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_heads_draft_and_are_accepted_alike(both, case, kind):
    made = []
    for target in both(case):
        drafter = HeadDrafter(make_head(target, kind), target, TreeConfig(width=3, depth=3))
        for mode in MODES.values():
            made.append(speculative(target, prompts(), settings(**mode), drafter=drafter))
    half = len(made) // 2
    for a, b in zip(made[:half], made[half:], strict=True):
        assert a.tokens == b.tokens and a.stats.accepted_at == b.stats.accepted_at


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_the_models_own_up_to_rounding(folders, case, dtype):
    """No further than those from what the same weights give in float64."""
    own, ours = (load(folders(case), forward, dtype) for forward in ("model", "auto"))
    logits = [prefilled(target).double() for target in (own, ours)]
    exact = prefilled(Target(copy.deepcopy(own.model).double()))
    off = [(found - exact).abs().max() for found in logits]
    largest = exact.abs().max()
    few = 64 * torch.finfo(torch.float32).eps * largest  # of which either may have more by chance
    assert off[1] <= 2 * off[0] + few and off[0] <= torch.finfo(own.dtype).eps ** 0.5 * largest


@torch.inference_mode()
def prefilled(target):
    request = Request(target, prompts(), settings(), 0, None, None, None, None)
    return request.prefill(request.sequences(slack=1), slack=0)[1]


def test_weights_are_joined_not_copied(both, tmp_path):
    own, ours = both("qwen2")
    theirs = dict(own.model.named_parameters())
    for name, p in ours.model.named_parameters():
        assert torch.equal(p, theirs[name]) and p.is_contiguous()
    layer = ours.model.model.layers[1]
    for parts in (
        [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        [layer.mlp.gate_proj, layer.mlp.up_proj],
    ):
        storages = {p.weight.untyped_storage().data_ptr() for p in parts}
        used = sum(p.weight.numel() * p.weight.element_size() for p in parts)
        assert len(storages) == 1 and parts[0].weight.untyped_storage().nbytes() == used
    assert ours.fingerprint() == own.fingerprint()
    ours.model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", "model")
    assert again.fingerprint() == own.fingerprint()


def test_in_float32_columns_lie_together_and_nothing_is_copied(folders, tmp_path, no_kernels):
    """But for what is packed, which small layers are not."""
    own, ours = (load(folders("qwen2"), way, "float32") for way in ("model", "auto"))
    theirs, layer = dict(own.model.named_parameters()), ours.model.model.layers[1]
    assert all(torch.equal(p, theirs[name]) for name, p in ours.model.named_parameters())
    up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
    assert up.t().stride(-1) == 1 and down.is_contiguous()  # more rows than columns, and fewer
    gate_up = layer.mlp.gate_proj.weight.untyped_storage()
    assert up.untyped_storage().data_ptr() == gate_up.data_ptr()
    assert gate_up.nbytes() == 2 * up.numel() * 4
    assert ours.fingerprint() == own.fingerprint()
    ours.model.save_pretrained(tmp_path)
    assert load(tmp_path, "model", "float32").fingerprint() == own.fingerprint()


@pytest.mark.skipif(not _available(), reason="this torch packs no matrices")
def test_layers_that_are_large_are_packed_for_several_rows_until_they_change(
    monkeypatch, no_kernels
):
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "_WORK", 1)
    target = Target(fresh("llama").float(), check=lambda _: None)
    wanted = prefilled(target)
    target.fused = FusedForward(target.backbone, target.config)
    torch.testing.assert_close(prefilled(target), wanted, rtol=1e-3, atol=1e-4)
    maps = [m for x in target.fused.layers for m in (x.qkv, x.out, x.gate_up, x.down)]
    assert all(m.product._packed is not None for m in maps)
    with torch.no_grad():
        for layer in target.backbone.layers:
            layer.mlp.up_proj.weight.mul_(1.5)
            layer.self_attn.o_proj.weight.mul_(-1)
    found = prefilled(target)
    target.fused = None
    torch.testing.assert_close(found, prefilled(target), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(fused, "_PACKED", 100)
    target.fused = FusedForward(target.backbone, target.config)
    assert prefilled(target).isfinite().all()
    assert all(x.gate_up.product._packed is None for x in target.fused.layers)


@pytest.mark.skipif(not _available(), reason="this torch packs no matrices")
def test_an_adapter_is_heeded_on_a_model_that_was_used_and_merged_into_it(monkeypatch):
    """peft replaces modules, and merges into `weight.data`, which leaves no trace."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "_WORK", 1)
    target = Target(fresh("llama").float(), check=lambda _: None)
    target.fused = FusedForward(target.backbone, target.config)
    before = prefilled(target)
    wanted = peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(target.model, wanted)
    assert not target.fused.untouched
    with_it = prefilled(target)
    assert (with_it - before).abs().max() > 0.1
    adapted.merge_and_unload()
    assert target.fused.untouched
    torch.testing.assert_close(prefilled(target), with_it, rtol=1e-3, atol=1e-3)


def test_it_steps_aside_for_whoever_looks_into_the_model(both):
    (_, ours), seen = both("llama"), []
    rows, config = prompts(), settings()
    wanted = plain(ours, rows, config).tokens
    part = ours.model.model.layers[1].mlp
    handle = part.register_forward_hook(lambda *args: seen.append(1))
    assert not ours.fused.untouched
    assert plain(ours, rows, config).tokens == wanted and seen
    handle.remove()
    assert ours.fused.untouched
    part.forward = lambda x: torch.zeros_like(x)
    assert plain(ours, rows, config).tokens != wanted
    del part.forward
    drafter = LayerSkipping(ours, depth=3, fixed=(1,))
    made = speculative(ours, rows, config, drafter=drafter)
    assert made.tokens == wanted and sum(made.stats.drafted_at) > 0


def test_a_step_takes_fewer_operations(folders):
    targets = (load(folders("llama"), way, "float32") for way in ("model", "auto"))
    own, ours = (of_decoding(target, prompts()[2], {})["plain"] for target in targets)
    assert 3 * ours["launches"] <= 2 * own["launches"], (own, ours)
    assert ours["host_reads"] == own["host_reads"] == 1


def test_masks_are_laid_out_once_a_forward_and_not_in_every_layer(both, monkeypatch):
    _, ours = both("llama")
    laid, forwards, grouped, forward = [], [], TorchSteps.grouped, FusedForward.__call__

    def counted(self, mask):
        laid.append(mask)
        return grouped(self, mask)

    def called(self, *given):
        forwards.append(given)
        return forward(self, *given)

    monkeypatch.setattr(TorchSteps, "grouped", counted)
    monkeypatch.setattr(FusedForward, "__call__", called)
    prefilled(ours)
    assert len(ours.fused.layers) > 1 and len(laid) == len(forwards) > 0


@pytest.mark.parametrize("steps", [TorchSteps, KernelSteps])
def test_what_computes_something_else_is_not_taken(steps, folders, monkeypatch, tmp_path, request):
    if steps is TorchSteps:
        request.getfixturevalue("no_kernels")
    elif products.kernels is None:
        pytest.skip("no kernels could be made on this machine")
    case = "llama"
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))  # it has not passed before
    real = steps.attend

    def blind(self, q, keys, values, mask):  # sees every key
        return real(self, q, keys, values, mask * 0)

    monkeypatch.setattr(steps, "attend", blind)
    assert load(folders(case), "auto", "float32").fused is None
    with pytest.raises(InputError, match="cannot be a target"):
        load(folders(case), "fused", "float32")


def test_it_is_compared_once(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    probed, check = [], passed.check_target
    monkeypatch.setattr(
        passed, "check_target", lambda target: (probed.append(target.fused), check(target))
    )
    first, again = (load(folders("llama"), "auto") for _ in range(2))
    assert probed == [None, first.fused] and again.fused is not None


def refused(tmp_path, model, why):
    model.save_pretrained(tmp_path / "target")
    with pytest.raises(InputError, match=f"target.forward fused: .* has none, as .*{why}"):
        load(tmp_path / "target", "fused")
    assert load(tmp_path / "target", "auto").fused is None


def test_a_family_that_has_none_says_so(tmp_path):
    refused(tmp_path, tiny("gpt2").model, "model_type 'gpt2' is not one of llama, mistral")


def test_a_rotation_of_its_own_says_so(tmp_path):
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    refused(tmp_path, fresh("llama", rope_parameters=rope), "rotation of positions")


def test_what_stands_in_a_models_place_is_seen():
    target = tiny("llama")
    said = functools.partial(fused.cannot_fuse, target.model, target.backbone, target.config)
    layer = target.backbone.layers[0].mlp
    assert said() is None

    class Other(nn.Linear):
        pass

    kept = layer.up_proj
    try:
        layer.up_proj = Other(32, 48, bias=False).double()
        assert "Other is not transformers' own" in said()
        layer.up_proj = nn.Identity()
        assert "not plain ones" in said()
    finally:
        layer.up_proj = kept


def test_other_weights_and_other_caches_are_left_to_the_class(both):
    """Of a copy the joined weights are not those of its model; a cache of transformers' cannot say
    how long it may become."""
    target = both("llama")[1]
    copied = copy.deepcopy(target)
    assert target.fused.untouched and not copied.fused.untouched
    ids, cache = torch.tensor([[1, 2, 3]]), DynamicCache()
    place = torch.arange(3)[None]
    masks = target.masks(place[:, :, None] >= place[:, None], place, place)
    made = target.forward(ids, place, masks, cache).hidden
    torch.testing.assert_close(made, target.states(ids))
