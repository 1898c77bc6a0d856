"""`target.exact invariant`: a text does not change by a bit with what is computed beside it."""

import json
from functools import partial

import pytest
import torch
from models import tiny
from torch import nn
from transformers import GenerationConfig

from redrafter import products
from redrafter.cli.lossless import main as lossless
from redrafter.config import TargetConfig, TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafting import Strategy
from redrafter.evaluation.lossless import check_mode, references
from redrafter.heads.recurrent import RecurrentHead
from redrafter.kernels import Panels
from redrafter.targets import invariant
from redrafter.targets.cache import RowCache
from redrafter.targets.fused import choose_forward
from redrafter.targets.fused_steps import KernelSteps
from redrafter.targets.identity import target_identity
from redrafter.targets.invariant import Form, KernelForm, difference, find_form, in_blocks
from redrafter.targets.load import load_target
from redrafter.targets.model import Target

#: by kernels where there are any, and in blocks
WAYS = (("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "model"))


def loaded(folder, dtype: str, **options):
    return load_target(TargetConfig(path=str(folder), dtype=dtype, exact="invariant", **options))


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def target(request, tiny_target):
    dtype, forward = request.param
    made = loaded(tiny_target, dtype, forward=forward)
    kernels = forward == "auto" and products.multiplier_for(made.lm_head_weight) is not None
    assert isinstance(made.invariant, KernelForm if kernels else Form)
    return made


@pytest.fixture(scope="module")
def usual(tiny_target):
    """As it is loaded where nothing is asked for."""
    return load_target(TargetConfig(path=str(tiny_target), dtype="float32"))


def test_a_form_that_holds_is_found_and_said(usual, target):
    assert usual.invariant is None and usual.verifies == "trees"
    kernels = isinstance(target.invariant, KernelForm)
    assert target.verifies == ("trees" if kernels else "chains")
    assert (target.fused is not None) == kernels
    assert difference(target) is None
    assert str(target.invariant) in target_identity(target)["computed_in"]
    assert target_identity(usual)["computed_in"] == "float32"


def prompts_of(target, n: int = 5) -> list[list[int]]:
    ids = invariant.probe_tokens(target.vocab_size, 40 * n)[0].tolist()
    return [ids[40 * i : 40 * i + 11 + 7 * i] for i in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_and_scores_are_those_of_each_row_alone(target, temperature):
    rows = prompts_of(target, 3)
    config = GenerationConfig(max_new_tokens=12, do_sample=temperature > 0, pad_token_id=1)
    head = RecurrentHead.for_target(target)
    makers = [
        lambda texts: Strategy(PromptLookup(max_ngram=2)),
        lambda texts: Strategy(HeadDrafter(head, target, TreeConfig(width=3, depth=4))),
    ]
    plain_of = references(target, rows, config, 3)
    for make in makers:
        found = check_mode(target, make, rows, config, plain_of, (1, 3), 3)
        assert found.rows_equal == 2 * len(rows) and not found.cases
        assert found.largest_difference == 0 and found.rounding == 0


def test_near_ties_explain_nothing(target, monkeypatch):
    """A fault that the near-tie rule would explain is a failure here."""
    rows, config = prompts_of(target, 2), GenerationConfig(max_new_tokens=12, pad_token_id=1)
    plain_of = references(target, rows, config)
    forward = target.forward

    def noisy(tokens, *args, **kwargs):
        out = forward(tokens, *args, **kwargs)
        if tokens.shape[1] > 1:
            out.logits.mul_(1 + 2 * torch.finfo(target.dtype).eps)
        return out

    monkeypatch.setattr(target, "forward", noisy)
    found = check_mode(target, lambda texts: Strategy(PromptLookup(max_ngram=1)), rows, config,
                       plain_of, (1,))  # fmt: skip
    assert found.far_logits > 0


def test_states_are_of_the_weights_that_are_and_seen_by_whoever_looks(target):
    ids, seen = invariant.probe_tokens(target.vocab_size, 12), []
    layer = target.model.model.layers[0]
    before, entry = target.states(ids), layer.mlp.down_proj.weight[0, -1]  # no sampled one
    kept = entry.clone()
    with torch.no_grad():
        entry.add_(8)
        assert not torch.equal(target.states(ids), before)
        entry.copy_(kept)
    assert torch.equal(target.states(ids), before)
    handle = layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    target.states(ids)
    handle.remove()
    assert seen and torch.equal(target.states(ids), before)


def test_a_drafter_that_looks_into_the_model_changes_no_bit(target):
    """It reads the prompt once more, where looking would have the class compute."""
    rows, config = prompts_of(target, 2), GenerationConfig(max_new_tokens=12, pad_token_id=1)
    plain_of = references(target, rows, config)

    def make(texts):
        return Strategy(LayerSkipping(target, depth=2, threshold=None, max_skipped=1))

    if target.verifies == "trees":
        with pytest.raises(InputError, match="refresh=step looks into"):
            LayerSkipping(target, refresh="step")
    found = check_mode(target, make, rows, config, plain_of, (1, 2))
    assert found.rows_equal == 4 and found.largest_difference == 0


def test_a_model_that_was_changed_is_refused_where_the_kernels_would_step_aside(tiny_target):
    target = loaded(tiny_target, "float32")
    rows, config = prompts_of(target, 1), GenerationConfig(max_new_tokens=2, pad_token_id=1)
    handle = target.model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="has been changed since it was loaded"):
        plain(target, rows, config)
    handle.remove()
    assert len(plain(target, rows, config).tokens[0]) == 2
    choose_forward(Target(target.model), "auto", lambda _: None)  # joins its weights anew
    with pytest.raises(InputError, match="a second target made of it"):
        plain(target, rows, config)


# ------------------------------------------------------------------------- planted faults


def other_product(target, monkeypatch):
    """One product at another number of rows."""
    module = next(m for m in target.model.modules() if isinstance(m, nn.Linear))
    monkeypatch.setattr(module, "forward", type(module).forward.__get__(module))


def no_blocks(target, monkeypatch):
    """sdpa let in by the back door."""
    config = target.model.config
    monkeypatch.setattr(config, "_attn_implementation", config._attn_implementation)  # put back
    target.model.set_attn_implementation("sdpa")


def borders_that_move(target, monkeypatch):
    """Keys in one sum: where a library splits it moves with the cache's width."""
    block = invariant._block

    def whole(query, keys, values, *rest):
        return block(query, [torch.cat(list(keys), 1)], [torch.cat(list(values), 1)], *rest)

    monkeypatch.setattr(invariant, "_block", whole)


def in_rows(compute, x):
    return in_blocks(compute, x.numel() // x.shape[-1], x)


def rows_of_the_batch(target, monkeypatch):
    """Blocks as large as the batch."""
    for module in target.model.modules():
        if "forward" in vars(module):
            whole = module.forward.args[0]
            monkeypatch.setattr(module, "forward", partial(in_rows, whole))


@pytest.fixture(scope="module")
def blocks(tiny_target):
    """A target that computes in blocks, where that makes a difference."""
    usual = load_target(TargetConfig(path=str(tiny_target), dtype="float32", forward="model"))
    if difference(usual) is None:
        pytest.skip("this machine sums products of any shape alike: no fault of shapes can show")
    made = loaded(tiny_target, "float32", forward="model")  # whoever loads it found no difference
    yield made
    assert difference(made) is None, "a fault is still in it"


@pytest.mark.parametrize("fault", [other_product, no_blocks, borders_that_move, rows_of_the_batch])
def test_a_planted_fault_is_seen(fault, blocks, monkeypatch):
    fault(blocks, monkeypatch)
    assert difference(blocks) is not None


def torchs_attention(target, monkeypatch):
    torch_steps = target.fused.steps

    def attend(self, q, keys, values, mask):
        torch_steps.scale = self.sizes.scale
        return torch_steps.attend(q, keys, values, torch_steps.grouped(mask))

    monkeypatch.setattr(KernelSteps, "attend", attend)


def torchs_product(target, monkeypatch):
    """For single rows alone."""
    panels = Panels.__call__

    def product(self, x, add=None):
        if x.numel() > self.width:
            return panels(self, x, add)
        eye = torch.eye(self.width)
        return torch.nn.functional.linear(x, panels(self, eye).t().contiguous()) + (
            0 if add is None else add
        )

    monkeypatch.setattr(Panels, "__call__", product)


def a_path_out_of_order(target, monkeypatch):
    """Only a tree shows it: accepted nodes are left where they were drafted."""
    real = RowCache.commit
    monkeypatch.setattr(RowCache, "commit", lambda self, lengths, path=None: real(self, lengths))


@pytest.fixture(scope="module")
def by_kernels(tiny_target):
    made = loaded(tiny_target, "float32")
    if not isinstance(made.invariant, KernelForm):
        pytest.skip("no kernels could be made on this machine")
    return made


@pytest.mark.parametrize("fault", [torchs_attention, torchs_product, a_path_out_of_order])
def test_a_fault_beside_the_kernels_is_seen(fault, by_kernels, tiny_target, monkeypatch):
    fault(by_kernels, monkeypatch)
    assert difference(by_kernels) is not None
    again = loaded(tiny_target, "float32")  # then blocks are what is left
    assert isinstance(again.invariant, Form) and again.fused is None


def test_activations_of_no_whole_vectors_are_computed_in_blocks(tmp_path, monkeypatch):
    """findings/silu-depends-on-place.sh: else rows behind it would change a row."""
    made = tiny.__wrapped__("llama", intermediate_size=44, max_position_embeddings=512)
    made.model.float().save_pretrained(tmp_path)
    held = loaded(tmp_path, "float32", forward="model")
    assert isinstance(held.invariant, Form) and difference(held) is None
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("without vectors nothing depends on a place")
    for layer in held.model.model.layers:
        assert "forward" in vars(layer.mlp.act_fn)
        monkeypatch.delattr(layer.mlp.act_fn, "forward")
    assert difference(held) is not None


# ------------------------------------------------------------------------------ refusals


def test_attention_that_computes_something_else_is_refused(tiny_target, monkeypatch):
    attention = invariant.attention

    def scaled(*args, scaling=None, **options):
        return attention(*args, scaling=2 * scaling, **options)

    monkeypatch.setattr(invariant, "attention", scaled)
    with pytest.raises(InputError, match="its attention is of another kind"):
        loaded(tiny_target, "float32", forward="model")


def test_where_no_form_holds_it_is_refused(tiny_target, monkeypatch):
    monkeypatch.setattr(invariant, "difference", lambda target: "several tokens at once")
    with pytest.raises(InputError, match=r"no form of its products .* several tokens at once"):
        loaded(tiny_target, "float32")


def test_a_noisy_clock_decides_nothing(tiny_target, monkeypatch):
    seconds = {4: 0.8, 8: 1.1, 16: 1.0, 32: 2.0, 64: 4.0}
    target, used = loaded(tiny_target, "float32"), []
    monkeypatch.setattr(invariant, "_seconds", lambda target: seconds[used[-1].rows])
    monkeypatch.setattr(invariant, "difference", lambda target: None)
    assert find_form(target, used.append).rows == 16
    seconds[4] = 0.7
    assert find_form(target, used.append).rows == 4


def test_attention_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="brings its own attention"):
        TargetConfig(path="x", exact="invariant", attention="sdpa")
    with pytest.raises(ValueError, match="whole on one device"):
        TargetConfig(path="x", exact="invariant", device_map="auto")


# -------------------------------------------------------------------------- float32 logits


def test_logits_in_float32_are_the_product_of_what_the_model_computed(tiny_target):
    own = load_target(TargetConfig(path=str(tiny_target), dtype="bfloat16"))
    wide = load_target(TargetConfig(path=str(tiny_target), dtype="bfloat16", logits="float32"))
    ids = invariant.probe_tokens(own.vocab_size, 32)
    hidden = own.states(ids)
    assert torch.equal(wide.states(ids), hidden) and own.project(hidden).dtype == torch.bfloat16
    exact = hidden.double() @ own.lm_head_weight.double().T
    logits = wide.project(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert "logits in float32" in target_identity(wide)["computed_in"]


def test_both_together_through_the_command(tiny_target, tmp_path, capsys):
    assert lossless([
        f"--target.path={tiny_target}", "--target.dtype=bfloat16", "--target.exact=invariant",
        "--target.logits=float32", "--target.forward=model",
        f"--prompts={tiny_target}/prompts_heldout.jsonl",
        "--n_prompts=3", "--max_new_tokens=8", "--methods=lookup", f"--out={tmp_path / 'x.json'}",
    ]) == 0  # fmt: skip
    assert "0.0e+00" in capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())["provenance"]["target"]["computed_in"]
    assert found.startswith("bfloat16, logits in float32, blocks of ")
