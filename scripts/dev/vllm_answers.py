"""Answers of vLLM's server beside the target's own (data/answers.py --answers.server); see
test_vllm.sh.

    python scripts/dev/vllm_answers.py --vllm PYTHON --model MODEL --head HEAD --rows rows.json \\
        --log answers.log --work FOLDER

PYTHON is that of vLLM's environment, in which the server runs, with the head; the rest is this one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from vllm_findings import failed, say
from vllm_server import AT_A_TIME, N_ROWS, serving

from redrafter.config import AskedAnswersConfig, RequestsConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import report, write_rows
from redrafter.data.rows import TokenRow
from redrafter.data.served import ServedAnswers
from redrafter.data.store import Store
from redrafter.evaluation.served_sample import compare_sample
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.targets.text import text_of


def answered(target: Target, prompts: Store, config: AskedAnswersConfig, folder: Path) -> Store:
    """The server's answers, after the sample."""
    served = ServedAnswers(target, config, partial(compare_sample, target))
    return build_answers(target, prompts, config, folder, answerer=served, progress=False)


def retokenised(target: Target, ids: list[int]) -> list[int]:
    text = text_of(target.tokenizer, ids)
    return target.tokenizer(text, add_special_tokens=False).input_ids


def texts(store: Store) -> list[list[int]]:
    rows = store.rows()
    return [rows.ids(i) for i in range(rows.n_rows)]


def findings(target: Target, prompts: Store, url: str, n: int, work: Path) -> None:
    ask = RequestsConfig(at_once=AT_A_TIME)
    greedy = AskedAnswersConfig((0.0,), max_new_tokens=n, server=url, requests=ask)
    own = texts(build_answers(target, prompts, greedy, work / "own", progress=False))
    for send in ("tokens", "text"):
        config = replace(greedy, requests=replace(ask, send=send))
        store = answered(target, prompts, config, work / send)
        print(report(store))
        wrong = sum(a != b for a, b in zip(texts(store), own, strict=True))
        say(f"server, {send}: {wrong} of {len(own)} greedy answers differ", wrong == 0)
        ids = store.manifest["tally"].get("as token ids", 0)
        say(f"  {ids} answers came as token ids", ids == len(own))
    sampled = replace(greedy, temperatures=(1.0,))
    store = answered(target, prompts, sampled, work / "sampled")
    counts = store.counts
    total = counts["rows"] + counts["skipped"] + counts["failed"]
    say(f"sampled: {counts['rows']} of {total} answered", total == len(own))
    again = texts(answered(target, prompts, sampled, work / "again"))
    same = sum(a == b for a, b in zip(texts(store), again, strict=False))
    say(f"  {same} of them the same again for their seeds")
    target.lm_head.weight.data.add_(0.5 * target.lm_head.weight.data.roll(1, 0))  # another one
    try:
        answered(target, prompts, greedy, work / "another")
        say("another checkpoint passes for this one", False)
    except InputError as error:
        said = str(error)
        say(f"another checkpoint is found: {said[:90]}", "not the target's" in said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("vllm", "model", "head", "rows", "log", "work"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    rows = json.loads(Path(args.rows).read_text())
    work = Path(args.work)
    target = load_target(TargetConfig(args.model, dtype="float32"))
    # (The file's prompts are cut after some tokens, which as text may be others.)
    as_text = [p for p in rows["prompts"] if retokenised(target, p) == p]
    given = [TokenRow(tuple(ids), (False,) * len(ids), i) for i, ids in enumerate(as_text[:N_ROWS])]
    prompts = write_rows(lambda: given, "prompts", work / "prompts", {"rows": given[0].ids})
    with serving(args, rows["depth"], args.vllm) as url:
        findings(target, prompts, url, rows["new_tokens"], work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
