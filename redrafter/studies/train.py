"""The trainings of a study: every row with every learning rate, then with its other seeds.

A row's rate is chosen on validation prompts that nothing else reads. What is finished is found
again by its folder; what was cut short goes on from its last checkpoint. Ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from redrafter.config import CompareConfig, SourceConfig, TrainConfig
from redrafter.config.compare import ROW_KEYS
from redrafter.contracts import InputError
from redrafter.files import plain_values
from redrafter.planning.meta import MetaTarget
from redrafter.studies.size import n_parameters, sized
from redrafter.training.checkpoint import changes
from redrafter.training.loop import Training

#: of a training: where it lies, and how it is gone on with
_FREE = ("output_dir", "resume")


@dataclass(frozen=True)
class Run:
    """One training. folder: with the head that it exported; validation: tokens per step, greedy"""

    lr: float
    seed: int
    folder: Path
    validation: float


@dataclass(frozen=True)
class Row:
    """config: but for learning rate, seed and folder; seeds: that it is trained with;
    learning_rates: that its first seed tries"""

    name: str
    config: TrainConfig
    seeds: tuple[int, ...]
    parameters: int
    learning_rates: tuple[float, ...]


def rows_of(
    config: CompareConfig, trainings: Mapping[str, TrainConfig], target: MetaTarget
) -> list[Row]:
    """The rows, their heads brought to the sizes asked for. trainings: by row, as parsed.

    Raises InputError naming a row that asks for what there is not.
    """
    found: dict[str, Row] = {}
    for name, training in trainings.items():
        own = {key: config.rows[name].get(key) for key in ROW_KEYS}
        if (size := own["parameters"]) is not None:
            if isinstance(size, str) and size not in found:
                raise InputError(
                    f"rows: {name}: parameters {size!r} is no row before it "
                    f"({', '.join(found) or 'none is'}); give one of them, or a number"
                )
            size = found[size].parameters if isinstance(size, str) else int(size)
            training = sized(training, size, target, name)
        rates = config.learning_rates
        if own["learning_rates"] is not None:
            rates = tuple(float(lr) for lr in own["learning_rates"])
        n_seeds = len(config.seeds) if own["seeds"] is None else own["seeds"]
        if not 1 <= n_seeds <= len(config.seeds):
            raise InputError(f"rows: {name}: seeds {n_seeds} must lie in 1..{len(config.seeds)}")
        count = n_parameters(training.head, training.optim.depth, target)
        seeds = config.seeds[:n_seeds]
        found[name] = Row(name, _measured(config, training), seeds, count, rates)
    return list(found.values())


def _measured(config: CompareConfig, training: TrainConfig) -> TrainConfig:
    """What is the same of all rows: the target, the data, and the validation at the end."""
    source = SourceConfig(
        path=config.prompts, format=config.prompt_format, prompt_column=config.prompt_column,
        text_prompt_tokens=config.text_prompt_tokens,
    )  # fmt: skip
    measured = replace(
        training.eval, source=source, prompts=config.validation_prompts, temperatures=(0.0,),
        max_new_tokens=config.max_new_tokens, tree=config.tree, every_steps=training.optim.steps,
    )  # fmt: skip
    folder = str(Path(config.out) / "data")
    stores = training.data.stores or tuple(config.stores)  # a row may learn from others
    data = replace(training.data, stores=stores, folder=folder)
    return replace(
        training, target=config.target, data=data, eval=measured, tracker=None, resume="auto"
    )


def train_rows(config: CompareConfig, rows: list[Row]) -> dict[str, list[Run]]:
    """By row all runs: first those of every learning rate, then those of the other seeds with the
    best of them."""
    found: dict[str, list[Run]] = {}
    for row in rows:
        searched = [_run(config, row, lr, row.seeds[0]) for lr in row.learning_rates]
        lr = best_rate(searched)
        found[row.name] = searched + [_run(config, row, lr, seed) for seed in row.seeds[1:]]
    return found


def best_rate(searched: list[Run]) -> float:
    """That of the most tokens per step on the validation prompts; the first of equal ones."""
    return max(searched, key=lambda run: run.validation).lr


def chosen(runs: list[Run]) -> list[Run]:
    """One run per seed, all of the learning rate that was chosen."""
    first = runs[0].seed
    lr = best_rate([run for run in runs if run.seed == first])
    return [run for run in runs if run.lr == lr]


def _run(config: CompareConfig, row: Row, lr: float, seed: int) -> Run:
    folder = Path(config.out) / "runs" / row.name / f"lr{lr:g}-seed{seed}"
    training = replace(
        row.config, output_dir=str(folder), seed=seed, optim=replace(row.config.optim, lr=lr)
    )
    if (facts := _finished(folder, training)) is None:
        print(f"{row.name}: learning rate {lr:g}, seed {seed}", flush=True)
        Training(training).train()
        shutil.rmtree(folder / "checkpoints")  # two to three times the head, and of no more use
        facts = _finished(folder, training)
    return Run(lr, seed, folder, facts["best"]["tokens_per_step"]["greedy"])


def _finished(folder: Path, training: TrainConfig) -> dict[str, Any] | None:
    """What a training left beside its head, None where it did not end."""
    file = folder / "provenance.json"
    if not file.is_file() or (folder / "checkpoints").is_dir():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    if differ := changes(facts["config"], plain_values(training), _FREE):
        raise InputError(
            f"{folder} was trained with another {', '.join(differ)}: remove it, or give another out"
        )
    return facts
