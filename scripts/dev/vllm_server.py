"""The head behind vLLM's OpenAI-compatible server, asked by the OpenAI client; see test_vllm.sh.

    python scripts/dev/vllm_server.py --model MODEL --head HEAD --rows rows.json --log server.log

Starts `redrafter vllm-serve`, streams answers from several requests at a time, and reads /metrics.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # vllm_answers.py runs where it is not
    from openai import OpenAI

_N_ROWS, _AT_A_TIME, _PATIENCE_S = 24, 8, 1800


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def wait_for(url: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}; see its log")
        try:
            read(f"{url}/health")
            return
        except OSError:
            time.sleep(1.0)
    raise SystemExit(f"the server did not answer within {_PATIENCE_S} s")


def streamed(client: OpenAI, model: str, prompt: list[int], n: int) -> tuple[list[int], int]:
    """(token ids, parts they came in) of one greedy answer."""
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=n, temperature=0.0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    tokens, parts = [], 0
    for part in stream:
        for choice in part.choices:
            new = (choice.model_extra or {}).get("token_ids") or []
            tokens, parts = tokens + list(new), parts + bool(new)
    return tokens, parts


def metrics(text: str) -> dict[str, float]:
    found = re.findall(r"^vllm:spec_decode_(\w+)_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    counted = {}
    for name, labels, value in found:
        position = re.search(r'position="(\d+)"', labels)
        counted[name + (f".{position[1]}" if position else "")] = float(value)
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "head", "rows", "log"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    rows = json.loads(Path(args.rows).read_text())
    port = free_port()
    command = [
        sys.executable, "-m", "redrafter.cli.main", "vllm-serve", args.model, "--head", args.head,
        "--tokens", str(rows["depth"]), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", str(_AT_A_TIME),
        "--enforce-eager",
    ]  # fmt: skip
    with open(args.log, "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        from openai import OpenAI

        wait_for(url, server)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        served = client.models.list().data[0].id
        prompts, n = rows["prompts"][:_N_ROWS], rows["new_tokens"]
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            answers = list(pool.map(lambda prompt: streamed(client, served, prompt, n), prompts))
        counted = metrics(read(f"{url}/metrics"))
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    wrong = sum(
        tokens != text for (tokens, _), text in zip(answers, rows["texts"], strict=False)
    )
    parts = sum(parts for _, parts in answers)
    drafts, accepted = counted.get("num_drafts", 0), counted.get("num_accepted_tokens", 0)
    findings = [
        (f"server, streamed: {wrong} of {_N_ROWS} rows differ from redrafter's own", wrong == 0),
        (f"  {_N_ROWS * n} tokens came in {parts} parts", parts < _N_ROWS * n),
        (f"  /metrics: {int(drafts)} drafts, {int(accepted)} tokens accepted", accepted > 0),
    ]
    for what, right in findings:
        print(f"== {'ok    ' if right else 'WRONG '}{what}")
    return 0 if all(right for _, right in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
