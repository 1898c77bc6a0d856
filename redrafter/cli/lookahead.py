"""`eval/lookahead.py`: lookaheads beside every static length, and the oracle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.lookahead_parts import (
    Part,
    check,
    check_plans,
    check_same,
    classifiers,
    costs_file,
    names_of,
    parts_of,
    priced_by,
)
from redrafter.cli.models import load_both, load_partners
from redrafter.config import LookaheadEvalConfig
from redrafter.contracts import InputError

_DRAWN = 2  # lookaheads whose steps are drawn beside the best static length's
_WALKED = 10  # texts walked at a time
_FIRST_ROUNDS = 10  # measurements of costs before anything is timed


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not there yet, one part at a time; writes OUT/*.json, OUT/table.md and the
    pictures. Returns the exit status."""
    config = parse(
        LookaheadEvalConfig,
        argv,
        "eval/lookahead.py",
        "When to stop drafting: lookaheads beside every static length and the oracle.",
        names="describe_drafting",
        alone=True,
    )
    from redrafter.drafters.profile import read_costs
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.pictures import new_figure
    from redrafter.evaluation.report import read_result, write_result
    from redrafter.evaluation.speed import decoding
    from redrafter.files import write_config

    new_figure(1, 1)  # without matplotlib: say so now
    parts = parts_of(config)
    names = list(dict.fromkeys(name for part in parts for name in names_of(part)))
    check(names, config)
    prices = {part.title: costs_file(part, config) for part in parts}
    known.check_partners(names, parts[0].speed)
    target, head = load_both(config)
    for file in filter(None, prices.values()):
        read_costs(file, target)
    partners, _ = load_partners(names, parts[0].speed, target, head, [], decoding(parts[0].speed))
    bodies = {}
    for part in parts:
        bodies[part.title] = read_result(
            part.file, part.speed, target.fingerprint(), "eval/lookahead.py"
        )
        if bodies[part.title] is None:
            check_plans(part, target, partners)
        else:
            check_same(part, bodies[part.title], prices[part.title])
    texts: dict[tuple[str, float], Any] = {}
    for part in parts:
        if bodies[part.title] is None:
            print(f"{part.title}: {part.speed.n_prompts} prompts", flush=True)
            body = measure(part, target, partners, config, prices[part.title], texts)
            write_result(part.speed.out, part.speed, target, body)
            bodies[part.title] = json.loads(part.file.read_text(encoding="utf-8"))
    write_config(Path(config.out) / "config.yaml", config)
    write_report(Path(config.out), parts, bodies)
    return 0


# ------------------------------------------------------------------------------------- measuring


def measure(
    part: Part,
    target: Any,
    partners: Any,
    config: LookaheadEvalConfig,
    prices: str | None,
    texts: dict[tuple[str, float], Any],
) -> dict[str, Any]:
    """All figures of a part.

    prices: a file of eval/costs.py; None measures them
    texts: plain answers that are already known are kept here
    """
    from redrafter.drafters.profile import step_costs
    from redrafter.drafting import planner
    from redrafter.evaluation.lookaheads.steps import judge
    from redrafter.evaluation.lookaheads.summary import Measured, reliability, shown, summary
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
    from redrafter.evaluation.speed import decoding, make_batches, middle_context, noise_warning

    speed, wanted = part.speed, decoding(part.speed)
    key = (speed.prompts, speed.temperature)
    if key not in texts:
        prompts, _, left_out = evaluation_prompts(target, speed)
        batches = make_batches(target, [p.ids for p in prompts], speed)
        texts[key] = prompts, left_out, *batches
    prompts, left_out, batches, answers = texts[key]
    drafter = planner(part.drafter, target, partners)(batches[0].texts).drafter
    names, lengths = {"static 0": "plain"}, {"static 0": 0}
    for depth in range(1, drafter.max_depth + 1):
        names[f"static {depth}"] = f"{part.drafter}:lookahead=static(depth={depth})"
        lengths[f"static {depth}"] = depth
    names |= part.lookaheads
    steps = counted(part, target, partners, drafter, names, lengths, batches, answers)
    judged = {}
    for label, name in part.lookaheads.items():
        if not judged:  # one is enough to see whether the classifier is calibrated
            found = judge(target, planner(name, target, partners), wanted, batches)
            judged |= {} if found is None else {label: found}
    sizes = {step.nodes for rows in steps.values() for row in rows for step in row}
    context = middle_context(batches, answers)
    meter = None
    if prices is None:
        meter = meter_for(target, drafter, sizes, context, speed.temperature)

    def costs() -> Any:
        """As far as they are known by now."""
        if meter is not None:
            return step_costs(asdict(meter.table()), None, None)
        return step_costs(prices, part.drafter, target, context)

    best = best_length({k: steps[k] for k in lengths}, costs())
    if config.timed is None:
        clocked = list(names.values())
    else:
        clocked = ["plain", names[best], *(names[n] for n in config.timed if n in names)]
    runs = timed(part, target, partners, clocked, batches, meter)
    measured = {
        label: Measured(name, lengths.get(label), steps[label], runs.get(name))
        for label, name in names.items()
    }
    oracle = next((label for label, name in part.lookaheads.items() if _is_oracle(name)), None)
    body = summary(measured, costs(), answers, part.drafter, oracle)
    drawn = [oracle, body["best_static"] if lengths[body["best_static"]] else body["best_drafting"]]
    others = [*judged] or [label for label in part.lookaheads if label != oracle]
    drawn += others[:_DRAWN]
    warning = config.head and holdout_warning(config.head, speed.prompts, prompts[0].row)
    return {
        "drafter": part.drafter,
        "temperature": speed.temperature,
        "lookaheads": part.lookaheads,
        "classifiers": classifiers(part),
        **body,
        "shown": {
            label: shown(steps[label][config.shown_prompt])
            for label in dict.fromkeys(drawn)
            if label is not None
        },
        "reliability": {
            label: reliability([p for _, p, _ in found], [right for _, _, right in found])
            for label, found in judged.items()
        },
        "priced_by": priced_by(prices),
        "costs": asdict(meter.table()) if meter else asdict(costs()),
        "warnings": (noise_warning(meter.table()) if meter else [])
        + ([warning] if warning else [])
        + left_out,
    }


def counted(
    part: Part,
    target: Any,
    partners: Any,
    drafter: Any,
    names: dict[str, str],
    lengths: dict[str, int],
    batches: Any,
    answers: Any,
) -> dict[str, Any]:
    """The steps of every name. Static lengths, classifiers and the oracle are replayed on one walk
    over the texts where the drafter can be walked; others are decoded with."""
    from redrafter.drafting import planner
    from redrafter.evaluation.lookaheads.steps import (
        count_steps,
        plain_steps,
        replayed_steps,
    )
    from redrafter.evaluation.speed import decoding
    from redrafter.lookahead.disco import DiscoLookahead
    from redrafter.records.choose import policy_of
    from redrafter.records.make import walk_texts
    from redrafter.records.policies import Records, oracle, static

    wanted, records = decoding(part.speed), None
    try:
        texts = []
        for i in range(0, len(batches), _WALKED):
            some = batches[i : i + _WALKED]
            rows, seeds = [b.prompts[0] for b in some], [b.seeds[0] for b in some]
            texts += walk_texts(target, drafter, rows, wanted, seeds)
        records = Records.of(texts, part.speed.max_new_tokens)
    except InputError:  # it cannot be walked
        pass
    found = {}
    for label, name in names.items():
        if name == "plain":
            found[label] = plain_steps(answers)
        elif records is not None and label in lengths:
            found[label] = replayed_steps(records, drafter, static(lengths[label]))
        elif records is not None and name in part.lookaheads.values() and _is_oracle(name):
            found[label] = replayed_steps(records, drafter, oracle)
        else:
            make = planner(name, target, partners)
            lookahead = make(batches[0].texts).lookahead
            if records is not None and isinstance(lookahead, DiscoLookahead):
                looks = drafter.early_features and lookahead.level_by_level
                read = records.reading(drafter.feature_names, lookahead.reads)
                found[label] = replayed_steps(read, drafter, policy_of(lookahead), looks)
            else:
                found[label] = count_steps(target, make, wanted, batches)
    return found


def meter_for(target: Any, drafter: Any, sizes: set[int], context: int, temperature: float) -> Any:
    """Measures the drafter, and forwards over trees of these sizes; once now."""
    from redrafter.costs import CostMeter

    limit = target.max_positions
    if limit is not None:
        context = max(1, min(context, limit - drafter.max_nodes - 1))
    meter = CostMeter(
        target,
        new_tokens=sorted({1, drafter.max_nodes} | sizes),
        contexts=[context],
        batches=[1],
        drafters={"drafter": drafter},
        temperature=temperature,
    )
    meter.run(_FIRST_ROUNDS)
    return meter


def best_length(steps: dict[str, Any], costs: Any) -> str:
    """The static length of most tokens per second by these costs."""

    def speed(rows: Any) -> float:
        seconds = sum(step.cost_s(costs) for row in rows for step in row)
        return sum(step.emitted for row in rows for step in row) / seconds

    return max(steps, key=lambda label: speed(steps[label]))


def timed(
    part: Part, target: Any, partners: Any, names: Iterable[str], batches: Any, meter: Any
) -> Any:
    """Runs of every method, one after the other on each prompt, costs measured in between."""
    from redrafter.evaluation.methods import build_method
    from redrafter.evaluation.speed import decoding, run_interleaved

    speed = part.speed
    once = dict.fromkeys(names)  # a lookahead may be a static one by another label
    methods = [build_method(name, target, decoding(speed), partners) for name in once]
    for method in methods:  # the warm-up
        method.prepare(batches[0])
        method.run(batches[0])
    return run_interleaved(methods, batches, speed.repeats, meter, speed.cost_rounds)


def _is_oracle(name: str) -> bool:
    from redrafter.drafters.options import parse_name
    from redrafter.drafting import parse_plan

    return parse_name(parse_plan(name).lookahead).kind == "oracle"


# -------------------------------------------------------------------------------------- reporting


def write_report(out: Path, parts: Sequence[Part], bodies: dict[str, Any]) -> None:
    """table.md and the pictures of all parts; prints the table."""
    from redrafter.evaluation.lookaheads.summary import report
    from redrafter.evaluation.pictures import save_figure
    from redrafter.files import write_text

    tables = [report.overview(bodies), *(report.markdown(t, b) for t, b in bodies.items())]
    write_text(out / "table.md", "\n\n".join(tables) + "\n")
    pictures = {
        "ratio": report.ratio_chart(bodies),
        "lengths": report.lengths_chart(bodies),
        "reliability": report.reliability_chart(bodies),
    }
    pictures |= {f"steps-{p.file.stem}": report.steps_chart(p.title, bodies[p.title])
                 for p in parts}  # fmt: skip
    for name, figure in pictures.items():
        if figure is not None:
            save_figure(figure, out / name)
    print((out / "table.md").read_text(encoding="utf-8"))
