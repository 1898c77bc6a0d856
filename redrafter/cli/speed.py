"""`eval/speed.py`: compares ways of decoding on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both
from redrafter.config import SpeedConfig
from redrafter.contracts import InputError


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        SpeedConfig,
        argv,
        "eval/speed.py",
        "Tokens per step and speed of drafting, beside stock and plain decoding.",
    )
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
    from redrafter.evaluation.report import write_result
    from redrafter.evaluation.speed import decoding, make_batches, measure_speed

    check(config)
    names = known.parse_methods(config.methods)
    known.check_partners(names, config)
    target, head = load_both(config)
    width = known.bigram_width(names)
    counts_here = width > 0 and config.bigrams is None
    prompts, others = evaluation_prompts(target, config, config.bigram_prompts * counts_here)
    table, counted_on = _bigrams(config, target, width, others) if width else (None, None)
    partners = known.Partners(head, table, _draft_model(config, names))
    methods = [
        known.build_method(name, target, config, decoding(config), partners) for name in names
    ]
    batches, answers = make_batches(target, [p.ids for p in prompts], config)
    body = measure_speed(target, methods, batches, answers, config)
    if counted_on is not None:
        body["bigram_counted_on"] = counted_on
    warning = head and holdout_warning(config.head, config.prompts, prompts[0].row)
    if warning:
        body["warnings"].append(warning)
    print(show(body))
    write_result(config.out, config, target, body)
    return 0


def _draft_model(config: SpeedConfig, names: Sequence[str]) -> Any:
    """The smaller model of the methods `model...`, computing as the target does; None without."""
    from redrafter.target.model import load_target

    if not any(name.split(":")[0] == "model" for name in names):
        return None
    return load_target(replace(config.target, path=config.draft, revision=None))


def _bigrams(config: SpeedConfig, target: Any, width: int, others: Sequence[Any]) -> Any:
    """(BigramTable, what it was counted on). others: prompts that are not evaluated."""
    from redrafter.data.bigrams import open_bigrams
    from redrafter.drafters.bigram import count_bigrams
    from redrafter.evaluation.methods import plain_answers
    from redrafter.evaluation.speed import decoding

    if config.bigrams is not None:
        return open_bigrams(config.bigrams, target, width)
    seeds = [config.seed + config.n_prompts + i for i in range(len(others))]
    rows = [list(p.ids) for p in others]
    answers = plain_answers(target, rows, decoding(config), seeds, batch_size=4)
    where = f"plain answers to rows {others[0].row}..{others[-1].row} of {config.prompts}"
    return count_bigrams(answers, target.vocab_size, width), where


def check(config: SpeedConfig) -> None:
    """Raises InputError naming a number that makes no sense."""
    for name in ("batch_size", "repeats", "cost_rounds", "bigram_prompts"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: {getattr(config, name)} must be at least 1")
    if config.temperature < 0:
        raise InputError(f"temperature: {config.temperature} is negative")


def show(body: dict) -> str:
    """One line per method, then what they have in common."""
    from redrafter.evaluation.report import table, with_interval

    columns = ["method", "tokens/step", "x stock", "x best plain", "bound", "efficiency",
               "= plain", "draft/verify/other"]  # fmt: skip
    rows = []
    for name, m in body["methods"].items():

        def shown(key: str, m=m) -> str:
            return with_interval(m[key], m["low"].get(key), m["high"].get(key))

        seconds = m["seconds"]
        parts = [seconds.get(part) for part in ("draft", "verify", "other")]
        decode = seconds["total"] - seconds.get("prefill", 0.0)
        shares = "-" if None in parts else "/".join(f"{100 * p / decode:.0f}" for p in parts) + " %"
        rows.append(
            [name, shown("tokens_per_step") if m["steps"] is not None else 1.0,
             shown("speedup_stock"), shown("speedup_plain"), m["bound"], m["efficiency"],
             f"{m['equal_rows']}/{body['n_prompts']}", shares]
        )  # fmt: skip
    lines = [table(columns, rows), ""]
    exact = {True: "yes", False: "NO: see eval/lossless.py for why", None: "nothing drafted"}
    share = body["loop_share"]
    lines.append(
        f"exact: {exact[body['exact']]}; loop share of plain text: "
        f"{'-' if share is None else f'{share:.2f}'}; best plain loop: {body['best_plain']}; "
        f"temperature {body['temperature']:g}, batch {body['batch_size']}, "
        f"{body['n_prompts']} prompts; intervals: 95 % bootstrap over prompts"
    )
    overhead = body["methods"].get("plain", {}).get("plain_overhead")
    if overhead is not None:
        lines.append(f"plain takes {overhead:.3f} x its bare target forwards")
    if "bigram_counted_on" in body:
        lines.append(f"bigrams counted on: {body['bigram_counted_on']}")
    return "\n".join(lines + [f"warning: {w}" for w in body["warnings"]])
