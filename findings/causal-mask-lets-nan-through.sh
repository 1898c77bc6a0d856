#!/usr/bin/env bash
# A token that overflows makes the logits of EARLIER tokens nan: a mask does not hide nan.
#
# Versions:  torch 2.13.0, transformers 5.23.0 (float16, CPU)
# Expected:  causal attention makes logits of position i a function of tokens 0..i. What comes
#            later, or is masked out, cannot reach them.
# Happens:   attention gives a hidden key the weight 0 and still multiplies its value: 0 * nan
#            is nan. In a forward pass whose last token overflows float16 (finite weights, inf
#            in the residual stream), every row is nan, from the first on, with eager attention
#            and with sdpa; without that token all are finite. How far back it reaches depends
#            on the kernel: is_causal=True of the fused CPU kernel skips whole blocks, so of 700
#            rows those before 512 stay finite, while the same mask given as a tensor (bool,
#            -inf or finfo.min) loses all; a nan in a hidden KEY harms nothing under is_causal
#            and everything under a mask.
# Matters:   verifying a draft: a rejected token that overflows changes the accepted ones, which
#            plain decoding would have got right. Same for cache slots left uninitialised and
#            for padding: hidden values must be finite, not just hidden.
# Seen:      eager rows finite: alone [True, True, True, True],
#                before the loud token [False, False, False, False]     (sdpa: the same)
#            nan in the last key  : first row lost is_causal None, bool, -inf, finfo.min 0
#            nan in the last value: first row lost is_causal 512,  bool, -inf, finfo.min 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cd "$work"
"$VENV/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
LOUD = 39
config = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.2, tie_word_embeddings=False,
)
model = LlamaForCausalLM(config).half().eval()
with torch.no_grad():
    # Each weight is finite; the first MLP pushes this token's stream over float16's 65504.
    model.model.embed_tokens.weight[LOUD] = 65504.0
    model.model.layers[0].mlp.down_proj.weight.mul_(500.0)
assert all(weight.isfinite().all() for weight in model.parameters())
prefix = torch.tensor([[5, 6, 7, 8]])
drafted = torch.tensor([[5, 6, 7, 8, LOUD]])
for attention in ("eager", "sdpa"):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        alone = model(prefix).logits.isfinite().all(-1)[0].tolist()
        beside = model(drafted).logits[:, :4].isfinite().all(-1)[0].tolist()
    print(f"{attention:5} rows finite: alone {alone}, before the loud token {beside}")
    assert all(alone) and not any(beside)

rows = 700
query, key, value = (torch.randn(1, 1, rows, 16) for _ in range(3))
keep = torch.ones(rows, rows, dtype=torch.bool).tril()
masks = {
    "is_causal": {"is_causal": True},
    "bool": {"attn_mask": keep},
    "-inf": {"attn_mask": torch.zeros(rows, rows).masked_fill(~keep, -torch.inf)},
    "finfo.min": {
        "attn_mask": torch.zeros(rows, rows).masked_fill(~keep, torch.finfo(torch.float32).min)
    },
}
first_nan = {}
for where in ("key", "value"):
    spoiled = {"key": key.clone(), "value": value.clone()}
    spoiled[where][..., -1, :] = torch.nan
    for name, mask in masks.items():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(query, spoiled["key"], spoiled["value"], **mask)
        bad = out.isnan().any(-1)[0, 0, :-1].nonzero()
        first_nan[where, name] = int(bad[0]) if len(bad) else None
        print(f"nan in the last {where:5}, mask {name:9} first row lost: {first_nan[where, name]}")
assert first_nan["key", "is_causal"] is None
assert 0 < first_nan["value", "is_causal"] < rows - 1
for name in ("bool", "-inf", "finfo.min"):
    assert first_nan["key", name] == first_nan["value", name] == 0
PYTHON
