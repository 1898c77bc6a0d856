#!/usr/bin/env bash
# The assistant mask of apply_chat_template: empty after truncation on the left, and one token
# short where an answer ends in a character of several byte tokens.
#
# Versions:  transformers 5.23.0 (no torch), tokenizers 0.23.3, jinja2 3.1.6
# Expected:  return_assistant_tokens_mask marks the tokens of what stands between
#            {% generation %} and {% endgeneration %}, as far as truncation leaves them.
# Happens:   truncation_side="left" that drops the first answer and keeps the last one whole
#            gives a mask of zeros alone (on the right it works); and with a byte-level
#            tokenizer, whose "é" is two tokens, the mask of "no é" holds all but the last.
#            No warning.
# Matters:   rows cut on the left, the usual way to keep the newest turns, silently train
#            nothing; and the last token of such answers is never trained.
# Seen:      answer 'no e'  marked 4 of 4 tokens
#            answer 'no é'  marked 4 of 5 tokens
#            answer 'no é.' marked 6 of 6 tokens
#            cut on the right keeps 'U:ask A:first', marks 'first'
#            cut on the left  keeps 'U:ask A:other', marks ''
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile \
        transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cd "$work"
"$VENV/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

symbols = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
bytewise = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytewise.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}U:{{ m.content }} {% endif %}{% endfor %}"
)


def marked(answers, **options):
    """The text kept, and the ids marked as the assistant's, of a chat with these answers."""
    chat = []
    for answer in answers:
        chat += [{"role": "user", "content": "ask"}, {"role": "assistant", "content": answer}]
    out = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids = [i for i, mine in zip(out["input_ids"], out["assistant_masks"], strict=True) if mine]
    return tokenizer.decode(out["input_ids"]), ids


def size(text):
    return len(tokenizer(text)["input_ids"])


for answer, missing in (("no e", 0), ("no é", 1), ("no é.", 0)):
    _, ids = marked([answer])
    print(f"answer {answer!r:7} marked {len(ids)} of {size(answer)} tokens")
    assert len(ids) == size(answer) - missing
marks = {}
for side in ("right", "left"):
    tokenizer.truncation_side = side
    text, ids = marked(["first", "other"], truncation=True, max_length=size("U:ask A:first"))
    marks[side] = tokenizer.decode(ids)
    print(f"cut on the {side:5} keeps {text!r}, marks {marks[side]!r}")
    assert text == ("U:ask A:first" if side == "right" else "U:ask A:other")
assert marks["right"] == "first"
assert marks["left"] == "", "the answer kept is marked now"
PYTHON
