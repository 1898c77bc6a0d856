"""The experiment of `eval/costs.py --slowdown`: the map, drawn, and the advice made of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig

from redrafter.config import CostsConfig
from redrafter.contracts import InputError
from redrafter.drafters.bigram import BigramTable
from redrafter.evaluation.methods import plain_answers
from redrafter.evaluation.pictures import new_figure, save_figure, slowdown_map, title_of
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.evaluation.slowdown import (
    SlowdownMeter,
    parse_slowdown,
    show_advice,
    show_slowdown,
)
from redrafter.tables.bigrams import open_bigrams
from redrafter.targets.model import Target

_PLAIN_ROWS = 8  # prompts answered at a time


def check_slowdown(config: CostsConfig) -> tuple[list[int], list[int]] | None:
    """(k, w) to measure, None without. Raises InputError before any work where options that go
    together are not all there."""
    for name in ("ngrammys", "plot"):
        if getattr(config, name) is not None and config.slowdown is None:
            raise InputError(f"{name}: needs --slowdown, the rows and lengths to measure")
    if (config.ngrammys is None) != (config.prompts is None):
        raise InputError("ngrammys and prompts: give both, or neither")
    if config.plot is not None:
        new_figure(1, 1)
    return None if config.slowdown is None else parse_slowdown(config.slowdown)


def measure_slowdown(
    config: CostsConfig, target: Target, ks: list[int], ws: list[int], contexts: list[int]
) -> dict[str, Any]:
    """Measures, prints and draws; returns what belongs to the result."""
    bigrams = None if config.ngrammys is None else open_table(config, target, max(ks))
    meter = SlowdownMeter(target, ks, ws, contexts)
    cells = meter.run(config.rounds)
    print(f"\n{show_slowdown(cells)}")
    body: dict[str, Any] = {"slowdown": [asdict(cell) for cell in cells]}
    if config.plot is not None:
        paths = save_figure(slowdown_map(cells, title_of(target)), config.plot)
        print(f"\ndrawn: {', '.join(map(str, paths))}")
    if bigrams is not None:
        texts = plain_texts(config, target)
        advice = meter.advise(bigrams, *texts, config.max_new_tokens, target.device)
        print(f"\n{show_advice(advice)}")
        body["advice"] = [asdict(line) for line in advice]
    return body


def open_table(config: CostsConfig, target: Target, width: int) -> BigramTable:
    """The table of config.ngrammys, at least as wide as it goes."""
    table, shown = open_bigrams(config.ngrammys, target, 2 * width)
    print(f"bigrams of {shown}")
    return table


def plain_texts(config: CostsConfig, target: Target) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the target's greedy answers."""
    used, _, warnings = evaluation_prompts(target, config)
    for warning in warnings:
        print(f"warning: {warning}")
    prompts = [list(prompt.ids) for prompt in used]
    greedy = GenerationConfig(max_new_tokens=config.max_new_tokens)
    answers = plain_answers(target, prompts, greedy, [0] * len(prompts), _PLAIN_ROWS)
    return prompts, answers
