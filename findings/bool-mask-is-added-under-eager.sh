#!/usr/bin/env bash
# A boolean tree mask is right under sdpa and added as numbers under eager attention.
#
# Versions:  torch 2.13.0, transformers 5.23.0
# Expected:  attention_mask of four dimensions, boolean, True where a token may look, gives the
#            logits of the branch alone, by any attention implementation, or raises an error.
# Happens:   such a mask is handed on as it is. sdpa takes it as a mask; eager adds it to the
#            scores, so that True is +1, False is 0, and every token sees every other, later ones
#            too. The same under both for a mask of ones and zeros in the model's dtype. No
#            error, no warning, and finite logits. (0 and -inf is right under both.)
# Matters:   trees of drafted tokens are verified by such masks. Whoever changes to eager, to see
#            attention weights or because a model has nothing else, verifies against nonsense.
# Seen:      (logits of two siblings in a tree, beside those of each branch alone)
#            eager bool 4.8,     ones and zeros 4.8, zeros and -inf 1.8e-15
#            sdpa  bool 8.9e-16, ones and zeros 4.8, zeros and -inf 8.9e-16
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
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.5,
)
model = LlamaForCausalLM(config).double().eval()
# A prompt of three tokens, and two guesses for the fourth: siblings, which must not see each other.
tree = torch.tensor([[5, 6, 7, 8, 9]])
places = torch.tensor([[0, 1, 2, 3, 3]])
sees = torch.ones(5, 5, dtype=torch.bool).tril()
sees[4, 3] = False
masks = {
    "bool": sees,
    "ones and zeros": sees.double(),
    "zeros and -inf": torch.zeros(5, 5).double().masked_fill(~sees, -torch.inf),
}
branches = {3: torch.tensor([[5, 6, 7, 8]]), 4: torch.tensor([[5, 6, 7, 9]])}
off = {}
for attention in ("eager", "sdpa"):
    model.set_attn_implementation(attention)
    for name, mask in masks.items():
        with torch.no_grad():
            together = model(tree, attention_mask=mask[None, None], position_ids=places).logits
            gaps = [
                (together[0, node] - model(alone).logits[0, -1]).abs().max().item()
                for node, alone in branches.items()
            ]
        off[attention, name] = max(gaps)
        assert together.isfinite().all()
        print(f"{attention:5} {name:14} off by {max(gaps):.2g}")
for attention in ("eager", "sdpa"):
    assert off[attention, "zeros and -inf"] < 1e-5
    assert off[attention, "ones and zeros"] > 0.1
assert off["sdpa", "bool"] < 1e-5
assert off["eager", "bool"] > 0.1, "eager attention takes boolean masks now"
PYTHON
