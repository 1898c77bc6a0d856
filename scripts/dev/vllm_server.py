"""The head behind vLLM's OpenAI-compatible server, asked by the OpenAI client; see test_vllm.sh.

    python scripts/dev/vllm_server.py --model MODEL --head HEAD --rows rows.json --log server.log \\
        --differing differing.json

Starts `redrafter vllm-serve`, streams answers from several requests at a time, and reads /metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_findings import end, same, say

if TYPE_CHECKING:  # vllm_answers.py runs where it is not
    from openai import OpenAI

N_ROWS, AT_A_TIME, _PATIENCE_S = 24, 8, 1800


@contextmanager
def serving(args: argparse.Namespace, depth: int, python: str = sys.executable) -> Iterator[str]:
    """The URL of a server with the head, which answers until this is left.

    args: model, head, and log, the file for what it says
    python: of vLLM's environment
    """
    port = free_port()
    command = [
        python, "-m", "redrafter.cli.main", "vllm-serve", args.model, "--head", args.head,
        "--tokens", str(depth), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", str(AT_A_TIME),
        "--enforce-eager",
    ]  # fmt: skip
    env = {**os.environ, "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    with open(args.log, "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, server)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


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
    from openai import OpenAI

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "head", "rows", "log", "differing"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    rows = json.loads(Path(args.rows).read_text())
    prompts, texts, n = rows["prompts"][:N_ROWS], rows["texts"][:N_ROWS], rows["new_tokens"]
    with serving(args, rows["depth"]) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        served = client.models.list().data[0].id
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            answers = list(pool.map(lambda prompt: streamed(client, served, prompt, n), prompts))
        counted = metrics(read(f"{url}/metrics"))
    same("server, streamed, and redrafter's own text", prompts, [a for a, _ in answers], texts)
    total, parts = len(prompts) * n, sum(parts for _, parts in answers)
    say(f"  {total} tokens came in {parts} parts", parts < total)
    drafts, accepted = counted.get("num_drafts", 0), counted.get("num_accepted_tokens", 0)
    say(f"  /metrics: {int(drafts)} drafts, {int(accepted)} tokens accepted", accepted > 0)
    return end(args.differing)


if __name__ == "__main__":
    sys.exit(main())
