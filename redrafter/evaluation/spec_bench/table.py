"""The figures of Spec-Bench's protocol as Markdown, laid out as its leaderboard is."""

from __future__ import annotations

from typing import Any

from redrafter.evaluation.report import markdown_table, measured_by, measured_on, with_interval

_SHORT = {
    "mt_bench": "MT-bench", "translation": "Translation", "summarization": "Summarization",
    "qa": "QA", "math_reasoning": "Math", "rag": "RAG", "overall": "Overall",
}  # fmt: skip


def markdown(body: dict[str, Any]) -> str:
    """body: of `eval/spec_bench.py`, its provenance included."""
    figures, counts, facts = body["figures"], body["counts"], body["provenance"]
    tasks = list(next(iter(figures.values())))
    config = facts["config"]
    parts = [
        "## Speedup by task",
        "",
        f"Ratio of mean per-question speeds over `{body['baseline']}` (macro).",
        "",
        markdown_table(
            ["method", *(f"{_SHORT.get(t, t)} ({figures[body['baseline']][t]['questions']})"
                         for t in tasks)],
            [[f"`{name}`", *(_number(by[t]["macro_speedup"]["value"]) for t in tasks)]
             for name, by in figures.items()],
        ),
        "",
        "## Overall",
        "",
        markdown_table(
            ["method", "macro speedup", "std", "pooled speedup", "mean accepted tokens",
             "tokens/step, mean of questions", "tokens/s", "turns = " + f"`{body['baseline']}`"],
            [_overall(name, by["overall"], body["lossless"].get(name))
             for name, by in figures.items()],
        ),
        "",
        "## Mean accepted tokens by task",
        "",
        markdown_table(
            ["method", *(_SHORT.get(t, t) for t in tasks)],
            [[f"`{name}`", *(_number((by[t]["mean_accepted_tokens"] or {}).get("value"))
                             for t in tasks)] for name, by in figures.items()],
        ),
    ]  # fmt: skip
    if body["compat"]:
        parts += [
            "",
            "## As Spec-Bench counts (strict-compat)",
            "",
            "The baseline's tokens are those of its stripped texts tokenised again, less one per "
            "turn; the others' are their own count. Not comparable with the tables above.",
            "",
            markdown_table(
                ["method", *(_SHORT.get(t, t) for t in tasks), "mean accepted tokens"],
                [[f"`{name}`", *(_number(by[t]["speedup"]["value"]) for t in tasks),
                  _number(by["overall"]["mean_accepted_tokens"])]
                 for name, by in body["compat"].items()],
            ),
        ]  # fmt: skip
    cut = counts["cut"][body["baseline"]]
    parts += [
        "",
        f"{counts['questions']} questions, {counts['turns']} turns, {counts['runs']} run(s), at "
        f"most {config['max_new_tokens']} new tokens per turn, temperature "
        f"{config['temperature']:g}, batch 1; intervals: 95 % bootstrap over questions. "
        f"{cut['turns']} prompts of `{body['baseline']}` were longer than the context and lost "
        f"their first {cut['tokens']} tokens in all; {len(counts['skipped'])} questions left out. "
        f"{measured_on(facts)}, {measured_by(facts)}.",
        *(f"Warning: {warning}" for warning in body["warnings"]),
    ]
    return "\n".join(parts)


def _overall(name: str, by: dict[str, Any], same: dict[str, Any] | None) -> list[str]:
    def shown(key: str) -> str:
        f = by[key]
        return "-" if f is None else with_interval(f["value"], f["low"], f["high"])

    equal = "-" if same is None else f"{same['equal_tokens']}/{same['turns']}"
    return [
        f"`{name}`", shown("macro_speedup"), _number(by["macro_speedup"]["std"], 3),
        shown("pooled_speedup"), shown("mean_accepted_tokens"), shown("tokens_per_step_mean"),
        _number(by["tokens_per_second"]["value"], 1),
        equal if same is None or same["compared"] else f"({equal})",
    ]  # fmt: skip


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
