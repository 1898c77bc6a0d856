"""Records of a drafter (`data/lookahead.py`) on disk: made shard by shard, read back for training.

The columns of a `Store`, one row per text; its tokens are the roots at which a step may begin, and
beside them stand the columns of `Text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from redrafter.config.lookahead import RecordsConfig
from redrafter.contracts import Drafter, InputError
from redrafter.data.answers import generation_config
from redrafter.data.day import dated
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.finite import finite_rows, left_out, rows_kept
from redrafter.data.prompts import Prompt
from redrafter.data.store import Job, Store
from redrafter.drafters.features import columns
from redrafter.lookahead.context import CONTEXT_FEATURES
from redrafter.records.make import COLUMNS, Text, walk_texts
from redrafter.records.policies import Records
from redrafter.targets.identity import target_identity
from redrafter.targets.model import Target

KIND = "lookahead"
# Exact in half the bytes, and a store has thousands of positions with all levels.
_STORED = {"tokens": torch.int32, "nodes": torch.int16, "accepted": torch.int16,
           "judged": torch.int16}  # fmt: skip


def build_records(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    config: RecordsConfig,
    progress: bool = True,
    day: str | None = None,
) -> Store:
    """Walk the drafter over the target's answers to every prompt, or go on where an earlier run
    stopped; several processes share the shards out (`filling.py`). day: that the prompts were
    rendered on (`day.py`). Raises InputError where the folder holds other records."""
    identity = dated(records_identity(target, drafter, config), day)
    identity["rows"] = [p.row for p in prompts]
    job = Job(config.out, KIND, identity)
    if job.complete:
        return open_filled(job)
    generation = generation_config(config.temperature, config.max_new_tokens)
    starts = range(0, len(prompts), config.shard_prompts)
    computed = str(target.dtype).removeprefix("torch.")
    overflow = f"numbers that are not finite, of a target in {computed}, or of the drafter"

    def make(index: int, bar: tqdm) -> Shard:
        chosen = prompts[starts[index] : starts[index] + config.shard_prompts]
        texts: list[Text] = []
        for i in range(0, len(chosen), config.batch_size):
            batch = chosen[i : i + config.batch_size]
            seeds = [config.seed + p.row for p in batch]
            texts += walk_texts(target, drafter, [p.ids for p in batch], generation, seeds)
            bar.update(len(batch))
        return _shard(texts, starts[index], [p.row for p in chosen], overflow)

    sizes = [min(config.shard_prompts, len(prompts) - start) for start in starts]
    return fill(
        job, sizes, make, what="records", unit="text", progress=progress, input=len(prompts)
    )


def records_identity(target: Target, drafter: Drafter, config: RecordsConfig) -> dict[str, Any]:
    """What records say of themselves: of the target, of the drafter, and how they were made."""
    return {
        "target": target_identity(target),
        "drafter": {"name": config.drafter, **drafter.identity()},
        "feature_names": list(drafter.feature_names),
        "context_features": list(CONTEXT_FEATURES),
        "levels": drafter.max_depth,
        "foresees": drafter.early_features,
        "sees_noise": drafter.sees_noise,
        "temperature": float(config.temperature),
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "shard_prompts": config.shard_prompts,
        "prompts": Path(config.prompts).name,
    }


def _shard(texts: Sequence[Text], first: int, rows: Sequence[int], overflow: str) -> Shard:
    """Without the texts on which target or drafter say what is not finite."""
    columns = {}
    for name in COLUMNS:
        whole = torch.cat([getattr(text, name) for text in texts])
        columns[name] = whole.cpu().to(_STORED.get(name, torch.float32))
    columns["chance"] = columns["chance"].nan_to_num(-1.0)  # "not tested"; nan equals nothing
    columns |= {
        "row": torch.arange(first, first + len(texts)),
        "source_row": torch.tensor(rows),
        "length": torch.tensor([len(t.tokens) for t in texts], dtype=torch.int32),
        "supervised": torch.ones(len(columns["tokens"]), dtype=torch.bool),
    }
    good = finite_rows(columns, columns["length"]) & torch.tensor([t.finite for t in texts])
    return rows_kept(columns, good), left_out(columns["source_row"][~good], overflow)


def read_records(
    store: Store, rows: Sequence[int] | None = None, features: Sequence[str] | None = None
) -> Records:
    """Records of some rows, None: all; each is checked as it is read. features: by name, None: all.
    Raises InputError for a store of another kind or one that is damaged."""
    if store.identity["kind"] != KIND:
        raise InputError(
            f"{store.name} holds {store.identity['kind']}: make records with data/lookahead.py"
        )
    chosen = range(store.n_rows) if rows is None else rows
    found = store.read(chosen, list(COLUMNS))
    ends = found.pop("offsets").tolist()
    found["chance"] = found["chance"].masked_fill(found["chance"] < 0, float("nan"))
    for name, dtype in _STORED.items():
        assert found[name].dtype == dtype
        found[name] = found[name].long()
    texts = [
        Text(**{name: found[name][begin:end] for name in COLUMNS}) for begin, end in pairwise(ends)
    ]
    made = store.identity
    records = Records.of(texts, made["max_new_tokens"]).reading(made["feature_names"], features)
    context = columns(records.context, made["context_features"], CONTEXT_FEATURES)
    return replace(records, context=context)
