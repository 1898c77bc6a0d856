"""`eval/speed.py`: compares ways of decoding on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.models import load_both, load_partners, prompts_to_count
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
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation import methods as known
    from redrafter.evaluation.report import write_result

    check(config)
    names = known.parse_methods(config.methods)
    known.check_partners(names, config)
    target, head = load_both(config, measured=True)
    body = measure(config, names, target, head)
    print(show(body))
    write_result(config.out, config, target, body, head)
    return 0


def measure(config: SpeedConfig, names: Sequence[str], target: Any, head: Any) -> dict[str, Any]:
    """All figures of one prompt set and temperature. target, head: from `load_both`."""
    from redrafter.evaluation.methods import build_method
    from redrafter.evaluation.prompts import evaluation_prompts, holdout_warning
    from redrafter.evaluation.speed import decoding, make_batches, measure_speed

    more = prompts_to_count(names, config)
    prompts, others, left_out = evaluation_prompts(target, config, more)
    partners, counted_on = load_partners(names, config, target, head, others, decoding(config))
    methods = [build_method(name, target, decoding(config), partners) for name in names]
    batches, answers = make_batches(target, [p.ids for p in prompts], config)
    body = measure_speed(target, methods, batches, answers, config)
    body["warnings"] += left_out
    if counted_on is not None:
        body["bigram_counted_on"] = counted_on
    warning = head and holdout_warning(head.name_or_path, config.prompts, prompts[0].row)
    if warning:
        body["warnings"].append(warning)
    return body


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

        equal = f"{m['equal_rows']}/{body['n_prompts']}"
        seconds = m["seconds"]
        parts = [seconds.get(part) for part in ("draft", "verify", "other")]
        decode = seconds["total"] - seconds.get("prefill", 0.0)
        shares = "-" if None in parts else "/".join(f"{100 * p / decode:.0f}" for p in parts) + " %"
        rows.append(
            [name, shown("tokens_per_step") if m["steps"] is not None else 1.0,
             shown("speedup_stock"), shown("speedup_plain"), m["bound"], m["efficiency"],
             f"({equal})" if m["law_only"] else equal, shares]
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
    if any(m["law_only"] for m in body["methods"].values()):
        lines.append("(in brackets): sampled by a rule of its own: plain's law, but another text")
    if "bigram_counted_on" in body:
        lines.append(f"bigrams counted on: {body['bigram_counted_on']}")
    return "\n".join(lines + [f"warning: {w}" for w in body["warnings"]])
