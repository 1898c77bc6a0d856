"""What vLLM is held against in scripts/test_vllm.sh, computed by this library alone.

    python scripts/dev/vllm_rows.py --model MODEL --head HEAD --prompts FILE.jsonl --out rows.json

Greedy texts past every EOS, how many tokens each step of a chain of the head accepted until
`--new_tokens` were there (tokens behind the limit counted, as vLLM does), and the exact law of the
first tokens after one prompt at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from redrafter import load_head, speculative
from redrafter.config import TargetConfig
from redrafter.drafters.build import Resources, build_drafter
from redrafter.files import write_json
from redrafter.targets.load import load_target

# A short prompt: thousands of requests read it, and vLLM caches whole blocks of 128 tokens only.
LAW_PROMPT_TOKENS, LAW_TOKENS, LAW_TOP_K = 8, 3, 4


def read_prompts(file: Path, model: str, n: int, max_tokens: int) -> list[list[int]]:
    """Token ids of the last `n` rows of a JSON-lines file, by whichever known key they have."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][-n:]
    texts = [next(row[key] for key in ("text", "question", "prompt") if key in row) for row in rows]
    return [tokenizer(text)["input_ids"][:max_tokens] for text in texts]


def chain_counts(lengths: list[list[int]], new_tokens: int, depth: int) -> tuple[int, list[int]]:
    """(steps, accepted at each depth) until a row has `new_tokens`, the prefill's own counted."""
    steps, accepted = 0, [0] * depth
    for row in lengths:
        made = 1
        for emitted in row:
            if made >= new_tokens:
                break
            made, steps = made + emitted, steps + 1
            for level in range(emitted - 1):
                accepted[level] += 1
    return steps, accepted


@torch.inference_mode()
def next_law(target, rows: list[list[int]]) -> torch.Tensor:
    """(R, V) float64: of rows of one length, the law of the next token, top_k and no warp else."""
    ids = torch.tensor(rows)
    logits = target.project(target.states(ids)[:, -1]).double()
    kept = logits.topk(LAW_TOP_K).values[:, -1:]
    return logits.masked_fill(logits < kept, -torch.inf).softmax(-1)


def law_of(target, prompt: list[int]) -> dict[str, float]:
    """{"t1 t2 t3": probability} of every possible beginning of an answer."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LAW_TOKENS):
        begun = list(law)
        found = {}
        laws = next_law(target, [prompt + list(b) for b in begun])
        for start, p in zip(begun, laws, strict=True):
            for token in p.nonzero()[:, 0].tolist():
                found[(*start, token)] = law[start] * float(p[token])
        law = found
    return {" ".join(map(str, cell)): p for cell, p in law.items()}


def widest_law(target, rows: list[list[int]]) -> dict | None:
    """Of beginnings of some rows the one after which the law has the largest entropy."""
    if not rows:
        return None
    begun = [row[:LAW_PROMPT_TOKENS] for row in rows]
    laws = [law_of(target, row) for row in begun]
    entropies = [-sum(p * math.log(p) for p in law.values() if p) for law in laws]
    widest = entropies.index(max(entropies))
    return {"prompt": begun[widest], "cells": laws[widest], "top_k": LAW_TOP_K}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "head", "prompts", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--n_prompts", type=int, default=100)
    parser.add_argument("--max_prompt_tokens", type=int, default=96)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--laws", type=int, default=8, help="prompts to take the widest law of")
    args = parser.parse_args()

    target = load_target(TargetConfig(args.model, dtype="float32"))
    head = load_head(args.head, target)
    rows = read_prompts(Path(args.prompts), args.model, args.n_prompts, args.max_prompt_tokens)
    config = GenerationConfig(max_new_tokens=args.new_tokens + args.depth + 1, eos_token_id=-1)
    texts: list[list[int]] = []
    lengths: list[list[int]] = []
    for start in range(0, len(rows), 8):
        drafter = build_drafter(f"head:1x{args.depth}", target, Resources(head=head))
        made = speculative(target, rows[start : start + 8], config, drafter=drafter)
        texts += [tokens[: args.new_tokens] for tokens in made.tokens]
        lengths += made.stats.lengths
    steps, accepted = chain_counts(lengths, args.new_tokens, args.depth)
    write_json(args.out, {
        "model": Path(args.model).name, "head": head.fingerprint(), "depth": args.depth,
        "new_tokens": args.new_tokens, "prompts": rows, "texts": texts,
        "steps": steps, "accepted": accepted,
        "law": widest_law(target, rows[: args.laws]),
    })  # fmt: skip
    print(f"{len(rows)} rows, {steps} steps, accepted by depth {accepted}")


if __name__ == "__main__":
    main()
