"""The target without some attentions: the right forward, and nothing left behind."""

import copy

import models
import pytest
import torch
from models import alone, prompts, settings, tiny
from transformers import DynamicCache

from redrafter.contracts import InputError
from redrafter.decode.speculative import speculative
from redrafter.drafters.skipping import LayerSkipping
from redrafter.targets.model import Target
from redrafter.targets.skipping import AttentionSkipping

DEPTH = 4
DEEP = dict(num_hidden_layers=4)
OUTPUT = {"gpt2": "c_proj", "gpt_neox": "dense"}  # o_proj elsewhere
SEQUENTIAL = dict(use_parallel_residual=False)
SUPPORTED = {
    "llama": {}, "qwen3": {}, "mistral": {}, "phi3": {}, "gpt2": {}, "deepseek_v3": {},
    "gpt_neox": SEQUENTIAL,
}  # fmt: skip
AT_EVERY_STEP = dict(threshold=None, max_skipped=1, refresh="step", positions=1)


def attention_of(target: Target, layer: int):
    """By name, unlike the library."""
    (layers,) = [m for m in target.backbone.children() if isinstance(m, torch.nn.ModuleList)]
    names = ("self_attn", "attn", "attention")
    return next(getattr(layers[layer], name) for name in names if hasattr(layers[layer], name))


def silenced(target: Target, family: str, layers) -> Target:
    """A copy whose attentions of these layers say zero."""
    other = Target(copy.deepcopy(target.model))
    for layer in layers:
        output = getattr(attention_of(other, layer), OUTPUT.get(family, "o_proj"))
        with torch.no_grad():
            for p in output.parameters():
                p.zero_()
    return other


# -------------------------------------------------------------------------- the skipped forward


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("family", SUPPORTED)
def test_the_forward_is_that_of_silent_attentions(family, layers):
    target = tiny(family, **SUPPORTED[family])
    ids = torch.tensor(prompts((9, 9)))
    with AttentionSkipping(target).without_attention(layers):
        got = target.states(ids)
    torch.testing.assert_close(
        got, silenced(target, family, layers).states(ids), atol=1e-12, rtol=0
    )
    assert layers == () or not torch.allclose(got, target.states(ids), atol=1e-2)


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_skipped_layer_writes_nothing(family):
    target = tiny(family, **SUPPORTED[family])
    written = []

    class Cache(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            written.append(layer_idx)
            return super().update(keys, values, layer_idx, *args, **kwargs)

    with torch.inference_mode(), AttentionSkipping(target).without_attention([1]):
        target.backbone(input_ids=torch.tensor([[1, 2]]), past_key_values=Cache(), use_cache=True)
    assert written == [0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt_neox", {}), ("gemma3_text", {}), ("granite", dict(residual_multiplier=0.5))],
)
def test_another_residual_is_refused(family, changes, monkeypatch):
    monkeypatch.setitem(models._FAMILIES, "granite", {})
    with pytest.raises(InputError, match=rf"layer 0 of .* \({family}\) is not h -> x"):
        LayerSkipping(tiny(family, **changes))


def test_layers_without_an_attention_each_are_refused():
    target = tiny("llama")
    broken = Target(copy.deepcopy(target.model))
    broken.backbone.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(InputError, match="one attention each"):
        AttentionSkipping(broken)


def traces(target: Target):
    """Everything that a patch or a hook could leave behind."""
    return [
        (name, id(m), vars(m).get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in target.model.named_modules()
    ], [(name, p.data_ptr()) for name, p in target.model.named_parameters()]


def test_nothing_is_copied_and_nothing_stays():
    target = Target(copy.deepcopy(tiny("llama").model))
    own = attention_of(target, 0).forward
    attention_of(target, 0).forward = own  # as accelerate's hooks do
    before = traces(target)
    skipping = AttentionSkipping(target)
    with skipping.without_attention([0, 1]):
        assert [n for n, *_ in before[1]] == [n for n, _ in target.model.named_parameters()]
        assert traces(target)[1] == before[1] and traces(target)[0] != before[0]
    assert traces(target) == before
    with pytest.raises(RuntimeError, match="on purpose"):
        with skipping.without_attention([1]), skipping.measure():
            raise RuntimeError("on purpose")
    with pytest.raises(InputError, match="no layer 2"), skipping.without_attention([0, 2]):
        pass
    speculative(target, prompts(), settings(), drafter=LayerSkipping(target, **AT_EVERY_STEP))
    assert traces(target) == before


@pytest.mark.parametrize("fails", ["draft", "prefill", "verify"])
def test_a_failing_forward_leaves_nothing(fails):
    """In the middle of a layer, in each of the three kinds of forward."""
    target = Target(copy.deepcopy(tiny("llama").model))
    drafter = LayerSkipping(target, DEPTH, **AT_EVERY_STEP)
    before = traces(target)
    seen, lengths = [], []

    def bad(module, args):
        kind = {1: "draft", DEPTH + 1: "verify"}.get(args[0].shape[1], "prefill")
        if kind == fails:
            seen.append(kind)
            lengths.append(list(drafter.seqs.cache.lengths) if kind == "draft" else None)
            raise RuntimeError("on purpose")

    handle = target.backbone.layers[1].mlp.register_forward_pre_hook(bad)
    with pytest.raises(RuntimeError, match="on purpose"):
        speculative(target, prompts(), settings(), drafter=drafter)
    handle.remove()
    assert seen == [fails] and traces(target) == before
    if fails == "draft":
        assert drafter.seqs.cache.lengths == [len(row) for row in prompts()] == lengths[0]
    got = speculative(target, prompts(), settings(), seeds=range(4), drafter=drafter)
    want = alone(target, prompts(), settings())
    assert (got.tokens, got.finish) == want


def test_shares_of_weights():
    target = tiny("llama", **DEEP)
    skipping = AttentionSkipping(target)
    layer = 32 * 32 * 2 + 32 * 16 * 2  # q and o, k and v
    assert skipping.attention_weights == [layer] * 4
    every = 4 * (layer + 3 * 32 * 48 + 2 * 32) + 32 + 48 * 32
    assert skipping.weights == every
    assert skipping.weights_skipped((0, 2)) == pytest.approx(2 * layer / every)
    tied = AttentionSkipping(tiny("llama", **DEEP, tie_word_embeddings=True))
    assert tied.weights == every
