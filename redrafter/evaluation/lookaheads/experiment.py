"""The experiment of `eval/lookahead.py`: every case measured, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.nn import Module

from redrafter.config import LookaheadEvalConfig, SpeedConfig
from redrafter.contracts import Drafter, InputError
from redrafter.costs import CostMeter
from redrafter.data.prompts import Prompt
from redrafter.drafters.build import Resources
from redrafter.drafters.options import parse_name
from redrafter.drafters.profile import StepCosts, read_costs, step_costs
from redrafter.drafting import parse_strategy, strategy_maker
from redrafter.evaluation.lookaheads.cases import (
    Case,
    check_same,
    check_strategies,
    classifiers,
    priced_by,
)
from redrafter.evaluation.lookaheads.steps import (
    Step,
    count_steps,
    judge,
    plain_steps,
    simulated_steps,
)
from redrafter.evaluation.lookaheads.summary import Measured, reliability, shown, summary
from redrafter.evaluation.methods import PromptBatch, build_method
from redrafter.evaluation.models import load_resources
from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
from redrafter.evaluation.report import read_result, write_result
from redrafter.evaluation.speed import (
    Runs,
    decoding,
    make_batches,
    middle_context,
    noise_warning,
    run_interleaved,
)
from redrafter.lookahead.disco import DiscoLookahead
from redrafter.records.choose import policy_of
from redrafter.records.make import walk_texts
from redrafter.records.policies import Records, oracle, static
from redrafter.targets.model import Target

Steps = dict[str, list[list[Step]]]  # label -> prompt -> its steps

_DRAWN = 2  # lookaheads whose steps are drawn beside the best static length's
_WALKED = 10  # texts walked at a time
_FIRST_ROUNDS = 10  # measurements of costs before anything is timed


@dataclass(frozen=True)
class Texts:
    """A set of prompts with plain's answers. left_out: what there is to say of other rows"""

    prompts: list[Prompt]
    left_out: list[str]
    batches: list[PromptBatch]
    answers: list[list[int]]


@dataclass
class Loaded:
    """What all cases share. texts: by set and temperature, as far as they are known by now"""

    config: LookaheadEvalConfig
    target: Target
    resources: Resources
    texts: dict[tuple[str, float], Texts] = field(default_factory=dict)

    def texts_of(self, case: Case) -> Texts:
        key = (case.speed.prompts, case.speed.temperature)
        if key not in self.texts:
            prompts, _, left_out = evaluation_prompts(self.target, case.speed)
            batches, answers = make_batches(self.target, [p.ids for p in prompts], case.speed)
            self.texts[key] = Texts(prompts, left_out, batches, answers)
        return self.texts[key]


def load(
    config: LookaheadEvalConfig,
    names: Sequence[str],
    speed: SpeedConfig,
    prices: Iterable[str | None],
    target: Target,
    head: Module | None,
) -> Loaded:
    """speed: of any case; prices: files of costs, which must be of this target"""
    for file in filter(None, prices):
        read_costs(file, target)
    resources, _ = load_resources(names, speed, target, head, [], decoding(speed))
    return Loaded(config, target, resources)


def measure_all(
    cases: Sequence[Case], prices: Mapping[str, str | None], loaded: Loaded
) -> dict[str, dict[str, Any]]:
    """{title: result}; what is not there yet is measured and written, once all that can be wrong
    with any case has been looked for.

    prices: by title, a file of eval/costs.py; None measures
    """
    bodies, target = {}, loaded.target
    for case in cases:
        body = read_result(case.file, case.speed, target.fingerprint(), "eval/lookahead.py")
        if body is None:
            check_strategies(case, target, loaded.resources)
        else:
            check_same(case, body, prices[case.title])
        bodies[case.title] = body
    for case in cases:
        if bodies[case.title] is None:
            print(f"{case.title}: {case.speed.n_prompts} prompts", flush=True)
            body = measure(case, prices[case.title], loaded)
            write_result(case.speed.out, case.speed, target, body)
            bodies[case.title] = json.loads(case.file.read_text(encoding="utf-8"))
    return bodies


def measure(case: Case, prices: str | None, loaded: Loaded) -> dict[str, Any]:
    """All figures of a case. prices: a file of eval/costs.py; None measures them"""
    config, target, resources = loaded.config, loaded.target, loaded.resources
    texts, speed = loaded.texts_of(case), case.speed
    drafter = strategy_maker(case.drafter, target, resources)(texts.batches[0].texts).drafter
    names, lengths = methods_of(case, drafter.max_depth)
    steps = counted(case, target, resources, drafter, names, lengths, texts)
    judged = judged_of(case, target, resources, texts)
    sizes = {step.nodes for rows in steps.values() for row in rows for step in row}
    costs = Prices(prices, case, target, drafter, sizes, texts)
    clocked = list(names.values())
    if config.timed is not None:
        best = best_length({label: steps[label] for label in lengths}, costs.now())
        clocked = ["plain", names[best], *(names[n] for n in config.timed if n in names)]
    runs = timed(case, target, resources, clocked, texts.batches, costs.meter)
    measured = {
        label: Measured(name, lengths.get(label), steps[label], runs.get(name))
        for label, name in names.items()
    }
    known = next((label for label, name in case.lookaheads.items() if _is_oracle(name)), None)
    body = summary(measured, costs.now(), texts.answers, case.drafter, known)
    warning = config.head and holdout_warning(config.head, speed.prompts, texts.prompts[0].row)
    return {
        "drafter": case.drafter,
        "temperature": speed.temperature,
        "lookaheads": case.lookaheads,
        "classifiers": classifiers(case),
        **body,
        "shown": {
            label: shown(steps[label][config.shown_prompt])
            for label in drawn(case, body, lengths, list(judged))
        },
        "reliability": {
            label: reliability([p for _, p, _ in found], [right for _, _, right in found])
            for label, found in judged.items()
        },
        "priced_by": priced_by(prices),
        "costs": costs.table(),
        "warnings": costs.warnings() + ([warning] if warning else []) + texts.left_out,
    }


def methods_of(case: Case, max_depth: int) -> tuple[dict[str, str], dict[str, int]]:
    """(label -> method, not drafting and every static length first; of those label -> length)."""
    names, lengths = {"static 0": "plain"}, {"static 0": 0}
    for depth in range(1, max_depth + 1):
        names[f"static {depth}"] = f"{case.drafter}:lookahead=static(depth={depth})"
        lengths[f"static {depth}"] = depth
    return names | case.lookaheads, lengths


def judged_of(
    case: Case, target: Target, resources: Resources, texts: Texts
) -> dict[str, list[tuple[int, float, bool]]]:
    """Label -> `judge` of the first lookahead that predicts: one is enough to see whether the
    classifier is calibrated."""
    wanted = decoding(case.speed)
    for label, name in case.lookaheads.items():
        found = judge(target, strategy_maker(name, target, resources), wanted, texts.batches)
        if found is not None:
            return {label: found}
    return {}


def drawn(
    case: Case, body: Mapping[str, Any], lengths: Mapping[str, int], judged: Sequence[str]
) -> list[str]:
    """Labels of what steps are drawn of: the oracle, the best length that drafts, some others."""
    best = body["best_static"] if lengths[body["best_static"]] else body["best_drafting"]
    others = judged or [label for label in case.lookaheads if label != body["oracle"]]
    labels = dict.fromkeys([body["oracle"], best, *others[:_DRAWN]])
    return [label for label in labels if label is not None]


# ---------------------------------------------------------------------------------------- counting


def counted(
    case: Case,
    target: Target,
    resources: Resources,
    drafter: Drafter,
    names: Mapping[str, str],
    lengths: Mapping[str, int],
    texts: Texts,
) -> Steps:
    """The steps of every name. Static lengths, classifiers and the oracle are simulated on one walk
    over the texts where the drafter can be walked; others are decoded with."""
    wanted, batches = decoding(case.speed), texts.batches
    records = walked(case, target, drafter, batches)
    found: Steps = {}
    for label, name in names.items():
        if name == "plain":
            found[label] = plain_steps(texts.answers)
            continue
        if records is not None and label in lengths:
            found[label] = simulated_steps(records, drafter, static(lengths[label]))
            continue
        if records is not None and _is_oracle(name):
            found[label] = simulated_steps(records, drafter, oracle)
            continue
        make = strategy_maker(name, target, resources)
        lookahead = make(batches[0].texts).lookahead
        if records is not None and isinstance(lookahead, DiscoLookahead):
            looks = drafter.early_features and lookahead.level_by_level
            read = records.reading(drafter.feature_names, lookahead.reads)
            found[label] = simulated_steps(read, drafter, policy_of(lookahead), looks)
        else:
            found[label] = count_steps(target, make, wanted, batches)
    return found


def walked(
    case: Case, target: Target, drafter: Drafter, batches: Sequence[PromptBatch]
) -> Records | None:
    """The records of all texts; None of a drafter that cannot be walked."""
    texts, wanted = [], decoding(case.speed)
    try:
        for i in range(0, len(batches), _WALKED):
            some = batches[i : i + _WALKED]
            rows, seeds = [b.prompts[0] for b in some], [b.seeds[0] for b in some]
            texts += walk_texts(target, drafter, rows, wanted, seeds)
    except InputError:
        return None
    return Records.of(texts, case.speed.max_new_tokens)


# ------------------------------------------------------------------------------- costs, the clock


class Prices:
    """What steps cost: by a file of eval/costs.py, or measured in between the timed runs.

    sizes: of trees, in tokens
    """

    def __init__(
        self,
        file: str | None,
        case: Case,
        target: Target,
        drafter: Drafter,
        sizes: set[int],
        texts: Texts,
    ):
        self.file, self.case, self.target = file, case, target
        self.context = middle_context(texts.batches, texts.answers)
        self.meter: CostMeter | None = None
        if file is None:
            temperature = case.speed.temperature
            self.meter = meter_for(target, drafter, sizes, self.context, temperature)

    def now(self) -> StepCosts:
        """As far as they are known by now."""
        if self.meter is not None:
            return step_costs(asdict(self.meter.table()), None, None)
        return step_costs(self.file, self.case.drafter, self.target, self.context)

    def table(self) -> dict[str, Any]:
        return asdict(self.now() if self.meter is None else self.meter.table())

    def warnings(self) -> list[str]:
        return [] if self.meter is None else noise_warning(self.meter.table())


def meter_for(
    target: Target, drafter: Drafter, sizes: set[int], context: int, temperature: float
) -> CostMeter:
    """Measures the drafter, and forwards over trees of these sizes; once now."""
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


def best_length(steps: Steps, costs: StepCosts) -> str:
    """The static length of most tokens per second by these costs."""

    def speed(rows: list[list[Step]]) -> float:
        seconds = sum(step.cost_s(costs) for row in rows for step in row)
        return sum(step.emitted for row in rows for step in row) / seconds

    return max(steps, key=lambda label: speed(steps[label]))


def timed(
    case: Case,
    target: Target,
    resources: Resources,
    names: Iterable[str],
    batches: Sequence[PromptBatch],
    meter: CostMeter | None,
) -> Runs:
    """Runs of every method, one after the other on each prompt, costs measured in between."""
    speed = case.speed
    once = dict.fromkeys(names)  # a lookahead may be a static one by another label
    methods = [build_method(name, target, decoding(speed), resources) for name in once]
    for method in methods:  # the warm-up
        method.prepare(batches[0])
        method.run(batches[0])
    return run_interleaved(methods, batches, speed.repeats, meter, speed.cost_rounds)


def _is_oracle(name: str) -> bool:
    lookahead = parse_strategy(name).lookahead
    return lookahead is not None and parse_name(lookahead).kind == "oracle"
