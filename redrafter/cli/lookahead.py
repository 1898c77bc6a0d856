"""`eval/lookahead.py`: lookaheads beside every static length, and the oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners
from redrafter.config import LookaheadEvalConfig, SpeedConfig
from redrafter.contracts import InputError

_DRAWN = 2  # lookaheads whose steps are drawn beside the best static length's
_WALKED = 10  # texts walked at a time
_FIRST_ROUNDS = 10  # measurements of costs before anything is timed


@dataclass(frozen=True)
class Part:
    """One drafter on one set of prompts at one temperature.

    lookaheads: name in tables -> method; speed: how they are decoded, and its `out`
    """

    title: str
    drafter: str
    lookaheads: dict[str, str]
    speed: SpeedConfig

    @property
    def file(self) -> Path:
        return Path(self.speed.out)


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not there yet, one part at a time; writes OUT/*.json, OUT/table.md and the
    pictures. Returns the exit status."""
    from redrafter.evaluation import methods as known

    config = parse(
        LookaheadEvalConfig,
        argv,
        "eval/lookahead.py",
        "When to stop drafting: lookaheads beside every static length and the oracle.",
        known.describe_drafting(),
        alone=True,
    )
    from redrafter.evaluation.pictures import new_figure
    from redrafter.evaluation.report import read_result, write_result
    from redrafter.evaluation.speed import decoding
    from redrafter.files import write_config

    new_figure(1, 1)  # without matplotlib: say so now
    parts = parts_of(config)
    names = list(dict.fromkeys(name for part in parts for name in names_of(part)))
    check(names, config)
    known.check_partners(names, parts[0].speed)
    target, head = load_both(config)
    partners, _ = load_partners(names, parts[0].speed, target, head, [], decoding(parts[0].speed))
    bodies = {}
    for part in parts:
        bodies[part.title] = read_result(
            part.file, part.speed, target.fingerprint(), "eval/lookahead.py"
        )
        if bodies[part.title] is None:
            check_plans(part, target, partners)
        else:
            check_same(part, bodies[part.title])
    texts: dict[tuple[str, float], Any] = {}
    for part in parts:
        if bodies[part.title] is None:
            print(f"{part.title}: {part.speed.n_prompts} prompts", flush=True)
            body = measure(part, target, partners, config, texts)
            write_result(part.speed.out, part.speed, target, body)
            bodies[part.title] = json.loads(part.file.read_text(encoding="utf-8"))
    write_config(Path(config.out) / "config.yaml", config)
    write_report(Path(config.out), parts, bodies)
    return 0


# ---------------------------------------------------------------------------------- what is asked


def parts_of(config: LookaheadEvalConfig) -> list[Part]:
    """Every drafter on every set at every temperature. Raises InputError naming a text that has a
    placeholder too many."""
    shared = {f.name for f in fields(SpeedConfig)} & {f.name for f in fields(LookaheadEvalConfig)}
    values = {name: getattr(config, name) for name in shared - {"out"}}
    found = []
    for key, drafter in config.drafters.items():
        for set_name, prompts in config.sets.items():
            for temperature in config.temperatures:
                put = {"drafter": key, "set": set_name, "temperature": f"{temperature:g}"}
                lookaheads: dict[str, str] = {}
                for label, text in config.lookaheads.items():
                    name = f"{drafter}:lookahead={fill(label, text, put)}"
                    # A classifier of another set is, on that set, the set's own.
                    if label not in config.without.get(key, ()) and name not in lookaheads.values():
                        lookaheads[label] = name
                speed = SpeedConfig(
                    **values,
                    prompts=prompts,
                    temperature=temperature,
                    methods=",".join([drafter, *lookaheads.values()]),
                    out=str(Path(config.out) / f"{key}-{set_name}-t{temperature:g}.json"),
                )
                title = f"{key}, {set_name}, T = {temperature:g}"
                found.append(Part(title, drafter, lookaheads, speed))
    return found


def fill(label: str, text: str, values: dict[str, str]) -> str:
    """The text with its placeholders replaced."""

    def value(found: re.Match) -> str:
        if found[1] not in values:
            there = ", ".join(f"{{{name}}}" for name in values)
            raise InputError(f"lookaheads: {label}: {found[0]} is none of {there}")
        return values[found[1]]

    return re.sub(r"\{([^{}]*)\}", value, text)


def names_of(part: Part) -> list[str]:
    """Methods that can be named before anything is loaded; static lengths follow."""
    return [part.drafter, *part.lookaheads.values()]


def check(names: Sequence[str], config: LookaheadEvalConfig) -> None:
    """Raises InputError for names that are none, or that cannot be compared here."""
    from redrafter.drafters.build import DRAFTERS
    from redrafter.drafters.options import parse_name
    from redrafter.evaluation.methods import needed, parse_methods
    from redrafter.evaluation.plans import parse_plan

    for key, drafter in config.drafters.items():
        try:
            if parse_name(drafter).kind not in DRAFTERS:
                raise InputError(f"{drafter!r} drafts nothing; choose from {', '.join(DRAFTERS)}")
            if parse_plan(drafter).lookahead is not None:
                raise InputError(f"{drafter!r} has a lookahead: write it under lookaheads")
        except InputError as error:
            raise InputError(f"drafters: {key}: {error}") from None
    parse_methods(",".join(names))
    wanted = needed(names)
    if "price" in wanted:
        raise InputError("drafters: one with budget=true chooses its levels itself: leave that out")
    if "bigrams" in wanted and config.bigrams is None:
        raise InputError("bigrams: give a table made by data/bigrams.py")


def check_plans(part: Part, target: Any, partners: Any) -> None:
    """Raises InputError, before anything is measured, for what fits no drafter or is missing."""
    from redrafter.evaluation.plans import planner

    for name in names_of(part):
        drafter = planner(name, target, partners)([[0]]).drafter
        if not drafter.drafts_alike:
            raise InputError(
                f"drafters: {part.drafter!r} chooses among drafters step by step: what a level "
                "costs is not known; name the drafters one by one"
            )


def check_same(part: Part, body: dict[str, Any]) -> None:
    """What was measured is what is asked for: names in tables and classifiers too."""
    if body.get("lookaheads") != part.lookaheads or body.get("classifiers") != classifiers(part):
        raise InputError(
            f"{part.file} was measured with lookaheads of other names, or with classifiers that "
            "have changed since: remove it, or give another out"
        )


def classifiers(part: Part) -> dict[str, str]:
    """Path of every folder that a lookahead is loaded from -> digest of its files."""
    from redrafter.drafters.options import parse_name
    from redrafter.evaluation.plans import parse_plan
    from redrafter.files import digest_file, digest_json

    found = {}
    for name in part.lookaheads.values():
        lookahead = parse_name(parse_plan(name).lookahead)
        options = (member.partition("=") for member in lookahead.members or ())
        path = next((value.strip() for key, _, value in options if key.strip() == "path"), None)
        if lookahead.kind == "disco" and path is None and part.speed.head is not None:
            path = f"{part.speed.head}/disco"
        if path is not None and Path(path).is_dir():
            files = sorted(p for p in Path(path).iterdir() if p.is_file())
            found[path] = digest_json({p.name: digest_file(p) for p in files})[:16]
    return found


# ------------------------------------------------------------------------------------- measuring


def measure(
    part: Part,
    target: Any,
    partners: Any,
    config: LookaheadEvalConfig,
    texts: dict[tuple[str, float], Any],
) -> dict[str, Any]:
    """All figures of a part. texts: plain answers that are already known are kept here"""
    from redrafter.drafters.profile import step_costs
    from redrafter.evaluation.lookaheads import Measured, reliability, shown, summary
    from redrafter.evaluation.plans import planner
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
    from redrafter.evaluation.speed import decoding, make_batches, noise_warning
    from redrafter.evaluation.steps import judge

    speed, wanted = part.speed, decoding(part.speed)
    key = (speed.prompts, speed.temperature)
    if key not in texts:
        prompts, _ = evaluation_prompts(target, speed)
        texts[key] = prompts, *make_batches(target, [p.ids for p in prompts], speed)
    prompts, batches, answers = texts[key]
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
    meter = meter_for(target, drafter, sizes, batches, answers, speed.temperature)
    best = best_length({k: steps[k] for k in lengths}, meter)
    if config.timed is None:
        clocked = list(names.values())
    else:
        clocked = ["plain", names[best], *(names[n] for n in config.timed if n in names)]
    runs = timed(part, target, partners, clocked, batches, meter)
    table = meter.table()
    measured = {
        label: Measured(name, lengths.get(label), steps[label], runs.get(name))
        for label, name in names.items()
    }
    oracle = next((label for label, name in part.lookaheads.items() if _is_oracle(name)), None)
    costs = asdict(table)
    body = summary(measured, step_costs(costs, None, None), answers, part.drafter, oracle)
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
        "costs": costs,
        "warnings": noise_warning(table) + ([warning] if warning else []),
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
    from redrafter.data.lookahead import walk_texts
    from redrafter.data.replay import Records, oracle, static
    from redrafter.evaluation.plans import planner
    from redrafter.evaluation.speed import decoding
    from redrafter.evaluation.steps import count_steps, plain_steps, replayed_steps
    from redrafter.lookahead.disco import DiscoLookahead
    from redrafter.training.stopping import policy_of

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
                looks = drafter.foresees and lookahead.level_by_level
                read = records.reading(drafter.feature_names, lookahead.reads)
                found[label] = replayed_steps(read, drafter, policy_of(lookahead), looks)
            else:
                found[label] = count_steps(target, make, wanted, batches)
    return found


def meter_for(
    target: Any, drafter: Any, sizes: set[int], batches: Any, answers: Any, temperature: float
) -> Any:
    """Measures the drafter, and forwards over trees of these sizes; once now."""
    from redrafter.evaluation.costs import CostMeter
    from redrafter.evaluation.speed import middle_context

    context, limit = middle_context(batches, answers), target.max_positions
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


def best_length(steps: dict[str, Any], meter: Any) -> str:
    """The static length of most tokens per second by the costs so far."""
    from redrafter.drafters.profile import step_costs

    costs = step_costs(asdict(meter.table()), None, None)

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
    from redrafter.evaluation.plans import parse_plan

    return parse_name(parse_plan(name).lookahead).kind == "oracle"


# -------------------------------------------------------------------------------------- reporting


def write_report(out: Path, parts: Sequence[Part], bodies: dict[str, Any]) -> None:
    """table.md and the pictures of all parts; prints the table."""
    from redrafter.evaluation import lookahead_report as report
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
