"""`eval/regret.py`: selectors beside their arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners, prompts_to_count
from redrafter.config import RegretConfig, SpeedConfig


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Decodes the stream with every arm and selector, interleaved; prints, writes JSON and
    pictures. Returns the exit status."""
    config = parse(
        RegretConfig,
        argv,
        "eval/regret.py",
        "What a selector of drafters loses, or gains, against the best arm in hindsight.",
        names="describe_drafting",
        alone=True,
    )
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.pictures import new_figure, save_figure
    from redrafter.evaluation.prompts import evaluation_prompts
    from redrafter.evaluation.regret import regret, regret_chart
    from redrafter.evaluation.report import write_result
    from redrafter.evaluation.speed import Timing, decoding, make_batches, run_interleaved

    new_figure(1, 1)  # without matplotlib: say so now
    arms = known.parse_methods(",".join(config.arms))
    members = ",".join(arms)
    selectors = {policy: _selector(members, policy) for policy in config.policies}
    names = known.parse_methods(",".join([*arms, *selectors.values()]))
    parts = [_speed_config(config, file) for file in config.stream]
    known.check_partners(names, parts[0])
    target, head = load_both(config, measured=True)
    rows, others, warnings = [], [], []
    for part in parts:
        used, more, left_out = evaluation_prompts(target, part, prompts_to_count(names, part))
        rows.append([p.ids for p in used])
        others += more
        warnings += left_out
    wanted = decoding(parts[0])
    partners, _ = load_partners(names, parts[0], target, head, others, wanted)
    methods = [known.build_method(name, target, wanted, partners) for name in names]
    batches, answers = make_batches(target, [ids for part in rows for ids in part], parts[0])
    for method in methods[: len(arms)]:  # warm, without teaching the selectors anything
        method.prepare(batches[0])
        method.run(batches[0])
    runs = run_interleaved(methods, batches)
    seconds = {name: Timing(run).total_s.tolist() for name, run in runs.items()}
    body = {
        **regret(seconds, arms, [len(part) for part in rows]),
        "arms": arms,
        "warnings": warnings,
    }
    body["equal"] = {
        name: sum(r[0].tokens[0] == a for r, a in zip(run, answers, strict=True))
        for name, run in runs.items()
    }
    body["choices"] = {
        policy: [r[0].report for r in runs[name]] for policy, name in selectors.items()
    }
    print("\n".join([show(body, len(answers)), *(f"warning: {said}" for said in warnings)]))
    if config.out is not None:
        write_result(config.out, config, target, body)
        save_figure(regret_chart(body), Path(config.out).with_suffix(""))
    return 0


def _selector(members: str, policy: str) -> str:
    """`ucb:exploration=0.2` -> `select(...):policy=ucb:exploration=0.2`."""
    return f"select({members}):policy={policy}"


def _speed_config(config: RegretConfig, file: str) -> SpeedConfig:
    """What eval/speed.py would be asked for, on one file of the stream."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(RegretConfig)}
    values = {name: getattr(config, name) for name in shared - {"out"}}
    return replace(SpeedConfig(prompts=file, **values), methods="plain")


def show(body: dict[str, Any], n_prompts: int) -> str:
    from redrafter.evaluation.report import table

    columns = ["method", "seconds", *(f"part {i}" for i in range(1, 1 + len(body["parts"]))),
               "regret", "= plain"]  # fmt: skip
    rows = [
        [name, m["total_s"], *(part["seconds"][name] for part in body["parts"]),
         f"{100 * m['regret_share']:+.1f} %", f"{body['equal'][name]}/{n_prompts}"]
        for name, m in body["methods"].items()
    ]  # fmt: skip
    best = ", ".join(part["best_arm"] for part in body["parts"])
    return "\n".join([
        table(columns, rows), "",
        f"best fixed arm in hindsight: {body['best_arm']}; of each part: {best} "
        f"({body['best_per_part_s']:.2f} s together)",
    ])  # fmt: skip
