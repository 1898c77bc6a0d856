"""Rows of an engine that are not plain's: are they near-ties? See test_vllm.sh.

    python scripts/dev/vllm_ties.py --model MODEL differing.json ...

The library runs the model along each such text (`evaluation/served_sample.py`): a token is
explained where the model's scores of it and of its own choice are closer than rounding moves both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vllm_findings import failed, say

from redrafter.config import TargetConfig
from redrafter.data.answers import Answer, Asked
from redrafter.evaluation.served_sample import differences
from redrafter.targets.load import load_target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    rows = [row for file in args.files for row in json.loads(Path(file).read_text())]
    if not rows:
        say("no row differs: there are no near-ties to explain", True)
        return 0
    target = load_target(TargetConfig(args.model, dtype="float32"))
    for what in dict.fromkeys(row["what"] for row in rows):
        some = [row for row in rows if row["what"] == what]
        asked = [Asked(row["prompt"]) for row in some]
        answers = [Answer(row["tokens"], "length") for row in some]
        found = differences(target, asked, answers, past_eos=True)
        tokens = sum(len(row["tokens"]) for row in some)
        wrong = [d for d in found if not d.explained]
        say(
            f"{what}: of {tokens} tokens of {len(some)} rows that differ, {len(found)} are not the "
            f"model's own choice, {len(found) - len(wrong)} of them near-ties (largest gap "
            f"{max((d.gap for d in found), default=0.0):.1e}), {len(wrong)} unexplained", not wrong
        )  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
