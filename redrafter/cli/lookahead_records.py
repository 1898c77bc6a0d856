"""`data/lookahead.py`: what a drafter says of its guesses, for train/disco.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import RecordsConfig
from redrafter.contracts import InputError
from redrafter.processes import by_main, say

_DESCRIPTION = """\
Walk a drafter over the target's own answers, at every position and with all its levels: what it
says of each level, and how many would be accepted. From that train/disco.py learns when to stop.

  python data/lookahead.py --target.path MODEL --head HEAD --drafter head:4x6 \\
    --prompts PROMPTS.jsonl --out runs/records
  accelerate launch train/disco.py --records runs/records --costs COSTS.json --out HEAD/disco

The last --skip_rows rows are left out: measure on them. The same command goes on after an
interruption, and `accelerate launch --multi_gpu --num_processes 8` shares the work out.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        RecordsConfig, argv, "data/lookahead.py", _DESCRIPTION, names="describe_drafting",
        plan="data_jobs:plan_records",
    )  # fmt: skip
    from redrafter.data.answers import generation_config
    from redrafter.data.day import day_of
    from redrafter.data.store import begun
    from redrafter.drafters.options import parse_name
    from redrafter.drafting import build_strategy, parse_strategy
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.models import load_both, load_resources, prompts_to_count
    from redrafter.records.store import build_records

    names = known.parse_methods(config.drafter)
    if len(names) != 1 or parse_name(names[0]).kind not in known.DRAFTERS:
        raise InputError(f"drafter: {config.drafter!r} is not one drafter of ours")
    strategy = parse_strategy(names[0])
    if strategy.lookahead is not None or strategy.rule != "seeded":
        raise InputError("drafter: records hold all levels: leave out lookahead and rule")
    known.check_resources(names, config)
    target, head = load_both(config)
    day = by_main(lambda: day_of(target.tokenizer, begun(Path(config.out))))
    more = prompts_to_count(names, config)
    prompts, others, warnings = records_prompts(target, config, more, day)
    for warning in warnings:
        say(f"warning: {warning}")
    wanted = generation_config(config.temperature, config.max_new_tokens)
    resources, _ = load_resources(names, config, target, head, others, wanted)
    drafter = build_strategy(names[0], target, resources).drafter
    store = build_records(target, drafter, prompts, config, day=day)
    n = int(store.lengths.sum())
    say(f"{config.out}: {store.n_rows} texts, {n} positions of {drafter.max_depth} levels")
    return 0


def records_prompts(target, config: RecordsConfig, more: int, day: str | None = None):
    """`evaluation_prompts` to walk over; `skip_rows` rows behind them are not read."""
    from redrafter.evaluation.prompts import evaluation_prompts

    if config.n_prompts < 1 or config.max_new_tokens < 2 or config.skip_rows < 0:
        raise InputError(
            f"n_prompts {config.n_prompts} must be positive, max_new_tokens "
            f"{config.max_new_tokens} at least 2, skip_rows {config.skip_rows} not negative"
        )
    return evaluation_prompts(target, config, more, config.skip_rows, day)
