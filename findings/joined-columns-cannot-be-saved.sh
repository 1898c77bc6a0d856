#!/usr/bin/env bash
# A model whose weights are views of one joined matrix saves, unless the views lie by columns.
#
# Versions:  torch 2.13.0, transformers 5.23.0, safetensors 0.8.0
# Expected:  save_pretrained writes weights whatever their memory looks like: it does for a matrix
#            that lies by columns (t().contiguous().t()), and for two that are halves of one.
# Happens:   both at once end in "view size is not compatible with input tensor's size and stride",
#            an error that names no parameter: where tensors share memory, their ends are compared
#            by a flat view that such a tensor does not have. Layers that are joined for speed
#            (q, k and v as one product; one row is read faster by columns) are of this kind.
# Matters:   a model that runs, trains and has a right state_dict cannot be written at the end of
#            the run. What helps is a state_dict hook that hands out contiguous copies.
# Seen:      by columns alone: saved, equal; joined by rows: saved, equal; joined by columns:
#            RuntimeError; the same with the hook: saved, equal
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 \
        safetensors==0.8.0
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cd "$work"
"$VENV/bin/python" - 2>"$work/log" <<'PYTHON' || { cat "$work/log" >&2; exit 1; }
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
)


def by_columns(x):
    return x.t().contiguous().t()


def made(joined, columns, hook=False):
    model = LlamaForCausalLM(config)
    mlp = model.model.layers[0].mlp
    parts = [mlp.gate_proj, mlp.up_proj]
    if joined:
        whole = torch.cat([p.weight.data for p in parts])
        views = (by_columns(whole) if columns else whole).split(config.intermediate_size)
    else:
        views = [by_columns(p.weight.data) if columns else p.weight.data for p in parts]
    for part, view in zip(parts, views, strict=True):
        part.weight.data = view
        if hook:
            part.register_state_dict_post_hook(
                lambda _, state, prefix, *__: state.update(
                    {f"{prefix}weight": state[f"{prefix}weight"].contiguous()}
                )
            )
    return model


def outcome(model):
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        again = LlamaForCausalLM.from_pretrained(folder).state_dict()
    same = all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    return "saved, equal" if same else "saved, other numbers"


seen = {
    "by columns alone": outcome(made(joined=False, columns=True)),
    "joined by rows": outcome(made(joined=True, columns=False)),
    "joined by columns": outcome(made(joined=True, columns=True)),
    "joined by columns, with the hook": outcome(made(joined=True, columns=True, hook=True)),
}
for name, what in seen.items():
    print(f"{name}: {what}")
for name in ("by columns alone", "joined by rows", "joined by columns, with the hook"):
    assert seen[name] == "saved, equal", name
assert seen["joined by columns"].startswith("RuntimeError: view size"), "it saves now"
PYTHON
