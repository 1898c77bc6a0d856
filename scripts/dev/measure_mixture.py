"""Tokens per step of several ways of drafting on the same prompts, with several seeds each.

    python scripts/dev/measure_mixture.py --config configs/eval/mixture.yaml --set gsm8k \\
        --seeds 6 --out eval/results/mixture/seeds-gsm8k-t1.json

For differences that one seed on 100 prompts cannot tell from chance: a prompt's answers with
different seeds are different texts. Counts only, at temperature 1: `eval/table.py` times. Writes
per method and prompt the tokens and steps summed over the seeds, and the paired difference of the
last method to each other one with its 95 % bootstrap interval over prompts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
from tqdm.auto import tqdm

from redrafter.cli.args import parse
from redrafter.config import TableConfig
from redrafter.decode.speculative import speculative
from redrafter.drafting import strategy_maker
from redrafter.evaluation.figures import bootstrap
from redrafter.evaluation.models import load_both, load_resources
from redrafter.evaluation.prompt_sets import settings
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.evaluation.speed import decoding
from redrafter.files import plain_values, provenance, write_json


def main() -> None:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--config", required=True, help="of eval/table.py")
    asked.add_argument("--set", required=True, help="one of its sets")
    asked.add_argument("--seeds", type=int, default=6)
    asked.add_argument("--out", required=True)
    args = asked.parse_args()
    table = parse(TableConfig, ["--config", args.config], "scripts/dev/measure_mixture.py")
    names = [name for name in table.methods if name != "plain"]
    of_set = next(c for c in settings(table).values() if c.prompts == table.sets[args.set])
    config = replace(of_set, temperature=1.0, methods=",".join(names), out=args.out)
    target, head = load_both(config)
    wanted = decoding(config)
    resources, _ = load_resources(names, config, target, head, [], wanted)
    prompts, _, _ = evaluation_prompts(target, config)
    counts = np.zeros((len(names), len(prompts), 2), dtype=int)
    for seed in tqdm(range(args.seeds), desc="seeds"):
        for m, name in enumerate(names):
            make = strategy_maker(name, target, resources)
            for i, prompt in enumerate(prompts):
                strategy = make([prompt.ids])
                made = speculative(
                    target, [prompt.ids], wanted, seeds=[config.seed + 10**6 * seed + prompt.row],
                    drafter=strategy.drafter, lookahead=strategy.lookahead,
                )  # fmt: skip
                counts[m, i] += made.stats.emitted[0], made.stats.steps[0]
    body = {"set": args.set, "seeds": args.seeds, "rows": [p.row for p in prompts], "methods": {}}
    last = counts[-1].T
    for name, own in zip(names, counts, strict=True):
        rate = bootstrap(lambda t, s: t.sum(-1) / s.sum(-1), *own.T)
        body["methods"][name] = {
            "tokens_per_step": rate, "tokens": own[:, 0].tolist(), "steps": own[:, 1].tolist(),
            "last_less_this": bootstrap(
                lambda t, s, u, v: t.sum(-1) / s.sum(-1) - u.sum(-1) / v.sum(-1), *last, *own.T
            ),
        }  # fmt: skip
        print(name, rate, body["methods"][name]["last_less_this"])
    facts = {"provenance": provenance(target=target.fingerprint(), config=plain_values(config))}
    write_json(args.out, {**body, **facts})


if __name__ == "__main__":
    main()
