"""Figures and tables of what scripts/dev/peers.py measured. Pure functions of its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from redrafter.evaluation.figures import Interval, bootstrap, median, pooled
from redrafter.evaluation.report import markdown_table

#: what ratios are over, and whose texts the others are compared with
STOCK, PLAIN = "transformers stock", "redrafter plain"
OWN = "redrafter "

#: peer -> its record in one run: `seconds`, `cpu_seconds` of [round][prompt], `tokens` of
#: [prompt], `error`
Records = Mapping[str, Mapping[str, Any]]


def figures(records: Records) -> dict[str, dict[str, Any]]:
    """Of every peer that answered all prompts: tokens per second and CPU seconds per token over all
    prompts, and the medians over prompts of its speed over stock's and over our plain's, each as
    (value, low, high) with the 95 % bootstrap over prompts; texts equal to our plain's. A prompt's
    seconds are the median of its rounds. None where what a ratio is over has no figures itself."""
    clocks = {peer: _Clock(record) for peer, record in records.items() if done(record)}
    return {peer: _figures(peer, clocks, records) for peer in clocks}


def done(record: Mapping[str, Any]) -> bool:
    """Whether a peer has answered every prompt of at least one round, and has not failed."""
    rounds = record["seconds"]
    return record["error"] is None and bool(rounds) and len(rounds[0]) == len(record["tokens"]) > 0


def _figures(peer: str, clocks: Mapping[str, _Clock], records: Records) -> dict[str, Any]:
    own = clocks[peer]
    found: dict[str, Any] = {
        "tokens_per_second": bootstrap(pooled_rate, own.tokens, own.seconds),
        "cpu_ms_per_token": bootstrap(pooled, 1e3 * own.cpu_seconds, own.tokens),
        "equal_texts": None,
    }
    for name, base in (("stock", STOCK), ("plain", PLAIN)):
        found[f"x_{name}"] = ratio(clocks, peer, base)
        found[f"cpu_x_{name}"] = ratio(clocks, peer, base, cpu=True)
    if PLAIN in clocks:
        pairs = zip(records[peer]["tokens"], records[PLAIN]["tokens"], strict=True)
        found["equal_texts"] = sum(a == b for a, b in pairs)
    return found


class _Clock:
    """Tokens and seconds by prompt, (P,) each."""

    def __init__(self, record: Mapping[str, Any]):
        n = len(record["tokens"])
        whole = [i for i, prompts in enumerate(record["seconds"]) if len(prompts) == n]
        self.tokens = np.array([len(t) for t in record["tokens"]], dtype=float)
        self.seconds = np.median([record["seconds"][i] for i in whole], axis=0)
        self.cpu_seconds = np.median([record["cpu_seconds"][i] for i in whole], axis=0)


def pooled_rate(tokens: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    return tokens.sum(-1) / seconds.sum(-1)


def ratio(clocks: Mapping[str, _Clock], peer: str, base: str, cpu: bool = False) -> Interval | None:
    """Median over prompts of the ratio of two peers' speeds; None where one has none."""
    if peer not in clocks or base not in clocks:
        return None
    own, other = clocks[peer], clocks[base]
    if cpu:
        times = other.cpu_seconds / own.cpu_seconds
    else:
        times = other.seconds / own.seconds
    return bootstrap(median, own.tokens / other.tokens * times)


def ahead(records: Records) -> tuple[str | None, dict[str, Interval]]:
    """(our fastest, the peers outside that are faster, by how much). The fastest by tokens per
    second; a peer is faster where the median over prompts of the ratio is above 1."""
    clocks = {peer: _Clock(record) for peer, record in records.items() if done(record)}
    ours = [peer for peer in clocks if peer.startswith(OWN)]
    if not ours:
        return None, {}
    best = max(ours, key=lambda p: pooled_rate(clocks[p].tokens, clocks[p].seconds))
    over = {p: ratio(clocks, p, best) for p in clocks if not p.startswith(OWN)}
    return best, {p: by for p, by in over.items() if by is not None and by[0] > 1}


def show(body: Mapping[str, Any]) -> str:
    """Markdown: what was asked, one table and one sentence for each number of threads."""
    asked = body["asked"]
    used: dict[str, list[str]] = {}  # engines by what they stand on
    for engine, of in body["versions"].items():
        on = ", ".join(f"{name} {version}" for name, version in of.items())
        used.setdefault(on, []).append(engine)
    compiled = "eager" if asked["eager"] else "compiled"
    parts = [
        f"{asked['n_prompts']} prompts x {asked['new_tokens']} tokens, {asked['rounds']} "
        f"round{'s' * (asked['rounds'] != 1)}, {asked['model']} in float32, greedy, batch 1, past "
        f"every EOS; {body['device']}, {body['machine']}; commit {body['git_commit']}; "
        + "; ".join(f"{' and '.join(engines)} with {on}" for on, engines in used.items())
        + f" ({compiled})" * ("vllm" in body["versions"])
        + "."
    ]
    for threads, records in body["runs"].items():
        parts.append(f"{threads} thread{'s' * (threads != '1')}:")
        parts.append(_table(records))
        parts.append(_sentence(records))
    return "\n\n".join(parts)


def _table(records: Records) -> str:
    columns = ["peer", "tokens/s", "x stock", "x our plain", "CPU ms/token", "CPU x our plain",
               "texts equal"]  # fmt: skip
    found, rows = figures(records), []
    for peer, record in records.items():
        if (of := found.get(peer)) is None:
            rows.append(
                [f"`{peer}`", (record["error"] or "not measured").replace("|", "/"), *[""] * 5]
            )
            continue
        equal = "-" if of["equal_texts"] is None else f"{of['equal_texts']}/{len(record['tokens'])}"
        rows.append([
            f"`{peer}`", _said(of["tokens_per_second"], 1), _said(of["x_stock"]),
            _said(of["x_plain"]), _said(of["cpu_ms_per_token"], 1), _said(of["cpu_x_plain"]), equal,
        ])  # fmt: skip
    return markdown_table(columns, rows)


def _sentence(records: Records) -> str:
    best, faster = ahead(records)
    if best is None:
        return "None of our loops was measured."
    if not faster:
        return f"Our fastest is `{best}`; no peer is ahead of it."
    ordered = sorted(faster.items(), key=lambda item: -item[1][0])
    named = ", ".join(f"`{peer}` by {_said(by)}" for peer, by in ordered)
    return f"Our fastest is `{best}`; ahead of it: {named}."


def _said(interval: Interval | None, digits: int = 2) -> str:
    if interval is None:
        return "-"
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"
