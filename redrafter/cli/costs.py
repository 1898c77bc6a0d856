"""`eval/costs.py`: the cost table of a target, and of a draft head where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_draft
from redrafter.config import CostsConfig
from redrafter.contracts import InputError

_PLAIN_ROWS = 8  # prompts answered at a time


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        CostsConfig,
        argv,
        "eval/costs.py",
        "Seconds that the target needs for n new tokens, and a drafter for its levels; with "
        "--slowdown also which rows of guesses are worth verifying on this device.",
        alone=True,
    )
    from redrafter.evaluation.costs import CostMeter
    from redrafter.evaluation.prompts import number_list
    from redrafter.evaluation.report import write_result

    if config.rounds < 1:
        raise InputError(f"rounds: {config.rounds} must be at least 1")
    new_tokens = number_list("new_tokens", config.new_tokens, int, 1)
    contexts = number_list("contexts", config.contexts, int, 1)
    batches = number_list("batch_sizes", config.batch_sizes, int, 1)
    slowdown = check_slowdown(config)
    names = check_drafters(config)
    target, head = load_both(config)
    costs = CostMeter(
        target,
        new_tokens=new_tokens,
        contexts=contexts,
        batches=batches,
        drafters=build_drafters(config, names, target, head),
        temperature=config.temperature,
        loop=config.profile,
    ).run(config.rounds)
    print(show(costs))
    body = asdict(costs)
    if slowdown is not None:
        body |= measure_slowdown(config, target, *slowdown, contexts)
    write_result(config.out, config, target, body)
    if config.profile:
        keep_profiles(config, names, target, body)
    return 0


def check_drafters(config: CostsConfig) -> dict[str, str]:
    """What to measure: its label -> its name for `build_drafter`. Raises InputError before any
    work."""
    from redrafter.drafters.build import needs, require
    from redrafter.drafters.options import split_list
    from redrafter.drafters.profile import weights_digest

    given = [option for option in ("head", "draft") if getattr(config, option) is not None]
    if config.drafters is not None:
        names = {name: name for name in split_list(config.drafters) if name}
    else:
        tree = config.tree
        names = {f"head:{tree.width}x{tree.depth}:{tree.shape}": "head"} if config.head else {}
        if config.draft is not None:
            name = f"model:1x{tree.depth}"
            names[name] = name
    used = set()
    for name in names.values():
        require(name, given)
        used |= needs(name).keys()
    if config.profile:
        if not given:
            raise InputError("profile: give --head or --draft, whose folder the profile is kept in")
        for option in given:
            folder = getattr(config, option)
            if option not in used:
                raise InputError(f"profile: drafters: {config.drafters} uses no {option}; name one")
            if not Path(folder).is_dir():
                raise InputError(f"profile: {option}: {folder!r} is no folder here: download it")
            weights_digest(folder)
    return names


def build_drafters(config: CostsConfig, names: dict[str, str], target: Any, head: Any) -> dict:
    from redrafter.drafters.build import Partners, build_drafter

    partners = Partners(head=head, draft=load_draft(config), tree=config.tree)
    return {label: build_drafter(name, target, partners) for label, name in names.items()}


def keep_profiles(
    config: CostsConfig, names: dict[str, str], target: Any, body: dict[str, Any]
) -> None:
    """In the folder of head and draft each, what was measured of its drafters."""
    from redrafter.drafters.build import needs
    from redrafter.drafters.profile import profile_path, weights_digest
    from redrafter.evaluation.report import write_result

    for option in ("head", "draft"):
        folder = getattr(config, option)
        if folder is None:
            continue
        own = {label for label, name in names.items() if option in needs(name)}
        kept = {
            **body,
            "drafters": [e for e in body["drafters"] if e["name"] in own],
            "loop": [e for e in body["loop"] if e["name"] in {"plain", "none", *own}],
            "of": weights_digest(folder),
        }
        path = profile_path(folder, target)
        write_result(str(path), config, target, kept)
        print(f"kept as the profile of this device: {path}")


def check_slowdown(config: CostsConfig) -> tuple[list[int], list[int]] | None:
    """(k, w) to measure, None without. Raises InputError before any work where options that go
    together are not all there."""
    from redrafter.evaluation.pictures import new_figure
    from redrafter.evaluation.slowdown import parse_slowdown

    for name in ("ngrammys", "plot"):
        if getattr(config, name) is not None and config.slowdown is None:
            raise InputError(f"{name}: needs --slowdown, the rows and lengths to measure")
    if (config.ngrammys is None) != (config.prompts is None):
        raise InputError("ngrammys and prompts: give both, or neither")
    if config.plot is not None:
        new_figure(1, 1)
    return None if config.slowdown is None else parse_slowdown(config.slowdown)


def measure_slowdown(
    config: CostsConfig, target: Any, ks: list[int], ws: list[int], contexts: list[int]
) -> dict[str, Any]:
    """Measures, prints and draws; returns what belongs to the result."""
    from redrafter.evaluation.pictures import save_figure, slowdown_map
    from redrafter.evaluation.report import device_name
    from redrafter.evaluation.slowdown import SlowdownMeter, show_advice, show_slowdown

    bigrams = None if config.ngrammys is None else open_table(config, target, max(ks))
    meter = SlowdownMeter(target, ks, ws, contexts)
    cells = meter.run(config.rounds)
    print(f"\n{show_slowdown(cells)}")
    body: dict[str, Any] = {"slowdown": [asdict(cell) for cell in cells]}
    if config.plot is not None:
        title = f"{target.name.rstrip('/').split('/')[-1]} on {device_name(target.device)}"
        paths = save_figure(slowdown_map(cells, title), config.plot)
        print(f"\ndrawn: {', '.join(map(str, paths))}")
    if bigrams is not None:
        texts = plain_texts(config, target)
        advice = meter.advise(bigrams, *texts, config.max_new_tokens, target.device)
        print(f"\n{show_advice(advice)}")
        body["advice"] = [asdict(line) for line in advice]
    return body


def open_table(config: CostsConfig, target: Any, width: int) -> Any:
    """The table of config.ngrammys, at least as wide as it goes."""
    from redrafter.data.bigrams import open_bigrams

    table, shown = open_bigrams(config.ngrammys, target, 2 * width)
    print(f"bigrams of {shown}")
    return table


def plain_texts(config: CostsConfig, target: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the target's greedy answers."""
    from transformers import GenerationConfig

    from redrafter.decode.refill import refilled
    from redrafter.evaluation.prompts import evaluation_prompts

    prompts = [list(prompt.ids) for prompt in evaluation_prompts(target, config)[0]]
    greedy = GenerationConfig(max_new_tokens=config.max_new_tokens)
    return prompts, refilled(target, prompts, greedy, slots=_PLAIN_ROWS).tokens


def show(costs) -> str:
    """Milliseconds: median [quartiles], and the ratio to one new token."""
    from redrafter.evaluation.report import milliseconds, table

    def quartiles(cost) -> str:
        return f"[{milliseconds(cost.q1_s)}, {milliseconds(cost.q3_s)}]"

    rows = []
    singles = {(e.context, e.batch): e.cost.median_s for e in costs.target if e.n == 1}
    for entry in costs.target:
        one = singles.get((entry.context, entry.batch))
        ratio = None if one is None else entry.cost.median_s / one
        rows.append(
            [f"target n={entry.n}", entry.context, entry.batch, milliseconds(entry.cost.median_s),
             quartiles(entry.cost), ratio]
        )  # fmt: skip
    for entry in costs.drafters:
        where = [entry.context, entry.batch]
        for level, cost in enumerate(entry.levels, start=1):
            rows.append([f"{entry.name} level {level}", *where, milliseconds(cost.median_s),
                         quartiles(cost), None])  # fmt: skip
        rows.append([f"{entry.name} whole draft", *where, milliseconds(entry.draft.median_s),
                     quartiles(entry.draft), None])  # fmt: skip
    for entry in costs.loop:
        rows.append([f"{entry.name} whole step, n={entry.n}", entry.context, entry.batch,
                     milliseconds(entry.step.median_s), quartiles(entry.step), None])  # fmt: skip
    return table(["forward", "context", "batch", "ms", "quartiles", "/ t(1)"], rows)
