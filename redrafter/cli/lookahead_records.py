"""`data/lookahead.py`: what a drafter says of its guesses, for train/disco.py."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners, prompts_to_count
from redrafter.config import RecordsConfig
from redrafter.contracts import InputError
from redrafter.processes import say

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
    from redrafter.data.lookahead_store import build_records
    from redrafter.drafters.options import parse_name
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.plans import build_plan, parse_plan

    names = known.parse_methods(config.drafter)
    if len(names) != 1 or parse_name(names[0]).kind not in known.DRAFTERS:
        raise InputError(f"drafter: {config.drafter!r} is not one drafter of ours")
    plan = parse_plan(names[0])
    if plan.lookahead is not None or plan.rule != "seeded":
        raise InputError("drafter: records hold all levels: leave out lookahead and rule")
    known.check_partners(names, config)
    target, head = load_both(config)
    prompts, others = records_prompts(target, config, prompts_to_count(names, config))
    wanted = generation_config(config.temperature, config.max_new_tokens)
    partners, _ = load_partners(names, config, target, head, others, wanted)
    drafter = build_plan(names[0], target, partners).drafter
    store = build_records(target, drafter, prompts, config)
    n = int(store.lengths.sum())
    say(f"{config.out}: {store.n_rows} texts, {n} positions of {drafter.max_depth} levels")
    return 0


def records_prompts(target, config: RecordsConfig, more: int):
    """(prompts to walk over, `more` prompts before them); `skip_rows` rows behind them left out."""
    from redrafter.data.prompts import load_prompts

    if config.n_prompts < 1 or config.max_new_tokens < 2 or config.skip_rows < 0:
        raise InputError(
            f"n_prompts {config.n_prompts} must be positive, max_new_tokens "
            f"{config.max_new_tokens} at least 2, skip_rows {config.skip_rows} not negative"
        )
    room = target.max_positions
    wanted = config.n_prompts + more
    rows = load_prompts(
        config.prompts, target.tokenizer, config.prompt_format,
        n=wanted + config.skip_rows, part="last", text_prompt_tokens=config.text_prompt_tokens,
        max_tokens=None if room is None else room - config.max_new_tokens,
    )  # fmt: skip
    if len(rows) < wanted + config.skip_rows:
        raise InputError(
            f"{config.prompts} has {len(rows)} rows, not n_prompts {config.n_prompts}"
            + (f", {more} others" if more else "")
            + f" and skip_rows {config.skip_rows}; ask for less"
        )
    rows = rows[:wanted]
    return rows[more:], rows[:more]
