#!/usr/bin/env bash
# The same chat rows keep or grow keys by the door they come in, and prompts change with it.
#
# Versions:  datasets 5.2.0, pyarrow 26.0.1, jinja2 3.1.6
# Expected:  Dataset.from_list(rows) and load_dataset("json") of the same rows give the same
#            messages, those that went in.
# Happens:   from JSON lines `messages` is a Json feature and comes back as written. from_list
#            (and parquet written from it) makes one struct of all keys ever seen: each message
#            gets `tool_calls: None`, and the arguments of one tool's call get the other tools'
#            parameters as nulls. A template that asks `'tool_calls' in message`, or prints the
#            arguments with tojson, renders another prompt. No warning; writing the set back to
#            JSON lines makes the nulls permanent.
# Matters:   heads are trained on the rendered text: a model so trained learns to call tools
#            with parameters they do not have, and what is served renders otherwise.
# Seen:      json       <user>sun?<assistant><calls>weather {"city": "Rome"}
#            from_list  <user>sun?<calls><assistant><calls>weather {"city": "Rome", "zone": null}
#            (parquet and JSON lines written from the latter: the same as from_list)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile datasets==5.2.0 pyarrow==26.0.1 jinja2==3.1.6
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cd "$work"
"$VENV/bin/python" - <<'PYTHON'
import json

import jinja2
from datasets import Dataset, disable_progress_bars, load_dataset

disable_progress_bars()


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"messages": [{"role": "user", "content": "sun?"}, call("weather", city="Rome")]},
    {"messages": [{"role": "user", "content": "hour?"}, call("clock", zone=1)]},
]
TEMPLATE = jinja2.Environment().from_string(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if 'tool_calls' in m %}<calls>{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
    "{% endfor %}"
)
with open("rows.jsonl", "w") as out:
    out.writelines(json.dumps(row) + "\n" for row in ROWS)


def read(kind, path):
    return load_dataset(kind, data_files=path, split="train", cache_dir="cache")


doors = {"as written": ROWS, "json": list(read("json", "rows.jsonl"))}
listed = Dataset.from_list(ROWS)
doors["from_list"] = list(listed)
listed.to_parquet("rows.parquet")
doors["parquet"] = list(read("parquet", "rows.parquet"))
listed.to_json("again.jsonl")
doors["written back"] = list(read("json", "again.jsonl"))
texts = {door: [TEMPLATE.render(**row) for row in rows] for door, rows in doors.items()}
for door, rendered in texts.items():
    print(f"{door:12} {rendered[:2]}")
assert texts["json"] == texts["as written"]
for door in ("from_list", "parquet", "written back"):
    assert texts[door][0] == "<user>hi<calls><assistant>yo<calls>", door
    assert texts[door][1].endswith('weather {"city": "Rome", "zone": null}'), door
PYTHON
