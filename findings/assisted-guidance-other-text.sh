#!/usr/bin/env bash
# With classifier-free guidance, assisted greedy text is not the plain greedy text.
#
# Versions:  torch 2.13.0, transformers 5.23.0
# Expected:  generate(guidance_scale=...) says the same greedily with and without prompt lookup
#            or an assistant model, as it does with every other logits processor tried
#            (repetition_penalty, no_repeat_ngram_size, min_new_tokens, suppress_tokens, ...),
#            or it refuses the combination.
# Happens:   the guidance processor holds a key-value cache of the unconditional branch and adds
#            the last token at each call. Verification calls it for each drafted token, rejected
#            ones too, and nothing is rolled back: the cache goes out of step and the text
#            changes. No error, no warning. float64, so not a matter of rounding.
# Matters:   a logits processor with state cannot be called on drafted tokens. A decoder has to
#            know which processors are functions of (ids, scores) and refuse the others.
# Seen:      control  lookup 0 of 4 texts changed
#            control  model  0 of 4 texts changed
#            guidance lookup 3 of 4 texts changed
#            guidance model  4 of 4 texts changed
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
import copy

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.5,
)
model = LlamaForCausalLM(config).double().eval()
assistant = copy.deepcopy(model)
with torch.no_grad():
    for weight in assistant.parameters():
        weight.add_(0.01 * torch.randn_like(weight))
ways = {"lookup": {"prompt_lookup_num_tokens": 4}, "model": {"assistant_model": assistant}}
settings = {"control": {"repetition_penalty": 1.3}, "guidance": {"guidance_scale": 1.5}}
changed = {}
for setting, what in settings.items():
    for way, how in ways.items():
        changed[setting, way] = 0
        for seed in range(4):
            torch.manual_seed(seed)
            prompt = torch.randint(3, 40, (1, 8))
            plain = model.generate(prompt, max_new_tokens=24, do_sample=False, **what)
            drafted = model.generate(prompt, max_new_tokens=24, do_sample=False, **what, **how)
            changed[setting, way] += plain.tolist() != drafted.tolist()
        print(f"{setting:8} {way:6} {changed[setting, way]} of 4 texts changed")
for way in ways:
    assert changed["control", way] == 0
    assert changed["guidance", way] > 0, f"guidance and {way} agree now"
PYTHON
