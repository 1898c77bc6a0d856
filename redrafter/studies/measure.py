"""What a study's heads do on prompts that no training and no choice has read: all of them, and what
is measured beside them, interleaved in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from redrafter.config import CompareConfig, SpeedConfig
from redrafter.contracts import InputError
from redrafter.evaluation.methods import build_method
from redrafter.evaluation.models import load_resources, prompts_to_count
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
from redrafter.evaluation.report import read_result, write_result
from redrafter.evaluation.speed import decoding, make_batches, measure_speed
from redrafter.heads.base import DraftHead
from redrafter.heads.load import load_head
from redrafter.studies.train import Run, chosen
from redrafter.targets.model import Target


def method_name(row: str, seed: int) -> str:
    """Under which a head's figures stand."""
    return f"{row}, seed {seed}"


def load_heads(runs: Mapping[str, list[Run]], target: Target) -> dict[str, DraftHead]:
    """Of every row and seed the head of the chosen learning rate, by `method_name`."""
    return {
        method_name(row, run.seed): load_head(run.folder, target)
        for row, of_row in runs.items()
        for run in chosen(of_row)
    }


def speed_config(config: CompareConfig, temperature: float) -> SpeedConfig:
    """What eval/speed.py would be asked for."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(CompareConfig)}
    values = {name: getattr(config, name) for name in shared - {"methods", "out"}}
    return SpeedConfig(**values, methods=",".join(config.methods), temperature=temperature)


def measure_heads(
    config: CompareConfig, temperature: float, heads: Mapping[str, DraftHead], target: Target
) -> dict[str, Any]:
    """`measure_speed` of all heads and methods at one temperature."""
    speed, names = speed_config(config, temperature), config.methods
    more = prompts_to_count(names, speed)
    prompts, others, left_out = evaluation_prompts(
        target, speed, more, behind=config.validation_prompts
    )
    how = decoding(speed)
    resources, _ = load_resources(names, speed, target, None, others, how)
    methods = [build_method(name, target, how, resources) for name in names]
    for name, head in heads.items():
        method = build_method("head", target, how, replace(resources, head=head))
        method.name = name
        methods.append(method)
    batches, answers = make_batches(target, [p.ids for p in prompts], speed)
    body = measure_speed(target, methods, batches, answers, speed)
    body["warnings"] += left_out
    for head in heads.values():  # a row may bring stores of its own
        warning = holdout_warning(head.name_or_path, config.prompts, prompts[0].row)
        if warning and warning not in body["warnings"]:
            body["warnings"].append(warning)
    body["heads"] = _fingerprints(heads)
    body["measured_rows"] = [p.row for p in prompts]
    return body


def measure_all(
    config: CompareConfig, heads: Mapping[str, DraftHead], target: Target
) -> dict[float, dict[str, Any]]:
    """By temperature; what is there already is read, the rest measured and written."""
    bodies = {}
    for temperature in config.temperatures:
        file = Path(config.out) / f"t{temperature:g}.json"
        body = read_result(file, config, target.fingerprint(), "eval/compare_heads.py")
        if body is not None and body.get("heads") != _fingerprints(heads):
            raise InputError(f"{file} was measured of other heads: remove it")
        if body is None:
            print(f"temperature {temperature:g}: {len(heads)} heads", flush=True)
            made = measure_heads(config, temperature, heads, target)
            write_result(str(file), config, target, made)
            body = json.loads(file.read_text(encoding="utf-8"))
        bodies[temperature] = body
    return bodies


def _fingerprints(heads: Mapping[str, DraftHead]) -> dict[str, str]:
    return {name: head.fingerprint() for name, head in heads.items()}
