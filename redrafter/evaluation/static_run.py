"""The experiment of `eval/static.py`: what is accepted of drafts of every width, what they cost
here, and what the clock says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.nn import Module
from transformers import GenerationConfig

from redrafter.config import StaticConfig
from redrafter.contracts import Drafter, InputError
from redrafter.costs import CostMeter
from redrafter.data.answers import generation_config
from redrafter.data.prompts import Prompt
from redrafter.drafters.build import Resources, build_drafter
from redrafter.drafters.profile import StepCosts, profile_of, read_costs, step_costs
from redrafter.evaluation.methods import PromptBatch, build_method
from redrafter.evaluation.models import load_draft
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning, number_list
from redrafter.evaluation.runs import Timing
from redrafter.evaluation.speed import run_interleaved
from redrafter.evaluation.static import Cell, Clocked, accepted_depths, compare, predict
from redrafter.fetch import fetch
from redrafter.targets.model import Target


def check(config: StaticConfig) -> list[int]:
    """The widths, ascending. Raises InputError for what cannot be asked for."""
    if (config.head is None) == (config.draft is None):
        raise InputError("head, draft: give one of them")
    return sorted(number_list("widths", config.widths, int, 1))


def kind_of(config: StaticConfig) -> str:
    """Of the drafter, in names."""
    return "head" if config.draft is None else "model"


def measure(
    config: StaticConfig, widths: Sequence[int], target: Target, head: Module | None
) -> tuple[list[Cell], dict[str, Any]]:
    """(every configuration, the whole result ready for JSON). widths: from `check`"""
    run = StaticExperiment(config, widths, target, Resources(head=head, draft=load_draft(config)))
    costs_file = find_costs(config, target)
    more = config.n_prompts * config.measure
    used, others, warnings = evaluation_prompts(target, config, more)
    recorded = others or used
    accepted, context = run.record(recorded)
    meter = run.meter(context) if costs_file is None else None
    clocked = run.clock(used, meter) if config.measure else {}
    if meter is None:
        costs = run.prices(costs_file, target, context)
    else:
        costs = run.prices(asdict(meter.run(config.cost_rounds)), None, context)
    cells = predict(accepted, costs, config.depth, {n: t.rate for n, t in clocked.items()})
    warning = config.head and holdout_warning(config.head, config.prompts, recorded[0].row)
    return cells, {
        "cells": [asdict(cell) for cell in cells],
        "comparison": compare(cells, clocked) if clocked else None,
        "warnings": warnings + ([warning] if warning else []),
        "recorded_rows": [p.row for p in recorded],
        "measured_rows": [p.row for p in used] if clocked else None,
        "recorded_positions": sum(map(len, accepted[widths[0]])),
        "context": context,
        "costs": {str(width): asdict(of_width) for width, of_width in costs.items()},
        "timings": {name: asdict(timing) for name, timing in clocked.items()},
    }


def find_costs(config: StaticConfig, target: Target) -> str | Path | None:
    """The file of `config.costs`, None where costs are to be measured."""
    if config.costs is None:
        return None
    if config.costs == "profile":
        option = "head" if config.draft is None else "draft"
        return profile_of(fetch(getattr(config, option), option), target)
    read_costs(config.costs, target)
    return config.costs


@dataclass(frozen=True)
class StaticExperiment:
    """The steps of the experiment. resources: the head or the draft model"""

    config: StaticConfig
    widths: Sequence[int]
    target: Target
    resources: Resources

    @property
    def decoding(self) -> GenerationConfig:
        return generation_config(self.config.temperature, self.config.max_new_tokens)

    def name(self, width: int, depth: int) -> str:
        return f"{kind_of(self.config)}:{width}x{depth}"

    def drafters(self) -> dict[int, Drafter]:
        """Per width the drafter of full depth."""
        return {
            width: build_drafter(self.name(width, self.config.depth), self.target, self.resources)
            for width in self.widths
        }

    def record(self, prompts: Sequence[Prompt]) -> tuple[dict[int, list[list[int]]], int]:
        """(per width the accepted depths, the context halfway through an answer)."""
        config, rows = self.config, [list(p.ids) for p in prompts]
        # Rows that are measured sample with seed 0, 1, ...; these with the seeds behind.
        seeds = [config.seed + config.n_prompts * config.measure + i for i in range(len(rows))]
        accepted = {
            width: accepted_depths(
                self.target, drafter, rows, self.decoding, seeds, config.record_batch_size
            )
            for width, drafter in self.drafters().items()
        }
        texts = accepted[self.widths[0]]
        if not any(texts):
            raise InputError(f"{config.prompts}: no answer has a second token; take other prompts")
        middles = sorted(len(row) + len(text) // 2 for row, text in zip(rows, texts, strict=True))
        return accepted, middles[len(middles) // 2]

    def meter(self, context: int) -> CostMeter:
        """Of the target at every size of a tree, and of the drafters."""
        depth, limit = self.config.depth, self.target.max_positions
        nodes = {1 + width * levels for width in self.widths for levels in range(depth + 1)}
        if limit is not None:
            context = max(1, min(context, limit - max(max(nodes) + 1, 2 * (depth + 1))))
        return CostMeter(
            self.target,
            new_tokens=sorted(nodes),
            contexts=[context],
            drafters={self.name(width, depth): d for width, d in self.drafters().items()},
            temperature=self.config.temperature,
            loop=True,
        )

    def prices(
        self, costs: str | Path | dict[str, Any], target: Target | None, context: int
    ) -> dict[int, StepCosts]:
        """Per width. costs, target: as for `step_costs`"""
        depth = self.config.depth
        return {
            width: step_costs(costs, self.name(width, depth), target, context)
            for width in self.widths
        }

    def clock(self, prompts: Sequence[Prompt], meter: CostMeter | None) -> dict[str, Clocked]:
        """By the name of its `Cell`, what every configuration took; interleaved."""
        config = self.config
        names = {"plain": "plain"} | {
            self.name(width, depth): f"{width}x{depth}"
            for width in self.widths for depth in range(1, config.depth + 1)
        }  # fmt: skip
        methods = [build_method(name, self.target, self.decoding, self.resources) for name in names]
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
