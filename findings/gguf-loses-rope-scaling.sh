#!/usr/bin/env bash
# A model read from a GGUF file rotates positions as if they were not stretched: transformers leaves out
# rope.scaling.*, and the tensor by which Llama 3.1 and later say it, and for StarCoder2 the base.
#
# Versions:  torch 2.13.0, transformers 5.23.0, gguf 0.19.0
# Expected:  a Llama whose GGUF file says `rope.scaling.type` linear or yarn, or has `rope_freqs.weight` (which is
#            all that llama.cpp's converter writes of rope_type llama3), computes what the model computed that
#            it was made from; or from_pretrained(..., gguf_file=...) warns.
# Happens:   config.rope_parameters is {'rope_type': 'default', ...}. Nothing is missing, nothing unexpected, nothing
#            is said; scores are another model's. StarCoder2's `rope.freq_base` is not read either: 10000.
# Matters:   GGUF files of Llama 3.1, 3.2 and 3.3 and of models stretched to longer texts: a draft head trained on
#            what such a target says has learned from a model that nobody serves. Check rope_parameters, or give
#            the model that the file was made from.
# Seen:      of 200 positions of random weights the likeliest token is another one at 19 (llama3), 177 (linear),
#            88 (yarn), 173 (starcoder2), at none without stretching
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
fi
cd "$work"
cat >rope.py <<'PYTHON'
import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import Starcoder2Config, Starcoder2ForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    max_position_embeddings=16384, bos_token_id=None, eos_token_id=None,
)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
CASES = {
    "default": {}, "llama3": dict(factor=8.0, **LLAMA3), "linear": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=4096),
}


def write(model, kind):
    """As llama.cpp's converter would."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(f"{kind}.gguf", arch)
    writer.add_name(kind)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    if arch == "llama":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        own = model.model.rotary_emb.inv_freq
        usual = rope["rope_theta"] ** -(torch.arange(len(own)) / len(own))
        writer.add_tensor("rope_freqs.weight", (usual / own).numpy())
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # neighbours are rotated
            value = value.view(2, 2, 16, -1).swapaxes(1, 2).reshape(value.shape)
        if not (stem == "lm_head" and config.tie_word_embeddings):
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def differing(model, kind):
    write(model.eval(), kind)
    read, info = AutoModelForCausalLM.from_pretrained(
        ".", gguf_file=f"{kind}.gguf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert read.config.rope_parameters["rope_type"] == "default"
    with torch.no_grad():
        return int((model(ids).logits.argmax(-1) != read(ids).logits.argmax(-1)).sum())


torch.manual_seed(0)
ids = torch.randint(0, 64, (1, 200))
found = {}
for kind, rope in CASES.items():
    rope = {"rope_type": kind, "rope_theta": 10000.0, **rope}
    found[kind] = differing(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)), kind)
rope = {"rope_type": "default", "rope_theta": 999999.0}
config = Starcoder2Config(**SIZES, rope_parameters=rope)
found["starcoder2"] = differing(Starcoder2ForCausalLM(config), "starcoder2")
print(found)
assert found.pop("default") == 0 and min(found.values()) > 0
PYTHON
HF_HUB_OFFLINE=1 "$VENV/bin/python" rope.py 2>errors || { cat errors >&2; exit 1; }
! grep -i "rope\|scaling" errors  # nothing is said of it
