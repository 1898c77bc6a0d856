"""Every causal language model that transformers knows, tiny, from its configuration alone.

`outcome` says how the project serves one; `families.json` holds what is known (the test is
`test_families.py`). Weights are drawn wide, so that a text depends on all that precedes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import replays
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from redrafter.contracts import InputError
from redrafter.decode.noise import gumbel
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.targets.model import Target

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TABLE = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))

VOCAB, WIDTH, CONTEXT, WINDOW, NEW = 64, 32, 64, 6, 8
LENGTHS = (7, 2, 4)
SEEDS = (3, 4, 5)
MOST = 4_000_000  # parameters: what is larger was not made tiny by what stands here

#: Given to every configuration (and to those inside) that has a field of the name. Sizes that are
#: all alike would hide a confusion of two, so they are not.
_SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    is_decoder=True, max_position_embeddings=CONTEXT, n_positions=CONTEXT, sliding_window=WINDOW,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mlp_dim", "intermediate_size_mlp"), 48),
    num_key_value_heads=2, head_dim=8, num_experts=4, num_local_experts=4, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    moe_topk=2, n_group=1, topk_group=1, zero_expert_num=1, expert_ffn_hidden_size=16,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, image_size=28, patch_size=14,
    state_size=8, mamba_d_state=8, ssm_state_size=8, mamba_d_ssm=64, mamba_num_heads=8,
    mamba_head_dim=8, mamba_n_heads=8, mamba_d_head=8, n_groups=1, chunk_size=4,
    mamba_chunk_size=4, moe_shared_expert_intermediate_size=16, num_experts_per_token=2,
    num_expert_group=1, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_head_dim=8, linear_num_heads=4, mamba_headdim=8,
    codebook_size=16, base_channels=32, num_mel_bins=8, embed_dim=4,
    image_token_id=VOCAB - 1, audio_token_id=VOCAB - 2, video_token_id=VOCAB - 3,
)  # fmt: skip
#: Their own code fails in float64, with no code of ours about.
_SINGLE = ("xglm", "xlnet", "inkling2_text")
#: Not given where a family has none by default.
_NO_WINDOW = ("sliding_window",)

_MLA = dict(head_dim=4, num_key_value_heads=4)
_MIXED = dict(layer_types=["linear_attention", "full_attention"])
_ROPE = dict(rope_type="default", rope_theta=10000.0)
_KINDS = ["sliding_attention", "full_attention"]
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _MLA),
    "axk2": dict(**_MLA, num_hidden_layers=3),
    "bamba": dict(attn_layer_indices=[1]),
    "bailing_hybrid": dict(num_key_value_heads=4, **_MIXED),
    "codegen": dict(rotary_dim=4),
    "gptj": dict(rotary_dim=4),
    "cohere_compass_text": dict(
        layer_types=_KINDS, rope_parameters=dict.fromkeys(_KINDS, _ROPE)),
    "dbrx": dict(attn_config=dict(clip_qkv=8.0, kv_n_heads=2, rope_theta=10000.0),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2,
                                 ffn_act_fn={"name": "silu"})),
    "cohere2": dict(layer_types=_KINDS),
    "cohere2_moe": dict(layer_types=_KINDS),
    "dots1": dict(n_shared_experts=1),
    "dots3_note_text": dict(num_key_value_heads=4, head_dim=10),
    "gemma2": dict(layer_types=_KINDS),
    "gemma3_text": dict(layer_types=_KINDS),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=_KINDS,
                         activation_sparsity_pattern=[0.0, 0.0]),
    "gemma4_text": dict(layer_types=_KINDS),
    "gemma4_unified_text": dict(layer_types=_KINDS),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(num_key_value_heads=4, **_MIXED),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8, head_dim=8),
    "nemotron_h": dict(layer_types=["linear_attention", "moe", "full_attention"],
                       num_hidden_layers=3),
    "olmo_hybrid": _MIXED,
    **{family: dict(text_config=_MIXED) for family in ("qwen3_5", "qwen3_5_moe")},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _MIXED),
    "reformer": dict(axial_pos_embds=False, attention_head_size=8, attn_layers=["local", "lsh"],
                     local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=2),
    "roc_bert": dict(pronunciation_vocab_size=VOCAB, shape_vocab_size=VOCAB,
                     pronunciation_embed_dim=8, shape_embed_dim=8),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["mamba", "hybrid"]),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    return _small(CONFIG_MAPPING[family], _OWN.get(family, {}) | changes)


def _small(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    default, own = kind(), dict(own)
    fields = default.to_dict()
    made = {}
    for name, value in _SMALL.items():
        if name in fields and not (name in _NO_WINDOW and fields[name] is None):
            made[name] = value
    for name in default.sub_configs:
        inside = getattr(default, name, None)
        if inside is not None:
            made[name] = _small(type(inside), own.pop(name, {})).to_dict()
    return kind(**{**made, **own})


def build(family: str, **changes: Any) -> Any:
    """The model, in float64 where its class can compute in it. Whatever it raises comes out.

    changes: fields of its configuration
    """
    dtype = torch.float32 if family in _SINGLE else torch.float64
    config = config_of(family, **changes)
    if family not in TABLE:  # what is in it was made here before
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST:
            raise MemoryError(f"{size} parameters: give the family its sizes in tests/families.py")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


# ------------------------------------------------------------------------------------ outcome


def prompts(vocab: int = VOCAB) -> list[list[int]]:
    """Ragged; no id that any family gives a meaning."""
    random = torch.Generator().manual_seed(0)
    return [torch.randint(8, vocab - 8, (n,), generator=random).tolist() for n in LENGTHS]


def outcome(model: Any) -> str:
    """What `families.json` says: "exact", "exact: chains" where only these can be verified, or
    "refused: " and why.

    Raises AssertionError where a text is not the model's own, and whatever else goes wrong.
    """
    try:
        target = Target(model)
    except InputError as error:
        return f"refused: {error}"
    # Greedily: where a family scales its logits down, noise would choose more of a drawn text than
    # the model. How tokens come of logits is the same for all: `test_exactness.py`.
    check_texts(target, sampled=False)
    return "exact" if target.verifies == "trees" else "exact: chains"


def check_texts(target: Target, sampled: bool) -> None:
    """Ragged rows, plain and drafted, against forwards of the model alone on each row."""
    rows = prompts()
    free = dict(do_sample=True, temperature=1.3) if sampled else {}
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, **free)
    made = plain(target, rows, config, seeds=SEEDS).tokens
    texts = [row + text for row, text in zip(rows, made, strict=True)]
    assert len({t for text in made for t in text}) > len(rows), f"texts that show nothing: {made}"
    for row, text, seed in zip(rows, texts, SEEDS, strict=True):
        want = own_choices(target.model, text, seed, 1.3 if sampled else None)
        assert text[len(row) :] == want[len(row) - 1 : -1], "plain, against fresh forwards"
    drafters = replays(texts, target.vocab_size)
    for name in ("half", "often"):
        got = speculative(target, rows, config, seeds=SEEDS, drafter=drafters[name])
        assert got.tokens == made, f"drafted ({name}), against plain"
        assert sum(got.stats.accepted_at) > 0, "nothing was accepted"


@torch.inference_mode()
def own_choices(model: Any, text: list[int], seed: int, temperature: float | None) -> list[int]:
    """What follows each prefix of a text, as the bare model says."""
    logits: Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    if temperature is not None:
        position = torch.arange(1, len(text) + 1)[None]
        noise = gumbel(torch.tensor([seed]), position, logits.shape[-1])[0]
        logits = (logits / temperature).log_softmax(-1) + noise
    return logits.argmax(-1).tolist()
