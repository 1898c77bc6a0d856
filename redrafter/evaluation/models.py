"""What evaluation commands load: the target, and what drafters are made from besides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from redrafter import threads

_FEW = 8  # tokens that a step verifies, give or take


def load_both(config: Any, measured: bool = False) -> tuple[Any, Any]:
    """(Target, draft head or None) of an evaluation's configuration; sets torch's threads.

    measured: where their number is not given, by what one forward of the target takes here. Not
        for what is gone on with after an interruption, which must compute as it began
    """
    from redrafter.fetch import fetch
    from redrafter.heads.load import load_head
    from redrafter.targets.model import load_target

    threads.settle(config.threads)
    target = load_target(config.target)
    if measured and target.device.type == "cpu" and not threads.fixed(config.threads):
        threads.choose(lambda: _one_step(target, getattr(config, "batch_size", 1)))
    if getattr(config, "head", None) is None:
        return target, None
    path = fetch(config.head, "head")
    return target, load_head(path, target, config.allow_other_target)


def _one_step(target: Any, rows: int) -> None:
    """Forwards as decoding makes them: of one new token, and of a few that were drafted."""
    import torch

    with torch.inference_mode():
        for new in (1, _FEW):
            ids = torch.zeros(rows, new, dtype=torch.long)
            target.project(target.backbone(input_ids=ids, use_cache=False).last_hidden_state)


def load_draft(config: Any) -> Any:
    """The draft model as a Target, None where none is given; it computes as the target does."""
    from redrafter.fetch import fetch
    from redrafter.targets.model import load_target

    if config.draft is None:
        return None
    path = fetch(config.draft, "draft")
    return load_target(
        replace(config.target, path=path, revision=None, base=None, device_map="none", shard="none")
    )


def prompts_to_count(names: Sequence[str], config: Any) -> int:
    """How many prompts besides the evaluated ones the methods need: bigrams are counted on plain
    answers to them where no table is given."""
    from redrafter.evaluation.methods import needed

    counts_here = "bigrams" in needed(names) and config.bigrams is None
    return config.bigram_prompts if counts_here else 0


def load_partners(
    names: Sequence[str],
    config: Any,
    target: Any,
    head: Any,
    others: Sequence[Any],
    generation_config: Any,
) -> tuple[Any, str | None]:
    """(Partners of these methods, what their bigrams were counted on).

    config: SpeedConfig or LosslessConfig; others: `prompts_to_count` prompts, not evaluated ones
    """
    from redrafter.evaluation.methods import needed
    from redrafter.partners import gather

    wanted, counted_on = needed(names), None
    given = {"head": head, "probed": config.probed, "reference": config.reference}
    if "bigrams" in wanted:
        width = wanted["bigrams"]
        given["bigrams"], counted_on = _bigrams(config, target, width, others, generation_config)
    if "draft" in wanted:
        given["draft"] = load_draft(config)
    batch_size = getattr(config, "batch_size", 1)
    return gather(wanted, target, given, config.tree, batch_size), counted_on


def _bigrams(
    config: Any, target: Any, width: int, others: Sequence[Any], generation_config: Any
) -> Any:
    """(BigramTable, what it was counted on)."""
    from redrafter.drafters.bigram import count_bigrams
    from redrafter.evaluation.methods import plain_answers
    from redrafter.fetch import fetch
    from redrafter.tables.bigrams import open_bigrams

    if config.bigrams is not None:
        path = config.bigrams if "://" in config.bigrams else fetch(config.bigrams, "bigrams")
        return open_bigrams(path, target, width)
    seeds = [config.seed + config.n_prompts + i for i in range(len(others))]
    rows = [list(p.ids) for p in others]
    answers = plain_answers(target, rows, generation_config, seeds, batch_size=4)
    where = f"plain answers to rows {others[0].row}..{others[-1].row} of {config.prompts}"
    return count_bigrams(answers, target.vocab_size, width), where
