"""`eval/table.py`: all methods on several prompt sets and temperatures, a table and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both
from redrafter.cli.speed import measure
from redrafter.config import SpeedConfig, TableConfig
from redrafter.contracts import InputError


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not there yet, one prompt set and temperature at a time; writes OUT/*.json,
    OUT/table.md and the pictures. Returns the exit status."""
    config = parse(
        TableConfig,
        argv,
        "eval/table.py",
        "The table of all methods: what eval/speed.py measures, over prompt sets and temperatures.",
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation import charts
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.pictures import new_figure, save_figure
    from redrafter.evaluation.report import markdown, read_result, write_result
    from redrafter.files import write_config, write_text

    new_figure(1, 1)  # without matplotlib: say so now
    parts = settings(config)
    names = known.parse_methods(",".join(config.methods))
    for part in parts.values():
        known.check_partners(names, part)
    target, head = load_both(config, measured=True)
    out, bodies = Path(config.out), {}
    for name, part in parts.items():
        file = Path(part.out)
        body = read_result(file, part, target.fingerprint(), "eval/table.py")
        if body is None:
            print(f"{name}: {len(names)} methods, {part.n_prompts} prompts", flush=True)
            body = measure(part, names, target, head)
            write_result(part.out, part, target, body, head)
            body = json.loads(file.read_text(encoding="utf-8"))
        bodies[name] = body
    write_config(out / "config.yaml", config)
    write_text(
        out / "table.md", "\n\n".join(markdown(n, body) for n, body in bodies.items()) + "\n"
    )
    for name, draw in (
        ("speedup", charts.speedup_chart),
        ("tokens", charts.tokens_chart),
        ("acceptance", charts.acceptance_chart),
    ):
        save_figure(draw(bodies), out / name)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 0


def settings(config: TableConfig) -> dict[str, SpeedConfig]:
    """What eval/speed.py would be asked for, per prompt set and temperature."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(TableConfig)}
    values = {name: getattr(config, name) for name in shared - {"methods", "out"}}
    found = {}
    for name, prompts in config.sets.items():
        if not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"sets: {name!r} must be letters, digits, - and _: files bear it")
        for temperature in config.temperatures:
            found[f"{name}, T = {temperature:g}"] = SpeedConfig(
                **values,
                prompts=prompts,
                temperature=temperature,
                methods=",".join(config.methods),
                out=str(Path(config.out) / f"{name}-t{temperature:g}.json"),
            )
    return found
