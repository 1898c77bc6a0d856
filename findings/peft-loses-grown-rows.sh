#!/usr/bin/env bash
# LoRA on the head makes peft save less: the grown rows of the embedding are lost.
#
# Versions:  torch 2.13.0, transformers 5.23.0, peft 0.21.2
# Expected:  after resize_token_embeddings, save_pretrained keeps the new rows, as its warning
#            "Setting `save_embedding_layers` to `True`" says, whatever LoRA is put on.
# Happens:   (base with untied embeddings.) LoRA on q_proj alone: both whole matrices are saved
#            and the adapter comes back exactly. LoRA on q_proj and lm_head: only the adapted
#            matrix is saved, the embedding is not, and on reload its new rows are whatever
#            the fresh resize put there. The warning is given all the same; loading is silent.
#            LoRA on embed_tokens loses the head's new rows in the same way.
# Matters:   special tokens added for a chat format lose their embeddings between training and
#            serving; a head trained on such a target meets other hidden states.
# Seen:      LoRA on q_proj and q_proj       saved ['embed_tokens', 'lm_head'], logits off by 0
#            LoRA on q_proj and lm_head      saved ['lm_head'], logits off by 0.47
#            LoRA on q_proj and embed_tokens saved ['embed_tokens'], logits off by 0.19
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile \
        torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cd "$work"
"$VENV/bin/python" - <<'PYTHON'
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
MATRICES = ("embed_tokens", "lm_head")
OLD, GROWN = 40, 44
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=OLD, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, tie_word_embeddings=False,
)
LlamaForCausalLM(config).save_pretrained("base")


def grown_base(seed):
    model = LlamaForCausalLM.from_pretrained("base")
    torch.manual_seed(seed)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    return model


ids = torch.tensor([[5, 6, 41, 42, 43]])
found = {}
for target in ("q_proj", "lm_head", "embed_tokens"):
    lora = LoraConfig(r=2, target_modules=sorted({"q_proj", target}), task_type="CAUSAL_LM")
    trained = get_peft_model(grown_base(1), lora).eval()
    trained.save_pretrained(target)
    stored = load_file(f"{target}/adapter_model.safetensors")
    whole = {m for m in MATRICES for name in stored if m in name and name.endswith(".weight")
             and "lora" not in name}
    with torch.no_grad():
        wanted = trained(ids).logits
        loaded = PeftModel.from_pretrained(grown_base(2), target).eval()
        gap = (loaded(ids).logits - wanted).abs().max().item()
    found[target] = whole, gap
    print(f"LoRA on q_proj and {target:12} saved {sorted(whole)}, logits off by {gap:.2g}")
assert found["q_proj"][0] == set(MATRICES) and found["q_proj"][1] < 1e-5
for target in MATRICES:
    assert found[target][0] == {target}, f"{target}: the other matrix is saved now"
    assert found[target][1] > 1e-2, f"{target}: the new rows come back now"
PYTHON
