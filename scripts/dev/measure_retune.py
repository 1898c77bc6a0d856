"""What a retuned head gains on its text, and what it loses on the text it came from.

    python scripts/dev/measure_retune.py --target MODEL --out FILE.json \\
        --heads runs/gsm-head runs/retuned --sets gsm8k_train.jsonl tinystories.jsonl

Tokens per step of every head on the last rows of every set (which no head may have been trained
on), greedy and sampled, with 95 % intervals over prompts; for heads made by train/redrafter.py, how
they were trained. Prompts are decoded in one batch: a count, not a clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from safetensors import safe_open

from redrafter.config import TreeConfig
from redrafter.data.answers import generation_config
from redrafter.data.prompts import load_prompts
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.evaluation.figures import bootstrap
from redrafter.files import git_commit, versions, write_json
from redrafter.heads.load import load_head
from redrafter.targets.devices import device_name
from redrafter.targets.load import load_target


def tokens_per_step(target, head, rows: list[list[int]], given, temperature: float) -> list[float]:
    """[value, low, high]: pooled, tokens over steps of live rows."""
    config = generation_config(temperature, given.max_new_tokens)
    tree = TreeConfig(width=given.width, depth=given.depth)
    made = speculative(
        target, rows, config, seeds=range(len(rows)), drafter=HeadDrafter(head, target, tree)
    )
    found = bootstrap(
        lambda tokens, steps: tokens.sum(-1) / steps.sum(-1), made.stats.emitted, made.stats.steps
    )
    return [round(value, 3) for value in found]


def how_trained(folder: Path) -> dict[str, Any]:
    """Of `provenance.json`, without paths; and the size of what a checkpoint holds of the head."""
    file = folder / "provenance.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    config = facts.get("config", {})
    found: dict[str, Any] = {"name": folder.name, "step": facts.get("step")}
    if config.get("head", {}).get("init_from"):
        found |= {
            "from": Path(config["head"]["init_from"]).name, "lora": config["head"].get("lora"),
            "samples": config["data"]["source"]["n_rows"],
        }  # fmt: skip
        found |= {key: config["optim"][key] for key in ("steps", "lr", "batch_positions", "depth")}
    adapter = folder / "adapter" / "adapter_model.safetensors"
    weights = adapter if adapter.is_file() else folder / "model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        found["trained_values"] = sum(opened.get_tensor(n).numel() for n in opened.keys())  # noqa: SIM118
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder of the target")
    parser.add_argument("--heads", required=True, nargs="+", type=Path, help="folders")
    parser.add_argument("--sets", required=True, nargs="+", type=Path, help="files of prompts")
    parser.add_argument("--n_prompts", type=int, default=100, help="last rows of each set")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--out", required=True, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    target = load_target(given.target)
    measured = []
    for folder in given.heads:
        head, rates = load_head(folder, target), {}
        for file in given.sets:
            prompts = load_prompts(file, target.tokenizer, "auto", given.n_prompts, "last")
            rows = [list(p.ids) for p in prompts]
            rates[file.stem] = {
                name: tokens_per_step(target, head, rows, given, temperature)
                for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0))
            }
            print(folder.name, file.stem, rates[file.stem], flush=True)
        measured.append({**how_trained(folder), "tokens_per_step": rates})
    write_json(given.out, {
        "target": {"name": Path(given.target).name, "fingerprint": target.fingerprint()},
        "n_prompts": given.n_prompts, "max_new_tokens": given.max_new_tokens,
        "tree": [given.width, given.depth], "intervals": "95 %, bootstrap over prompts",
        "heads": measured, "device": device_name(target.device), "git_commit": git_commit(),
        "versions": versions(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
