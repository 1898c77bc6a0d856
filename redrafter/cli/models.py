"""What evaluation commands load: the target, and what drafters are made from besides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from redrafter.contracts import InputError

# Where a drafter's levels and the target's forwards are priced: tokens in the cache, and how often.
_PRICE_CONTEXT, _PRICE_ROUNDS = 128, 20


def load_both(config: Any) -> tuple[Any, Any]:
    """(Target, draft head or None) of an evaluation's configuration; sets torch's threads."""
    import torch

    from redrafter.heads.recurrent import load_head
    from redrafter.hub.fetch import fetch
    from redrafter.target.model import load_target

    if config.threads is not None:
        if config.threads < 1:
            raise InputError(f"threads: {config.threads} must be at least 1")
        torch.set_num_threads(config.threads)
    target = load_target(config.target)
    if getattr(config, "head", None) is None:
        return target, None
    path = fetch(config.head, "head")
    return target, load_head(path, target, config.allow_other_target)


def load_draft(config: Any) -> Any:
    """The draft model as a Target, None where none is given; it computes as the target does."""
    from redrafter.hub.fetch import fetch
    from redrafter.target.model import load_target

    if config.draft is None:
        return None
    path = fetch(config.draft, "draft")
    own = {"path": path, "gguf_file": None, "revision": None, "base": None}
    return load_target(replace(config.target, **own, device_map="none", shard="none"))


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
    from redrafter.data.bigrams import open_probed
    from redrafter.data.reference import reference_texts
    from redrafter.evaluation.methods import Partners, needed
    from redrafter.hub.fetch import fetch

    wanted = needed(names)
    found: dict[str, Any] = {"head": head, "tree": config.tree}
    counted_on = None
    if "bigrams" in wanted:
        width = wanted["bigrams"]
        found["bigrams"], counted_on = _bigrams(config, target, width, others, generation_config)
    if "probed" in wanted:
        found["probed"] = open_probed(fetch(config.probed, "probed"), target)
    if "reference" in wanted:
        found["reference"] = reference_texts(config.reference, target, progress=True)
    if "draft" in wanted:
        found["draft"] = load_draft(config)
    if "price" in wanted:
        batch_size = getattr(config, "batch_size", 1)
        found["price"] = lambda drafter: _price(target, drafter, batch_size)
    return Partners(**found), counted_on


def _price(target: Any, drafter: Any, batch_size: int) -> Any:
    """The NodeBudget of a drafter, from costs measured now."""
    from redrafter.decode.tree import BUCKETS
    from redrafter.drafters.budget import NodeBudget
    from redrafter.evaluation.costs import CostMeter

    sizes = [n for n in BUCKETS if n < drafter.max_nodes] + [drafter.max_nodes]
    limit = target.max_positions
    room = max(sizes) + 1
    context = _PRICE_CONTEXT if limit is None else max(1, min(_PRICE_CONTEXT, limit - room))
    meter = CostMeter(
        target, new_tokens=[1, *sizes], contexts=[context], batches=[batch_size],
        drafters={"this": drafter},
    )  # fmt: skip
    return NodeBudget.from_costs(asdict(meter.run(_PRICE_ROUNDS)), batch_size)


def _bigrams(
    config: Any, target: Any, width: int, others: Sequence[Any], generation_config: Any
) -> Any:
    """(BigramTable, what it was counted on)."""
    from redrafter.data.bigrams import open_bigrams
    from redrafter.drafters.bigram import count_bigrams
    from redrafter.evaluation.methods import plain_answers
    from redrafter.hub.fetch import fetch

    if config.bigrams is not None:
        path = config.bigrams if "://" in config.bigrams else fetch(config.bigrams, "bigrams")
        return open_bigrams(path, target, width)
    seeds = [config.seed + config.n_prompts + i for i in range(len(others))]
    rows = [list(p.ids) for p in others]
    answers = plain_answers(target, rows, generation_config, seeds, batch_size=4)
    where = f"plain answers to rows {others[0].row}..{others[-1].row} of {config.prompts}"
    return count_bigrams(answers, target.vocab_size, width), where
