"""`eval/costs.py`: the cost table of a target, and of a draft head where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both
from redrafter.config import CostsConfig
from redrafter.contracts import InputError


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        CostsConfig,
        argv,
        "eval/costs.py",
        "Seconds that the target needs for n new tokens, and a drafter for its levels.",
    )
    from redrafter.drafters.recurrent import RecurrentDrafter
    from redrafter.evaluation.costs import CostMeter
    from redrafter.evaluation.prompts import number_list
    from redrafter.evaluation.report import write_result

    if config.rounds < 1:
        raise InputError(f"rounds: {config.rounds} must be at least 1")
    new_tokens = number_list("new_tokens", config.new_tokens, int, 1)
    contexts = number_list("contexts", config.contexts, int, 1)
    batches = number_list("batch_sizes", config.batch_sizes, int, 1)
    target, head = load_both(config)
    drafters = {}
    if head is not None:
        name = f"head:{config.tree.width}x{config.tree.depth}:{config.tree.shape}"
        drafters[name] = RecurrentDrafter(head, target, config.tree)
    costs = CostMeter(
        target,
        new_tokens=new_tokens,
        contexts=contexts,
        batches=batches,
        drafters=drafters,
        temperature=config.temperature,
    ).run(config.rounds)
    print(show(costs))
    write_result(config.out, config, target, asdict(costs))
    return 0


def show(costs) -> str:
    """Milliseconds: median [quartiles], and the ratio to one new token."""
    from redrafter.evaluation.report import milliseconds, table

    def quartiles(cost) -> str:
        return f"[{milliseconds(cost.q1_s)}, {milliseconds(cost.q3_s)}]"

    rows = []
    singles = {(e.context, e.batch): e.cost.median_s for e in costs.target if e.n == 1}
    for entry in costs.target:
        one = singles.get((entry.context, entry.batch))
        ratio = None if one is None else entry.cost.median_s / one
        rows.append(
            [f"target n={entry.n}", entry.context, entry.batch, milliseconds(entry.cost.median_s),
             quartiles(entry.cost), ratio]
        )  # fmt: skip
    for entry in costs.drafters:
        where = [entry.context, entry.batch]
        for level, cost in enumerate(entry.levels, start=1):
            rows.append([f"{entry.name} level {level}", *where, milliseconds(cost.median_s),
                         quartiles(cost), None])  # fmt: skip
        rows.append([f"{entry.name} whole draft", *where, milliseconds(entry.draft.median_s),
                     quartiles(entry.draft), None])  # fmt: skip
    return table(["forward", "context", "batch", "ms", "quartiles", "/ t(1)"], rows)
