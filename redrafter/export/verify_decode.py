"""Decoding again what a golden batch holds: steps, tokens, and which differences are near-ties.

The rules stand at the top of `verify.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from redrafter.data.answers import generation_config
from redrafter.evaluation.lossless import reference
from redrafter.export.golden import Decoded, Golden, decode, text_of
from redrafter.export.rounding import rounding
from redrafter.heads.base import DraftHead
from redrafter.targets.model import Target

Tree = tuple[Tensor, Tensor, Tensor]
#: whether it passed, and what to say
Outcome = tuple[bool, str]


@dataclass
class _Row:
    """One row of one decoding, then and `here` (the same fields, and all scores)."""

    where: str
    prompt: list[int]
    seed: int
    how: dict[str, Any]
    tokens: list[int]
    finish: str
    accepted: list[int]
    trees: list[Tree]
    score_ids: Tensor
    scores: Tensor
    here: dict[str, Any]

    @property
    def parts_at(self) -> int | None:
        """Index of the first token that differs or that one of the texts lacks; None: the same."""
        both = zip_longest(self.tokens, self.here["tokens"])
        return next((i for i, (then, now) in enumerate(both) if then != now), None)


@dataclass
class _Found:
    """faults: in words; near_ties: differences that are explained; n: what was compared"""

    faults: list[str] = field(default_factory=list)
    near_ties: int = 0
    n: int = 0

    def outcome(self, what: str) -> Outcome:
        if self.faults:
            more = len(self.faults) - 1
            return False, self.faults[0] + (f" (and {more} more like this)" if more else "")
        ties = f", but for near-ties: {self.near_ties}" if self.near_ties else ""
        return True, f"{self.n} {what}{ties}"


def check_decodes(
    head: DraftHead, target: Target, golden: Golden, drift: float
) -> tuple[Outcome, Outcome]:
    """(accepted, text). drift: how far a drafted token's score may be off by rounding"""
    accepted, text = _Found(), _Found()
    for name, how in golden.facts["decodes"].items():
        made = decode(head, target, golden.facts["prompts"], how)
        for row in _rows(name, how, golden, made):
            _compare_steps(row, accepted, drift)
            _compare_tokens(row, target, text)
        texts = text_of(target, how["tokens"])
        if how["texts"] is not None and texts is not None and texts != how["texts"]:
            i = next(i for i, both in enumerate(zip(texts, how["texts"], strict=True))
                     if both[0] != both[1])  # fmt: skip
            text.faults.append(
                f"{name}, prompt {i}: the stored tokens become {texts[i]!r} here, then "
                f"{how['texts'][i]!r}"
            )
    return accepted.outcome("steps accept the same"), text.outcome("tokens are the same")


def _rows(name: str, how: dict[str, Any], golden: Golden, made: Decoded) -> list[_Row]:
    stored = {key: golden.tensors[f"{name}.{key}"] for key in ("score_ids", "scores")}
    parts = (golden.tensors.get(f"{name}.{key}", ()) for key in ("nodes", "parents", "log_q"))
    trees = list(zip(*parts, strict=True))
    found, token, step = [], 0, 0
    for i, prompt in enumerate(golden.facts["prompts"]):
        tokens, accepted = how["tokens"][i], how["accepted"][i]
        behind = slice(token, token := token + len(tokens))
        steps = slice(step, step := step + len(accepted))
        here = {"tokens": made.tokens[i], "finish": made.finish[i], "accepted": made.accepted[i],
                "trees": made.trees[i], "scores": made.scores[i]}  # fmt: skip
        found.append(_Row(
            f"{name}, prompt {i}", prompt, how["seed"] + i, how, tokens, how["finish"][i],
            accepted, trees[steps], stored["score_ids"][behind].long(), stored["scores"][behind],
            here,
        ))  # fmt: skip
    return found


# ------------------------------------------------------------------------------- steps


def _compare_steps(row: _Row, found: _Found, drift: float) -> None:
    """Up to where the texts part; and no further than a step that accepts another number, as all
    later ones begin elsewhere."""
    parts_at, done = row.parts_at, 1  # the prefill's own token
    both = zip_longest(row.accepted, row.here["accepted"])
    for step, (then, here) in enumerate(both):
        if then is None or here is None:
            return  # the texts have other lengths
        if parts_at is not None and parts_at <= done + min(then, here):
            return
        found.n += 1
        if then != here:
            why = _draft_fault(row.trees[step], row.here["trees"][step], drift)
            found.near_ties += why is None
            if why is not None:
                found.faults.append(
                    f"{row.where}, step {step}: {here} drafted tokens accepted here, then {then}; "
                    f"{why}"
                )
            return
        done += 1 + then


def _draft_fault(then: Tree, here: Tree, drift: float) -> str | None:
    """Why two drafts of the same step are not the same up to rounding; None where they are."""
    levels_then, levels_here = _levels(then), _levels(here)
    if len(levels_then) != len(levels_here):
        return f"{len(levels_here)} levels were drafted, then {len(levels_then)}"
    for level, (a, b) in enumerate(zip(levels_then, levels_here, strict=True)):
        if a.keys() == b.keys():
            continue
        off = max(abs(x - y) for x, y in zip(sorted(a.values()), sorted(b.values()), strict=True))
        if off <= level * drift:
            return None
        return (
            f"at level {level} other tokens were drafted, with scores {off:.1e} apart "
            f"({level * drift:.1e} is rounding)"
        )
    return "the draft is the same"


def _levels(tree: Tree) -> list[dict[tuple[int, ...], float]]:
    """Per level {tokens from the root: score}."""
    nodes, parents, log_q = (part.tolist() for part in tree)
    paths: list[tuple[int, ...]] = []
    levels: list[dict[tuple[int, ...], float]] = []
    for i, (token, parent) in enumerate(zip(nodes, parents, strict=True)):
        paths.append((*(paths[parent] if i else ()), token))
        if len(paths[i]) > len(levels):
            levels.append({})
        levels[len(paths[i]) - 1][paths[i]] = log_q[i]
    return levels


# ------------------------------------------------------------------------------- tokens


def _compare_tokens(row: _Row, target: Target, found: _Found) -> None:
    found.n += len(row.tokens)
    at = row.parts_at
    here = row.here["tokens"]
    if at is None:
        if row.finish != row.here["finish"]:
            found.faults.append(
                f"{row.where}: ended by {row.here['finish']} here, then by {row.finish}"
            )
        return
    if at == min(len(row.tokens), len(here)):
        found.faults.append(
            f"{row.where}: {len(here)} tokens here, ended by {row.here['finish']}; then "
            f"{len(row.tokens)}, ended by {row.finish}"
        )
        return
    config = generation_config(row.how["temperature"], row.how["max_new_tokens"])
    own = reference(target, row.prompt, config, row.seed, row.tokens)
    # Here up to where the texts part, then along the stored one.
    scores = torch.cat((row.here["scores"][: at + 1], own.scores[at + 1 :])).double().cpu()
    # `reference` compares one forward with many, and has four times their difference.
    bound = rounding(target.dtype, float(row.scores.abs().max()), own.rounding / 4)
    for i, then in enumerate(row.tokens[: len(scores)]):
        choice = int(scores[i].argmax())
        if choice == then:
            continue
        ids = row.score_ids[i]
        gap = float(scores[i, choice] - scores[i, then])
        off = float((scores[i, ids] - row.scores[i].double()).abs().max())
        if choice in ids.tolist() and gap <= 2 * off and off <= bound:
            found.near_ties += 1
            continue
        found.faults.append(
            f"{row.where}, new token {i}: {_shown(target, choice)} here, then "
            f"{_shown(target, then)}; by the scores here {gap:.1e} apart, which differ from the "
            f"stored ones by {off:.1e} ({bound:.1e} is rounding)"
        )
        return


def _shown(target: Target, token: int) -> str:
    text = text_of(target, [[token]])
    return f"{token} ({text[0]!r})" if text else str(token)
