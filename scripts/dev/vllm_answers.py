"""Answers of vLLM's server beside the target's own (data/answers.py --answers.server); see
test_vllm.sh.

    python scripts/dev/vllm_answers.py --vllm PYTHON --model MODEL --head HEAD --rows rows.json \\
        --log answers.log --work FOLDER

PYTHON is that of vLLM's environment, in which the server runs, with the head; the rest is this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from vllm_server import free_port, wait_for

from redrafter.config import AskedAnswersConfig, RequestsConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import report, write_rows
from redrafter.data.rows import TokenRow
from redrafter.data.served import ServedAnswers
from redrafter.data.store import Store
from redrafter.evaluation.served_sample import compare_sample
from redrafter.targets.model import Target, load_target
from redrafter.targets.text import text_of

_N_ROWS, _AT_A_TIME = 24, 8


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


def findings(target: Target, prompts: Store, url: str, n: int, work: Path) -> list:
    """(what was found, whether it is right) of everything."""
    ask = RequestsConfig(at_once=_AT_A_TIME)
    greedy = AskedAnswersConfig((0.0,), max_new_tokens=n, server=url, requests=ask)
    own = texts(build_answers(target, prompts, greedy, work / "own", progress=False))
    found = []
    for send in ("tokens", "text"):
        config = replace(greedy, requests=replace(ask, send=send))
        store = answered(target, prompts, config, work / send)
        print(report(store))
        wrong = sum(a != b for a, b in zip(texts(store), own, strict=True))
        found.append((f"server, {send}: {wrong} of {len(own)} greedy answers differ", wrong == 0))
        ids = store.manifest["tally"].get("as token ids", 0)
        found.append((f"  {ids} answers came as token ids", ids == len(own)))
    sampled = replace(greedy, temperatures=(1.0,))
    store = answered(target, prompts, sampled, work / "sampled")
    counts = store.counts
    total = counts["rows"] + counts["skipped"] + counts["failed"]
    found.append((f"sampled: {counts['rows']} of {total} answered", total == len(own)))
    again = texts(answered(target, prompts, sampled, work / "again"))
    same = sum(a == b for a, b in zip(texts(store), again, strict=False))
    found.append((f"  {same} of them the same again for their seeds", True))
    target.lm_head.weight.data.add_(0.5 * target.lm_head.weight.data.roll(1, 0))  # another one
    try:
        answered(target, prompts, greedy, work / "another")
        found.append(("another checkpoint passes for this one", False))
    except InputError as error:
        said = str(error)
        found.append((f"another checkpoint is found: {said[:90]}", "not the target's" in said))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("vllm", "model", "head", "rows", "log", "work"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    rows = json.loads(Path(args.rows).read_text())
    port, work = free_port(), Path(args.work)
    command = [
        args.vllm, "-m", "redrafter.cli.main", "vllm-serve", args.model, "--head", args.head,
        "--tokens", str(rows["depth"]), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", str(_AT_A_TIME),
        "--enforce-eager",
    ]  # fmt: skip
    env = {**os.environ, "PATH": f"{Path(args.vllm).parent}:{os.environ['PATH']}"}
    with open(args.log, "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        target = load_target(TargetConfig(args.model, dtype="float32"))
        # (The file's prompts are cut after some tokens, which as text may be others.)
        as_text = [p for p in rows["prompts"] if retokenised(target, p) == p]
        given = [
            TokenRow(tuple(ids), (False,) * len(ids), i) for i, ids in enumerate(as_text[:_N_ROWS])
        ]
        prompts = write_rows(lambda: given, "prompts", work / "prompts", {"rows": given[0].ids})
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        found = findings(target, prompts, url, rows["new_tokens"], work)
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    for what, right in found:
        print(f"== {'ok    ' if right else 'WRONG '}{what}")
    return 0 if all(right for _, right in found) else 1


if __name__ == "__main__":
    sys.exit(main())
