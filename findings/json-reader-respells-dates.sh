#!/usr/bin/env bash
# Texts that look like dates come back from JSON lines with another spelling, also as strings.
#
# Versions:  datasets 5.2.0, pyarrow 26.0.1
# Expected:  load_dataset("json") gives a JSON string as that string; at the latest with
#            features that say Value("string").
# Happens:   where all values of a key look like ISO dates (in a chunk of the file, 10 MB), they
#            become timestamps: "2024-05-06" is a datetime, in the arguments of a tool call, too.
#            With Value("string") they are made text again, by another spelling: "2024-05-06
#            00:00:00", and "2024-05-06T10:00" loses its T. One row more that is no date, in the
#            same chunk, and all are left as they were. No warning.
# Matters:   answers, contents and tool arguments are trained on as text. The model learns to
#            answer with a time nobody wrote, or not, by which rows lie near.
# Seen:      no features  datetime.datetime(2024, 5, 6, 0, 0), ...(2024, 5, 6, 10, 0)
#            as a string  '2024-05-06 00:00:00', '2024-05-06 10:00:00'
#            and one word '2024-05-06', '2024-05-06T10:00', 'never'
#            small chunks six times '2024-05-06 00:00:00', then twice '2024-05-06', 'never'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile datasets==5.2.0 pyarrow==26.0.1
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cd "$work"
"$VENV/bin/python" - <<'PYTHON'
import datetime
import json

from datasets import Features, Value, disable_progress_bars, load_dataset

disable_progress_bars()
DATES = ["2024-05-06", "2024-05-06T10:00"]
STRING = Features({"answer": Value("string")})


def read(name, answers, **options):
    with open(f"{name}.jsonl", "w") as out:
        out.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    rows = load_dataset(
        "json", data_files=f"{name}.jsonl", split="train", cache_dir="cache", **options
    )
    found = [row["answer"] for row in rows]
    print(f"{name:12} {found}")
    return found


bare = read("no features", DATES)
assert bare == [datetime.datetime(2024, 5, 6), datetime.datetime(2024, 5, 6, 10)]
told = read("as a string", DATES, features=STRING)
assert told == ["2024-05-06 00:00:00", "2024-05-06 10:00:00"], "strings are left alone now"
assert read("and one word", [*DATES, "never"], features=STRING) == [*DATES, "never"]
# What one chunk holds decides; 10 MB by default, a few lines here.
many = ["2024-05-06"] * 8 + ["never"]
spelled = read("small chunks", many, features=STRING, chunksize=64)
assert spelled[0] == "2024-05-06 00:00:00" and spelled[-2:] == many[-2:]

call = {"name": "book", "arguments": {"day": "2024-05-06"}}
with open("calls.jsonl", "w") as out:
    out.writelines(json.dumps({"calls": [call]}) + "\n" for _ in range(2))
rows = load_dataset("json", data_files="calls.jsonl", split="train", cache_dir="cache")
print("in a call   ", rows[0]["calls"])
assert rows[0]["calls"][0]["arguments"]["day"] == datetime.datetime(2024, 5, 6)
PYTHON
