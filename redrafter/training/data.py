"""From the configuration to what a training reads: the stages of the pipeline, one after another.

    source --build_rows--> prompts --build_answers--> answers --build_states--> states
                    \\-----> texts ------------------------------/

Each stage is a store that is made once and found again; with stores given, none is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from redrafter.config import DataConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows, report, write_rows
from redrafter.data.chat import Renderer
from redrafter.data.conversations import build_conversations
from redrafter.data.day import dated, day_of
from redrafter.data.prompts import rendered, say_left_out
from redrafter.data.reading import Fresh, Hybrid, Part, Stored, read_weights
from redrafter.data.rows import RejectedRow, TokenRow
from redrafter.data.sources import read_source
from redrafter.data.states import StateMaker, build_states, check_context, check_target
from redrafter.data.store import Store, begun, job_folder
from redrafter.data.vocabulary import check_store_ids
from redrafter.files import digest_json
from redrafter.processes import by_main, say
from redrafter.targets.model import Target
from redrafter.targets.text import tokenizer_of
from redrafter.training.step import needed_teacher

_ANY_DAY = "2000-01-01"


@dataclass
class TrainingData:
    """parts, weights: see `reading.py`; digest: of all that the batches' content depends on;
    receipt: per part its weight and the stages that made it (`Store.lineage`)"""

    parts: list[Part]
    weights: list[float]
    digest: str
    receipt: list[dict[str, Any]]


def check_settings(config: TrainConfig) -> None:
    """Raises InputError where the data, the labels and the loss asked for do not go together."""
    data, teacher = config.data, needed_teacher(config.loss)
    if config.target.shard != "none" and data.mode != "online" and not data.stores:
        raise InputError(
            f"target.shard {config.target.shard} with data.mode {data.mode}: states are not "
            "written by processes that share the target's weights: take data.mode online, or give "
            "data.stores"
        )
    if teacher and data.labels == "local":
        raise InputError(
            "data.labels local has no predictions of the target for the tokens it adds: give "
            "loss.kl and its like no weight, or take labels tokens"
        )
    if data.states.aux_layers is not None:
        raise InputError(
            "data.states.aux_layers is for data/states.py: a training makes the states of the "
            "layers that head.aux_layers names. Leave it out"
        )
    if data.stores and data.mode != "offline":
        raise InputError(f"data.mode {data.mode} makes states itself: give no data.stores with it")
    if data.stores:
        return
    if teacher == "top_k" and not data.states.teacher_top_k:
        raise InputError("loss.teacher top_k needs data.states.teacher_top_k, how many to store")
    if data.source is None:
        raise InputError(
            "nothing to learn from: give --data.source.path (text or prompts) or --data.stores "
            "(hidden states made by data/states.py)"
        )


def load_training_data(config: TrainConfig, target: Target) -> TrainingData:
    """Read the stores named, or make what is missing. Raises InputError where it does not fit."""
    check_settings(config)
    data = config.data
    if data.stores:
        return _from_stores(config, target)
    folder = data_folder(config)
    rows = _rows(data, target, config.seed, folder)
    say(report(rows))
    n = continuation_tokens(data, config.optim.depth)
    maker = StateMaker(target, data.states, n)
    part: Part
    made = rows
    if data.mode == "offline":
        made = build_states(target, rows, data.states, folder, continuation=n, named=True)
        part = Stored(made)
    else:
        check_context(rows, target)
        check_store_ids(rows, target)
        part = (
            Fresh(rows, maker) if data.mode == "online" else Hybrid(rows, maker, folder, named=True)
        )
    content = _content(config, rows.digest, maker.identity(), target.aux_layers)
    receipt = [{"weight": 1.0, "stages": made.lineage}]
    return TrainingData([part], [1.0], digest_json([[content, 1.0]]), receipt)


def _content(
    config: TrainConfig, rows: str, made: dict[str, Any], layers: Sequence[int]
) -> list:  # fmt: skip
    """What the batches read of a part depends on. rows: digest; made: identity of its states;
    layers: those whose states are read beside the last one's"""
    n = continuation_tokens(config.data, config.optim.depth)
    top_k = [made["teacher_top_k"]] if needed_teacher(config.loss) == "top_k" else []
    layers = [list(layers)] if layers else []
    return [rows, made["dtype"], n, *top_k, *layers]


def data_folder(config: TrainConfig) -> Path:
    """Where the stages' folders lie."""
    return Path(config.data.folder or Path(config.output_dir) / "data")


def continuation_tokens(data: DataConfig, depth: int) -> int:
    """Greedy tokens per position that the labels need."""
    return {"tokens": 0, "greedy": 1, "local": depth + 1}[data.labels]


def _rows(data: DataConfig, target: Target, seed: int, folder: Path) -> Store:
    """Answers to the source's prompts or conversations, or its texts."""
    context, source = target.max_positions, data.source
    tokenizer = tokenizer_of(target, f"data.source {source.path}")
    if data.text == "source":
        return build_rows(
            source, tokenizer, "texts", folder, max_tokens=context,
            vocab_size=target.vocab_size, eos=target.eos_token_ids, named=True,
        )  # fmt: skip
    if data.text == "conversations":
        return build_conversations(target, source, data.answers, folder, seed=seed, named=True)
    room = None if context is None else context - data.answers.max_new_tokens
    prompts = build_rows(
        source, tokenizer, "prompts", folder, max_tokens=room,
        vocab_size=target.vocab_size, named=True,
    )  # fmt: skip
    say(report(prompts))
    return build_answers(target, prompts, data.answers, folder, seed=seed, named=True)


def _from_stores(config: TrainConfig, target: Target) -> TrainingData:
    data, depth, teacher = config.data, config.optim.depth, needed_teacher(config.loss)
    parts, weights, content = [], [], []
    n = continuation_tokens(data, depth)
    for path, weight in read_weights(data.stores):
        store = Store(path, "states")
        check_target(store, target)
        found = store.identity["continuation"]
        if found < n:
            raise InputError(
                f"{path} holds {found} greedy tokens per position, data.labels {data.labels} at "
                f"optim.depth {depth} needs {n}: make it with --continuation {n}"
            )
        if teacher == "top_k" and "teacher_ids" not in store.columns:
            raise InputError(
                f"{path} holds no probable tokens of the target, which loss.teacher top_k needs: "
                "make it with --states.teacher_top_k, or take loss.teacher states"
            )
        columns = ["tokens", "supervised", "states"]
        columns += ["teacher_ids", "teacher_log_p"] * (teacher == "top_k")
        columns += ["scale"] * ("scale" in store.columns) + ["continuation"] * (n > 0)
        parts.append(Stored(store, columns, target.aux_layers))
        weights.append(weight)
        made = _content(config, store.identity["rows"], store.identity, target.aux_layers)
        content.append([made, weight])
        if store.identity["dtype"] != parts[0].store.identity["dtype"]:
            raise InputError(
                f"{path} holds {store.identity['dtype']}, {parts[0].store.name} "
                f"{parts[0].store.identity['dtype']}: stores that are mixed need one dtype"
            )
        top_k = [p.store.identity["teacher_top_k"] for p in (parts[0], parts[-1])]
        if teacher == "top_k" and top_k[0] != top_k[1]:
            raise InputError(
                f"{path} holds {top_k[1]} probable tokens per position, {parts[0].store.name} "
                f"{top_k[0]}: stores that are mixed need one teacher_top_k"
            )
    receipt = [
        {"weight": weight, "stages": part.store.lineage}
        for part, weight in zip(parts, weights, strict=True)
    ]
    return TrainingData(parts, weights, digest_json(content), receipt)


def held_out_prompts(config: TrainConfig, target: Target, folder: Path) -> Store:
    """The last `eval.prompts` rows of eval.source, or of the held-out end of data.source."""
    measured = config.eval
    source = measured.source or config.data.source
    if source is None or (measured.source is None and source.holdout_rows < measured.prompts):
        raise InputError(
            f"eval.prompts {measured.prompts}: no held-out prompts to measure on; set "
            "data.source.holdout_rows (rows that training never reads), eval.source.path, or "
            "eval.prompts 0"
        )
    context = target.max_positions
    room = None if context is None else context - measured.max_new_tokens
    # What training left out and what is read here are both counted from the end.
    whole = read_source(replace(source, holdout_rows=0, n_rows=None))
    tokenizer = tokenizer_of(target, f"eval.source {source.path}")

    def rows(day: str | None, left_out: list[RejectedRow]) -> list[TokenRow]:
        renderer = Renderer(tokenizer, whole.config, day)
        prompts = rendered(
            whole, whole.held_out(measured.prompts), renderer, room, "eval.max_new_tokens",
            target.vocab_size, left_out,
        )  # fmt: skip
        return [TokenRow(p.ids, (False,) * len(p.ids), p.row) for p in prompts]

    # Found again on another day by what the prompts are on one and the same day.
    left_out: list[RejectedRow] = []
    on_any_day = rows(_ANY_DAY, left_out)
    for warning in say_left_out(left_out, len(on_any_day), "eval.max_new_tokens"):
        say(f"warning: {warning}")
    identity = {"prompts": digest_json([[r.source_row, r.ids] for r in on_any_day])}
    place = job_folder(folder, "prompts", identity, named=True)
    day = by_main(lambda: day_of(tokenizer, begun(place)))
    return write_rows(
        lambda: rows(day, []), "prompts", folder, dated(identity, day), named=True
    )  # fmt: skip
