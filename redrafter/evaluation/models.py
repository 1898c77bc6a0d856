"""What commands load: the target, and what drafters are made from besides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module
from transformers import GenerationConfig

from redrafter import threads
from redrafter.config import DraftingConfig
from redrafter.data.prompts import Prompt
from redrafter.drafters.bigram import BigramTable, count_bigrams
from redrafter.drafters.build import Resources
from redrafter.evaluation.methods import needed, plain_answers, rows_at_a_time
from redrafter.fetch import fetch
from redrafter.heads.load import load_head
from redrafter.resources import gather
from redrafter.tables.bigrams import open_bigrams
from redrafter.targets.inflation import said
from redrafter.targets.load import load_target
from redrafter.targets.model import Target

_FEW = 8  # tokens that a step verifies, give or take


def load_both(config: Any, measured: bool = False) -> tuple[Target, Module | None]:
    """(Target, draft head or None) of a command's configuration; sets torch's threads.

    config: with `target` and `threads`; `head` and `allow_other_target` where it has a head
    measured: where their number is not given, by what one forward of the target takes here. Not
        for what is gone on with after an interruption, which must compute as it began
    """
    threads.settle(config.threads)
    target = load_target(config.target)
    if (inflated := said(target.config)) is not None:
        print(f"note: {target.name} is {inflated}", flush=True)
    if measured and target.device.type == "cpu" and not threads.fixed(config.threads):
        threads.choose(lambda: _one_step(target, rows_at_a_time(config)))
    if getattr(config, "head", None) is None:
        return target, None
    path = fetch(config.head, "head")
    return target, load_head(path, target, config.allow_other_target)


def _one_step(target: Target, rows: int) -> None:
    """Forwards as decoding makes them: of one new token, and of a few that were drafted."""
    with torch.inference_mode():
        for new in (1, _FEW):
            ids = torch.zeros(rows, new, dtype=torch.long)
            target.project(target.backbone(input_ids=ids, use_cache=False).last_hidden_state)


def load_draft(config: Any) -> Target | None:
    """The draft model, None where none is given; it computes as the target does.

    config: with `target` and `draft`
    """
    if config.draft is None:
        return None
    path = fetch(config.draft, "draft")
    own = {"path": path, "gguf_file": None, "revision": None, "base": None}
    return load_target(replace(config.target, **own, device_map="none", shard="none"))


def prompts_to_count(names: Sequence[str], config: DraftingConfig) -> int:
    """How many prompts besides the evaluated ones the methods need: bigrams are counted on plain
    answers to them where no table is given."""
    counts_here = "bigrams" in needed(names) and config.bigrams is None
    return config.bigram_prompts if counts_here else 0


def load_resources(
    names: Sequence[str],
    config: DraftingConfig,
    target: Target,
    head: Module | None,
    others: Sequence[Prompt],
    generation_config: GenerationConfig,
) -> tuple[Resources, str | None]:
    """(Resources of these methods, what their bigrams were counted on).

    others: `prompts_to_count` prompts, not evaluated ones
    """
    wanted, counted_on = needed(names), None
    given = {"head": head, "probed": config.probed, "reference": config.reference}
    if "bigrams" in wanted:
        width = wanted["bigrams"]
        given["bigrams"], counted_on = _bigrams(config, target, width, others, generation_config)
    if "draft" in wanted:
        given["draft"] = load_draft(config)
    return gather(wanted, target, given, config.tree, rows_at_a_time(config)), counted_on


def _bigrams(
    config: DraftingConfig,
    target: Target,
    width: int,
    others: Sequence[Prompt],
    generation_config: GenerationConfig,
) -> tuple[BigramTable, str]:
    """(the table, what it was counted on)."""
    if config.bigrams is not None:
        path = config.bigrams if "://" in config.bigrams else fetch(config.bigrams, "bigrams")
        return open_bigrams(path, target, width)
    used = config.n_prompts * getattr(config, "samples_per_prompt", 1)
    seeds = [config.seed + used + i for i in range(len(others))]
    rows = [list(p.ids) for p in others]
    answers = plain_answers(target, rows, generation_config, seeds, batch_size=4)
    where = f"plain answers to rows {others[0].row}..{others[-1].row} of {config.prompts}"
    return count_bigrams(answers, target.vocab_size, width), where
