#!/usr/bin/env bash
# Assisted generation runs past a stopping criterion that plain generation obeys.
#
# Versions:  torch 2.13.0, transformers 5.23.0
# Expected:  greedy text with an assistant, prompt lookup or early exit is the plain greedy text,
#            also where a stopping criterion ends it.
# Happens:   criteria are asked once per verified block, about its last token. A criterion that
#            fires inside a block is never heard, and the text runs on to max_new_tokens. The
#            same stop given as eos_token_id works. No warning.
# Matters:   whoever drafts several tokens must ask every criterion of every accepted prefix,
#            and cannot take assisted generation as the reference where criteria are in play.
# Seen:      plain  criterion 'c d e'
#            lookup criterion 'c d e f g h i j k l m a b c d e f g h i'
#            model  criterion 'c d e f g h i j k l m a b c d e f g h i'
#            exit   criterion 'c d e f g h i j k l m a b c d e f g h i'
#            (with eos_token_id all four say 'c d e')
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
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

LETTERS = "abcdefghijklm"
FIRST, STOP = 3, 3 + LETTERS.index("e")


def alphabet_model():
    """A llama without attention or MLP whose head says the next letter, a after m."""
    size = FIRST + len(LETTERS)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.zeros(size, size)
    for i in range(len(LETTERS)):
        head[FIRST + (i + 1) % len(LETTERS), FIRST + i] = 1.0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(head)
    return model


class EndsWithE(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == STOP


model = alphabet_model()
prompt = torch.tensor([[FIRST + LETTERS.index(c) for c in LETTERS + "ab"]])
ways = {
    "plain": {},
    "lookup": {"prompt_lookup_num_tokens": 6},
    "model": {"assistant_model": copy.deepcopy(model)},
    "exit": {"assistant_early_exit": 1},
}
stops = {"criterion": {"stopping_criteria": [EndsWithE()]}, "eos": {"eos_token_id": STOP}}
texts = {}
for way, how in ways.items():
    for stop, what in stops.items():
        out = model.generate(prompt, max_new_tokens=20, do_sample=False, **how, **what)
        text = " ".join(LETTERS[i - FIRST] for i in out[0, prompt.shape[1] :].tolist())
        texts[way, stop] = text
        print(f"{way:6} {stop:9} {text!r}")
assert texts["plain", "criterion"] == "c d e"
assert all(texts[way, "eos"] == "c d e" for way in ways)
for way in ("lookup", "model", "exit"):
    assert texts[way, "criterion"].startswith("c d e f"), f"{way} obeys the criterion now"
PYTHON
