"""`eval/acceptance.py`: what is accepted, beside what could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners, prompts_to_count
from redrafter.config import AcceptanceConfig
from redrafter.contracts import InputError


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Decodes with every method, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        AcceptanceConfig,
        argv,
        "eval/acceptance.py",
        "Acceptance of drafts by rule, beside 1 - TV and the best that any rule could do. Trees of "
        "independent draws (multi:...:how=iid) have both oracles.",
        names="describe_drafting",
        alone=True,
    )
    from redrafter.data.answers import generation_config
    from redrafter.drafters.options import parse_name
    from redrafter.drafting import build_plan
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.acceptance import measure_acceptance
    from redrafter.evaluation.prompts import evaluation_prompts
    from redrafter.evaluation.report import write_result

    names = known.parse_methods(config.methods)
    for name in names:
        if parse_name(name).kind not in known.DRAFTERS:
            raise InputError(
                f"methods: {name!r} drafts nothing of ours; choose from {', '.join(known.DRAFTERS)}"
            )
    known.check_partners(names, config)
    target, head = load_both(config, measured=True)
    more = prompts_to_count(names, config)
    prompts, others, warnings = evaluation_prompts(target, config, more)
    wanted = generation_config(config.temperature, config.max_new_tokens)
    partners, _ = load_partners(names, config, target, head, others, wanted)
    seeds = [config.seed + i for i in range(len(prompts))]
    body = {}
    for name in names:
        plan = build_plan(name, target, partners)
        rows = [p.ids for p in prompts]
        found = measure_acceptance(target, plan, rows, wanted, seeds, name)
        body[name] = asdict(found)
    print(show(body, config))
    for warning in warnings:
        print(f"warning: {warning}")
    write_result(config.out, config, target, {"methods": body, "warnings": warnings})
    return 0


def show(body: dict[str, Any], config: AcceptanceConfig) -> str:
    from redrafter.evaluation.report import table, with_interval

    columns = ["method", "nodes", "tokens/step", "accepted", "1 - TV", "optimum"]
    rows = []
    for name, m in body.items():
        figures = [with_interval(*(m[key] or (None, None, None)), 3) for key in
                   ("tokens_per_step", "accepted", "overlap", "optimum")]  # fmt: skip
        rows.append([name, m["nodes"], *figures])
    return "\n".join([
        table(columns, rows), "",
        "accepted: of the levels that were tested (all above them were accepted)",
        "1 - TV, optimum: means over the tested nodes of what one draw is accepted with, and the "
        "most that any rule accepts of as many independent draws",
        f"temperature {config.temperature:g}, {config.n_prompts} prompts; intervals: 95 % "
        "bootstrap over prompts",
    ])  # fmt: skip
