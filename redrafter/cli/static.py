"""`eval/static.py`: the fixed width and depth of drafts that pays best on this device, predicted
and, where asked for, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_draft
from redrafter.config import StaticConfig
from redrafter.contracts import InputError


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Records, prices, predicts; prints, draws, writes JSON. Returns the exit status."""
    config = parse(
        StaticConfig,
        argv,
        "eval/static.py",
        "Which fixed width W and depth K of drafts pays best on this device, predicted from "
        "recorded acceptance and measured costs; with --measure beside what the clock says.",
        alone=True,
    )
    from redrafter.evaluation.pictures import new_figure, save_figure
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning, number_list
    from redrafter.evaluation.report import device_name, write_result
    from redrafter.evaluation.static import compare, predict, show, static_map

    if (config.head is None) == (config.draft is None):
        raise InputError("head, draft: give one of them")
    kind = "head" if config.draft is None else "model"
    widths = sorted(number_list("widths", config.widths, int, 1))
    if config.plot is not None:
        new_figure(1, 1)  # without matplotlib: say so now
    target, partners = load(config)
    table = find_costs(config, target)
    more = config.n_prompts * config.measure
    used, others, warnings = evaluation_prompts(target, config, more)
    accepted, context = record(config, widths, target, partners, others or used)
    meter = None
    if table is None:
        meter = make_meter(config, widths, target, partners, context)
    timings = {}
    if config.measure:
        timings = decode_all(config, kind, widths, target, partners, used, meter)
    if meter is not None:
        table = asdict(meter.run(config.cost_rounds))
    costs = prices(config, kind, widths, target, table, context)
    cells = predict(accepted, costs, config.depth, {n: t.rate for n, t in timings.items()})
    comparison = compare(cells, timings) if timings else None
    print(show(cells, kind, comparison))
    recorded = [p.row for p in others or used]
    warning = config.head and holdout_warning(config.head, config.prompts, recorded[0])
    warnings += [warning] if warning else []
    for said in warnings:
        print(f"warning: {said}")
    if config.plot is not None:
        title = f"{target.name.rstrip('/').split('/')[-1]}, {kind}, {device_name(target.device)}"
        paths = save_figure(static_map(cells, title), config.plot)
        print(f"\ndrawn: {', '.join(map(str, paths))}")
    body = {
        "cells": [asdict(cell) for cell in cells],
        "comparison": comparison,
        "warnings": warnings,
        "recorded_rows": recorded,
        "measured_rows": [p.row for p in used] if timings else None,
        "recorded_positions": sum(map(len, accepted[widths[0]])),
        "context": context,
        "costs": {str(width): asdict(of_width) for width, of_width in costs.items()},
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }
    write_result(config.out, config, target, body)
    return 0


def load(config: StaticConfig) -> tuple[Any, Any]:
    """(target, Partners with the head or the draft model)."""
    from redrafter.drafters.build import Partners

    target, head = load_both(config, measured=True)
    return target, Partners(head=head, draft=load_draft(config))


def find_costs(config: StaticConfig, target: Any) -> Any:
    """The file of `config.costs`, None where costs are to be measured."""
    from redrafter.drafters.profile import profile_of, read_costs
    from redrafter.fetch import fetch

    if config.costs is None:
        return None
    if config.costs == "profile":
        option = "head" if config.draft is None else "draft"
        return profile_of(fetch(getattr(config, option), option), target)
    read_costs(config.costs, target)
    return config.costs


def decoding(config: StaticConfig) -> Any:
    from redrafter.data.answers import generation_config

    return generation_config(config.temperature, config.max_new_tokens)


def drafters(config: StaticConfig, widths: Sequence[int], target: Any, partners: Any) -> dict:
    """Per width the drafter of full depth, by its name."""
    from redrafter.drafters.build import build_drafter

    kind = "head" if partners.draft is None else "model"
    names = [f"{kind}:{width}x{config.depth}" for width in widths]
    return {name: build_drafter(name, target, partners) for name in names}


def record(
    config: StaticConfig,
    widths: Sequence[int],
    target: Any,
    partners: Any,
    prompts: Sequence[Any],
) -> tuple[dict[int, list[list[int]]], int]:
    """(per width the accepted depths, the context halfway through an answer)."""
    from redrafter.evaluation.static import accepted_depths

    rows = [list(p.ids) for p in prompts]
    # Rows that are measured sample with seed 0, 1, ...; these with the seeds behind.
    seeds = [config.seed + config.n_prompts * config.measure + i for i in range(len(rows))]
    accepted = {
        width: accepted_depths(
            target, drafter, rows, decoding(config), seeds, config.record_batch_size
        )
        for width, drafter in zip(
            widths, drafters(config, widths, target, partners).values(), strict=True
        )
    }
    texts = accepted[widths[0]]
    if not any(texts):
        raise InputError(f"{config.prompts}: no answer has a second token; take other prompts")
    middles = sorted(len(row) + len(text) // 2 for row, text in zip(rows, texts, strict=True))
    return accepted, middles[len(middles) // 2]


def make_meter(
    config: StaticConfig, widths: Sequence[int], target: Any, partners: Any, context: int
) -> Any:
    from redrafter.costs import CostMeter

    nodes = {1 + width * depth for width in widths for depth in range(config.depth + 1)}
    if target.max_positions is not None:
        room = max(max(nodes) + 1, 2 * (config.depth + 1))
        context = max(1, min(context, target.max_positions - room))
    return CostMeter(
        target,
        new_tokens=sorted(nodes),
        contexts=[context],
        drafters=drafters(config, widths, target, partners),
        temperature=config.temperature,
        loop=True,
    )


def prices(
    config: StaticConfig,
    kind: str,
    widths: Sequence[int],
    target: Any,
    table: Any,
    context: int,
) -> dict[int, Any]:
    """Per width the StepCosts. table: a file, or what was measured just now."""
    from redrafter.drafters.profile import step_costs

    here = None if isinstance(table, dict) else target
    return {
        width: step_costs(table, f"{kind}:{width}x{config.depth}", here, context)
        for width in widths
    }


def decode_all(
    config: StaticConfig,
    kind: str,
    widths: Sequence[int],
    target: Any,
    partners: Any,
    prompts: Sequence[Any],
    meter: Any,
) -> dict[str, Any]:
    """Per configuration, by the name of its `Cell`, its `Clocked` runs; interleaved."""
    from redrafter.evaluation.methods import PromptBatch, build_method
    from redrafter.evaluation.speed import Timing, run_interleaved
    from redrafter.evaluation.static import Clocked

    sizes = [f"{width}x{depth}" for width in widths for depth in range(1, config.depth + 1)]
    names = {"plain": "plain", **{f"{kind}:{size}": size for size in sizes}}
    methods = [build_method(name, target, decoding(config), partners) for name in names]
    batches = [PromptBatch([list(p.ids)], [config.seed + i]) for i, p in enumerate(prompts)]
    for method in methods:  # the warm-up
        method.prepare(batches[0])
        method.run(batches[0])
    runs = run_interleaved(methods, batches, config.repeats, meter, config.cost_rounds)
    timings = {names[name]: Timing(run) for name, run in runs.items()}
    return {
        name: Clocked((t.tokens - t.rows).tolist(), (t.total_s - t.prefill_s).tolist())
        for name, t in timings.items()
    }
