"""Medusa heads that scripts/convert_head.py wrote, drafted for by vLLM's own `method: medusa`; see
test_vllm.sh.

    python scripts/dev/vllm_medusa.py --model MODEL --medusa CONVERTED --rows rows.json \\
        --differing differing.json

rows.json is of the same heads before they were converted. A copy of the folder with the first two
heads in each other's place must be found by its counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

# (First: it says how vLLM is to run.)
from vllm_real import BATCH, Engine, counts, plain_texts  # isort: skip

import safetensors.torch
from vllm import SamplingParams
from vllm_findings import end, same, say

_SHARE = 0.02  # of each count


def drafted(
    args: argparse.Namespace, rows: dict, folder: Path, greedy: SamplingParams
) -> tuple[list[list[int]], float, Counter[str]]:
    """Texts, seconds and counts with the heads of a folder."""
    speculative = {
        "method": "medusa", "model": str(folder), "num_speculative_tokens": rows["depth"]
    }  # fmt: skip
    with Engine(args.model, speculative) as engine:
        engine.run(rows["prompts"][:BATCH], greedy)
        return engine.run(rows["prompts"], greedy)


def swapped(folder: Path, out: Path) -> Path:
    """A copy whose first two heads stand in each other's place."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    other = {"0": "1", "1": "0"}
    moved = {}
    for name, tensor in weights.items():
        part, head, *rest = name.split(".")
        moved[".".join((part, other.get(head, head), *rest))] = tensor
    shutil.copy(folder / "config.json", out)
    safetensors.torch.save_file(moved, out / "model.safetensors", {"format": "pt"})
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "medusa", "rows", "differing"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    rows = json.loads(Path(args.rows).read_text())
    greedy = SamplingParams(temperature=0.0, max_tokens=rows["new_tokens"], ignore_eos=True)
    say(f"vLLM's Medusa: {len(rows['prompts'])} prompts x {rows['new_tokens']} tokens")
    plain = plain_texts(args, rows, greedy)
    texts, seconds, counted = drafted(args, rows, Path(args.medusa), greedy)
    say(f"converted heads: {sum(map(len, texts)) / seconds:.1f} tokens/s")
    same("converted heads and plain", rows["prompts"], texts, plain)
    counts(rows, counted, _SHARE)
    with tempfile.TemporaryDirectory() as work:
        folder = swapped(Path(args.medusa), Path(work))
        texts, _, counted = drafted(args, rows, folder, greedy)
    same("planted: two heads swapped", rows["prompts"], texts, plain)
    counts(rows, counted, _SHARE, planted=True)
    return end(args.differing)


if __name__ == "__main__":
    logging.getLogger("vllm").setLevel(logging.WARNING)
    sys.exit(main())
