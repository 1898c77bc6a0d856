"""What is loaded is what the checkpoint holds, and what is refused says why."""

import copy
import logging
import warnings

import pytest
import torch
from families import build, check_texts
from models import prompts, settings, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.targets.checkpoint import _one_report
from redrafter.targets.load import load_target
from redrafter.targets.model import Target

# ---------------------------------------------------------------- checkpoints with gaps


def saved(folder, model=None) -> str:
    (tiny("llama").model if model is None else model).save_pretrained(folder)
    return str(folder)


def rewrite(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("places", ["whole", "device_map"])
def test_a_checkpoint_that_lacks_weights(tmp_path, places):
    gone = "model.layers.1.mlp.up_proj.weight"
    config = TargetConfig(
        saved(tmp_path), device="cpu", device_map="auto" if places == "device_map" else "none"
    )
    load_target(config)
    rewrite(tmp_path, lambda weights: weights.pop(gone))
    with pytest.raises(InputError, match="drawn at random") as error:
        load_target(config)
    assert gone in str(error.value) and str(tmp_path) in str(error.value)
    rewrite(tmp_path, lambda weights: [weights.pop(n) for n in list(weights) if "layers.0" in n])
    with pytest.raises(InputError, match=r"\.\.\. \(10 in all\)"):
        load_target(config)


def test_a_bare_backbone_and_a_classifier_are_no_causal_lm(tmp_path):
    backbone = copy.deepcopy(tiny("llama").model.model)
    with pytest.raises(InputError, match=r"lacks lm_head\.weight, which a LlamaForCausalLM needs"):
        load_target(saved(tmp_path / "bare", backbone))
    config = copy.deepcopy(tiny("llama").config)
    classifier = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(InputError, match=r"lacks lm_head\.weight"):
        load_target(saved(tmp_path / "classifier", classifier))


def test_weights_of_other_shapes_than_the_configuration(tmp_path):
    path = saved(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-8].clone()}))
    with pytest.raises(InputError, match=r"other shapes.*lm_head\.weight \(\(40, 32\), not \(48"):
        load_target(path)


@pytest.fixture
def logged():
    """What transformers logs where it loads models."""
    logger, handler, lines = logging.getLogger("transformers.modeling_utils"), logging.Handler(), []
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_weights_without_a_place_are_named_once(tmp_path, logged):
    path = saved(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"value_head.weight": torch.zeros(1)}))
    AutoModelForCausalLM.from_pretrained(path)
    assert "value_head" in logged.pop(), "transformers would say it, too"
    with pytest.warns(UserWarning, match=r"value_head\.weight") as said:
        target = load_target(path)
    assert len([w for w in said if "value_head" in str(w.message)]) == 1 and not logged
    assert target.fingerprint() == tiny("llama").fingerprint()


def test_a_report_that_an_error_refers_to_is_shown(logged):
    logger = logging.getLogger("transformers.modeling_utils")
    with pytest.raises(RuntimeError), _one_report():
        logger.warning("LlamaForCausalLM LOAD REPORT")
        assert not logged
        raise RuntimeError("for details look at the above report")
    assert logged == ["LlamaForCausalLM LOAD REPORT"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_tied_weights_are_not_missing(tmp_path, family):
    path = saved(tmp_path, tiny(family, tie_word_embeddings=True).model)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        target = load_target(TargetConfig(path, device="cpu", dtype="float64"))
    assert target.fingerprint() == tiny(family, tie_word_embeddings=True).fingerprint()


def test_the_base_of_an_adapter_is_held_to_the_same(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    base = saved(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    load_target(str(tmp_path / "adapter"))
    rewrite(tmp_path / "base", lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"lacks model\.norm\.weight"):
        load_target(str(tmp_path / "adapter"))


# ---------------------------------------------------------------- what a model ignores


def changed(change, dtype=torch.float32, **config):
    """A Llama of ours whose backbone's inputs pass through `change` first."""
    model = copy.deepcopy(tiny("llama", **config).model).to(dtype)
    forward = model.model.forward

    def other(*args, **kwargs):
        return forward(*args, **change(kwargs))

    model.model.forward = other
    return model


IGNORING = {
    "ignores position_ids": lambda given: {**given, "position_ids": None},
    "ignores masks of single keys": lambda given: {**given, "attention_mask": None},
    "numbers positions in its own way": lambda given: (
        {**given, "position_ids": 2 * given["position_ids"]}
        if given.get("position_ids") is not None else given
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", IGNORING)
def test_a_class_that_swallows_an_input(what, dtype):
    Target(changed(dict, dtype))
    with pytest.raises(InputError, match=f"LlamaForCausalLM {what}"):
        Target(changed(IGNORING[what], dtype))


def test_a_cap_on_the_logits_that_changes_them_by_a_tenth():
    model = copy.deepcopy(tiny("llama").model).float()
    forward, seen = model.forward, []

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        cap = 5.0 * float(out.logits.abs().max())
        logits = cap * torch.tanh(out.logits / cap)
        seen.append((float((logits - out.logits).abs().max()), float(out.logits.abs().max())))
        out.logits = logits
        return out

    model.forward = capped
    with pytest.raises(InputError, match="changes its logits after lm_head"):
        Target(model)
    off, largest = seen[0]
    assert 0.001 * largest < off < 0.02 * largest, "not the small change that is meant"


def test_what_sees_to_the_right_is_no_causal_lm():
    kind = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                vocab_size=48, initializer_range=0.5)  # fmt: skip
    config = AutoConfig.for_model("bert-generation", **kind)
    with pytest.raises(InputError, match="BertGenerationDecoder lets a token see what follows it"):
        Target(AutoModelForCausalLM.from_config(config))
    Target(AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bert-generation", **kind, is_decoder=True)
    ))  # fmt: skip


def test_a_window_that_is_configured_and_not_applied():
    """Moshi's, and by any number of tokens that a probe could afford it shows nothing."""
    model = build("moshi")
    model.config.sliding_window = 3000
    with pytest.raises(InputError, match="MoshiForCausalLM does not apply the window"):
        Target(model)
    assert model.config.sliding_window == 3000


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_are_the_configured_ones_after_loading(family):
    target = tiny(family, sliding_window=11)
    assert target.config.sliding_window == 11
    assert {w for w in target.windows.values() if w} == {11}


def test_numbers_that_overflow_are_called_that():
    model = copy.deepcopy(tiny("llama").model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    Target(model)
    half = copy.deepcopy(model)
    with torch.no_grad():
        half.lm_head.weight.clamp_(-6e4, 6e4)
    with pytest.raises(InputError, match=r"not finite in torch\.float16: they overflow.*float32"):
        Target(half.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi3", "mixtral"])
def test_rounding_alone_refuses_nobody(family, dtype):
    """These weights are drawn wider than any that were trained: rounding is at its worst."""
    model = build(family)
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        Target(copy.deepcopy(model).to(dtype))


def test_a_probe_changes_nothing_of_the_model():
    model = copy.deepcopy(tiny("gemma3_text").model)
    before = model.config.to_dict()
    state = torch.get_rng_state()
    target = Target(model)
    assert model.config.to_dict() == before
    assert torch.equal(state, torch.get_rng_state())
    rows = prompts()
    made = plain(target, rows, settings()).tokens
    assert made == plain(tiny("gemma3_text"), rows, settings()).tokens


# ---------------------------------------------------------------- mixtures in float64


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_mixtures_of_experts_in_float64(family, tmp_path):
    """The grouped product lacks float64; from memory they are in `test_families.py`."""
    config = TargetConfig(saved(tmp_path, build(family)), device="cpu", dtype="float64")
    target = load_target(config)
    for sampled in (False, True):
        check_texts(target, sampled)
    assert load_target(str(tmp_path)).model.config._experts_implementation == "grouped_mm"
