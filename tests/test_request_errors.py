"""What cannot be served is refused before any work, and the message names the culprit."""

import pytest
import torch
from models import CONTEXT, VOCAB, prompts, settings, tiny
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.dummy import DummyDrafter
from redrafter.targets.load import load_target
from redrafter.targets.model import Target

LOOPS = pytest.mark.parametrize("decode", [plain, speculative])


@pytest.fixture(autouse=True)
def no_forward(monkeypatch):
    """A refusal comes before the first forward."""

    def forward(*args, **kwargs):
        raise AssertionError("the target was run for a request that cannot be served")

    monkeypatch.setattr(tiny("llama"), "forward", forward)


def refused(decode, *words, rows=None, config=None, **more):
    """Both loops, and with a drafter; each of `words` stands in the message."""
    rows = prompts() if rows is None else rows
    with pytest.raises(InputError) as error:
        decode(tiny("llama"), rows, config or settings(), drafter=DummyDrafter(), **more)
    for word in words:
        assert str(word) in str(error.value)


# ------------------------------------------------------------------- prompts


@LOOPS
def test_prompts(decode):
    refused(decode, "no prompts", rows=[])
    refused(decode, "prompt 1", "empty", rows=[[3], [], [4]])
    refused(decode, "prompt 1", VOCAB, f"id {VOCAB}", "LlamaForCausalLM", rows=[[3], [VOCAB, 1]])
    refused(decode, "prompt 0", "-100", rows=[[3, -100]])
    refused(decode, "(4,)", rows=torch.ones(4).long())
    masked = torch.zeros(2, 3).long()
    masked[0] = 1
    refused(decode, "prompt 1", "empty", rows=torch.ones(2, 3).long(), attention_mask=masked)
    refused(decode, "attention_mask", "(2, 3)", "(2, 4)",
            rows=torch.ones(2, 3).long(), attention_mask=torch.ones(2, 4).long())  # fmt: skip
    refused(decode, "attention_mask", rows=[[1, 2]], attention_mask=torch.ones(1, 2).long())


@LOOPS
def test_prompt_longer_than_the_context(decode):
    for n in (CONTEXT, CONTEXT + 5):
        refused(decode, n, f"context of {CONTEXT}", rows=prompts((4, n)))


# ------------------------------------------------------------------- generation_config


@LOOPS
@pytest.mark.parametrize(
    "field",
    [
        {"num_beams": 2},
        {"num_return_sequences": 3},
        {"diversity_penalty": 0.5},
        {"penalty_alpha": 0.6},
        {"guidance_scale": 1.5},
        {"forced_eos_token_id": 3},
        {"forced_bos_token_id": 3},
        {"exponential_decay_length_penalty": (3, 1.1)},
        {"begin_suppress_tokens": [4]},
        {"encoder_repetition_penalty": 1.1},
        {"encoder_no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 5.0},
        {"top_h": 0.4},
    ],
    ids=lambda field: next(iter(field)),
)
def test_unsupported_fields(decode, field):
    config = settings()
    for name, value in field.items():
        setattr(config, name, value)
        refused(decode, name, value, config=config)


@LOOPS
def test_limits(decode):
    refused(decode, "max_new_tokens", "max_length", config=GenerationConfig())
    refused(decode, "14", "max_length", config=GenerationConfig(max_length=10))
    none = GenerationConfig()
    none.max_new_tokens = 0  # its constructor would refuse
    refused(decode, "raise max_new_tokens", config=none)


@LOOPS
def test_stop_strings_without_a_tokenizer(decode):
    refused(decode, "stop_strings", "tokenizer", config=settings(stop_strings=["x"]))


@LOOPS
def test_seeds(decode):
    config = settings(do_sample=True)
    refused(decode, "seeds", "3 given for 4", config=config, seeds=[1, 2, 3])
    refused(decode, "seeds", 2**64, config=config, seeds=2**64)


@LOOPS
def test_a_streamer_takes_one_row(decode):
    refused(decode, "streamer", 4, streamer=BaseStreamer())


# ------------------------------------------------------------------- targets


def save(folder):
    tiny("llama").model.save_pretrained(folder)
    return str(folder)


def test_folders_that_are_no_model(tmp_path):
    missing = str(tmp_path / "missing" / "folder")
    with pytest.raises(InputError, match=missing):
        load_target(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty.*config\.json"):
        load_target(str(tmp_path / "empty"))
    file = tmp_path / "file.bin"
    file.write_text("x")
    with pytest.raises(InputError, match=str(file)):
        load_target(str(file))
    with pytest.raises(InputError, match="no-such-owner/no-such-model"):
        load_target("no-such-owner/no-such-model")


def test_a_damaged_checkpoint(tmp_path):
    weights = tmp_path / "model.safetensors"
    load_target(save(tmp_path))
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b""):
        weights.write_bytes(broken)
        with pytest.raises(InputError, match=str(tmp_path)):
            load_target(str(tmp_path))
    weights.unlink()
    with pytest.raises(InputError, match=str(tmp_path)):
        load_target(str(tmp_path))
    weights.write_bytes(whole)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_target(str(tmp_path))


def test_a_loaded_target_is_the_saved_one(tmp_path):
    target = load_target(TargetConfig(save(tmp_path), device="cpu", dtype="float64"))
    assert target.fingerprint() == tiny("llama").fingerprint()
    assert load_target(str(tmp_path)).dtype == torch.float32  # the default on a CPU
    assert not any(p.requires_grad for p in target.model.parameters())
    assert not target.model.training
    other = tiny("llama", num_hidden_layers=1)
    assert other.fingerprint() != target.fingerprint()


SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
UNFIT = {
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2),
    "falcon": dict(alibi=True),
    "doge": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4),
    "recurrent_gemma": dict(num_key_value_heads=1),
    "rwkv": {},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_target_whose_keys_cannot_be_masked(kind):
    config = AutoConfig.for_model(kind, **{**SMALL, **UNFIT[kind]})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError) as error:
        Target(model)
    assert type(model).__name__ in str(error.value) and kind in str(error.value)
    assert "neither a token tree nor a chain can be verified" in str(error.value)


def test_longrope_ends_where_its_rotations_change():
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    changes = dict(original_max_position_embeddings=16, max_position_embeddings=CONTEXT)
    config = AutoConfig.for_model("phi3", **{**SMALL, **changes}, rope_parameters=rope)
    assert Target(AutoModelForCausalLM.from_config(config)).max_positions == 16


def test_a_target_that_changes_its_logits_behind_lm_head():
    model = AutoModelForCausalLM.from_config(tiny("llama").config)
    lm_head = model.lm_head
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 3 * out.logits + 1
        return out

    model.forward = scaled
    assert lm_head is model.get_output_embeddings()
    with pytest.raises(InputError, match="LlamaForCausalLM changes its logits"):
        Target(model)


def test_a_model_without_lm_head():
    with pytest.raises(InputError, match="LlamaModel has no lm_head"):
        Target(tiny("llama").backbone)
