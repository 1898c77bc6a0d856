"""Which attentions of a target can be skipped for drafting, and does it pay?

    python scripts/dev/measure_skipping.py --target DIR --prompts FILE.jsonl --temperature 0

1. Plain answers, and the cosine cos(h, h + attention) of each layer over them.
2. Sets by greedy search: the next layer is the one whose set, in one forward over prompt and
   answer, says the answer's next token most often (an estimate: a draft builds on committed keys).
3. For each set, drafts of fixed depth, and with Draft & Verify's exit at the largest one: tokens
   drafted and made per step, ms per drafted token and per plain forward, the bound, the measured
   speed over plain, and of the steps that drafted k tokens the share that accepted all of them.
   Where bound and speed are below 1, do not draft this way.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from transformers import GenerationConfig

from redrafter.costs import CostMeter, CostTable
from redrafter.data.prompts import load_prompts
from redrafter.decode.noise import gumbel
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.skipping import LayerSkipping
from redrafter.lookahead.draft_exit import DraftExit
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.targets.skipping import AttentionSkipping

CONTEXT, LEVELS = 128, 4  # tokens cached, and tokens drafted, where costs are measured


def answered(target: Target, prompts: list[list[int]], config: GenerationConfig) -> list[tuple]:
    """[(prompt and answer (1, T), the prompt's length, noise (n, V) or None)]"""
    rows = []
    for seed, prompt in enumerate(prompts):
        answer = plain(target, [prompt], config, seeds=seed).tokens[0]
        ids = torch.tensor([prompt + answer], device=target.device)
        place = torch.arange(len(prompt), ids.shape[1], device=target.device)[None]
        noise = gumbel(torch.tensor([seed], device=target.device), place, target.vocab_size)[0]
        rows.append((ids, len(prompt), noise if config.do_sample else None))
    return rows


@torch.inference_mode()
def cosines(target: Target, skipping: AttentionSkipping, rows: list[tuple]) -> str:
    values = []
    for ids, n_prompt, _ in rows:
        with skipping.measure() as seen:
            target.states(ids)
        values.append(seen.stacked()[:, 0, n_prompt:])
    return "  ".join(f"{i}: {v:.3f}" for i, v in enumerate(torch.cat(values, 1).mean(1).tolist()))


@torch.inference_mode()
def agreement(target, skipping, rows: list[tuple], temperature: float, layers) -> float:
    """Share of the answers' tokens that the target without these attentions says too."""
    right = total = 0
    for ids, n_prompt, noise in rows:
        with skipping.without_attention(layers):
            scores = target.project(target.states(ids)[0, n_prompt - 1 : -1])
        if noise is not None:
            scores = scores.to(noise.dtype) / temperature + noise
        right += int((scores.argmax(-1) == ids[0, n_prompt:]).sum())
        total += len(scores)
    return right / total


def search(measure, n_layers: int, max_size: int) -> list[tuple[int, ...]]:
    """The best sets of 1, 2, ... layers. measure: set -> agreement"""
    sets: list[tuple[int, ...]] = [()]
    while len(sets) <= max_size:
        tried = {
            layers: measure(layers)
            for layer in range(n_layers)
            if (layers := tuple(sorted({*sets[-1], layer}))) != sets[-1]
        }
        sets.append(max(tried, key=tried.get))
        print("agreement:", "  ".join(f"{k}: {v:.3f}" for k, v in tried.items()), flush=True)
    return sets[1:]


def line(target, prompts, config, layers, depth: int, exits: bool, costs: CostTable) -> str:
    drafter = LayerSkipping(target, depth, fixed=layers)
    lookahead = DraftExit.of(drafter) if exits else None
    plain_s, ours_s, steps, emitted, counts = 0.0, 0.0, 0, 0, torch.zeros(2, depth)
    for seed, prompt in enumerate(prompts):
        clock = time.perf_counter()
        plain(target, [prompt], config, seeds=seed)
        middle = time.perf_counter()
        parts = dict(drafter=drafter, lookahead=lookahead)
        stats = speculative(target, [prompt], config, seeds=seed, **parts).stats
        plain_s, ours_s = plain_s + middle - clock, ours_s + time.perf_counter() - middle
        steps, emitted = steps + sum(stats.steps), emitted + sum(stats.emitted)
        counts += torch.tensor([stats.drafted_at, stats.accepted_at])
    tau, levels = emitted / steps, float(counts[0].sum()) / steps
    level_s, whole_s = costs.draft(str(layers)) / LEVELS, costs.t(1, CONTEXT, 1)
    bound = tau * whole_s / (levels * level_s + costs.t(1 + levels, CONTEXT, 1))
    shares = " ".join(f"{share:.2f}" for share in (counts[1] / counts[0]).tolist())
    return (
        f"{layers!s:20s} {drafter.skipping.weights_skipped(layers):7.1%} {depth:2d} "
        f"{'exit' if exits else 'all':4s} {levels:7.2f} {tau:5.2f} {level_s * 1e3:6.2f} "
        f"{whole_s * 1e3:5.2f} {bound:6.2f} {plain_s / ours_s:5.2f}  {shares}"
    )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--target", required=True, help="folder or Hub id")
    parser.add_argument("--prompts", required=True, help="JSON lines; the last rows are used")
    parser.add_argument("--n_prompts", type=int, default=20)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8], help="K of the drafts")
    parser.add_argument("--max_size", type=int, default=3, help="layers skipped at most")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    target = load_target(given.target)
    loaded = load_prompts(given.prompts, target.tokenizer, "auto", given.n_prompts, "last")
    prompts = [list(prompt.ids) for prompt in loaded]
    config = GenerationConfig(max_new_tokens=given.max_new_tokens, do_sample=given.temperature > 0)
    config.temperature = given.temperature or None
    skipping, rows = AttentionSkipping(target), answered(target, prompts, config)
    print("cosine over the answers:", cosines(target, skipping, rows))
    measure = partial(agreement, target, skipping, rows, given.temperature)
    sets = search(measure, skipping.n_layers, min(given.max_size, skipping.n_layers))
    most = max(given.depths)
    drafters = {str(layers): LayerSkipping(target, LEVELS, fixed=layers) for layers in sets}
    costs = CostMeter(
        target, new_tokens=(1, 2, 3, 5, 9, 1 + most), contexts=(CONTEXT,), drafters=drafters,
        temperature=given.temperature,
    ).run(30)  # fmt: skip
    print("skipped              weights  K stop drafted   tau  draft  t(1)  bound speed  accepted")
    for layers in sets:
        for depth, exits in [*((depth, False) for depth in given.depths), (most, True)]:
            print(line(target, prompts, config, layers, depth, exits, costs), flush=True)


if __name__ == "__main__":
    main()
