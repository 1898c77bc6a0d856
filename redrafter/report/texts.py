"""Some prompts answered, with every token coloured by how it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from redrafter.config import ReportConfig
from redrafter.contracts import InputError
from redrafter.data.answers import generation_config
from redrafter.decode.speculative import speculative
from redrafter.drafting import Strategy
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.generation import load_strategy
from redrafter.report.origins import KINDS, Origin, Tracer
from redrafter.report.page import paragraph, tokens, visible
from redrafter.report.svg import N_COLOURS
from redrafter.targets.model import Target
from redrafter.targets.text import text_of

# A character has at most four bytes, and a token at least one of them.
_BEFORE_TOKENS = 8
_HALF = "\ufffd"
#: of several guesses that were wrong, those that are named
_SHOWN_GUESSES = 3


@dataclass(frozen=True)
class Traced:
    """A prompt's answer. prompt: its text; row: in its file; origins: of every token of the answer;
    pieces: their texts"""

    prompt: str
    row: int
    origins: tuple[Origin, ...]
    pieces: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Forwards of the target after the one over the prompt."""
        return self.origins[-1].step if self.origins else 0


def trace(config: ReportConfig, target: Target, head: Any) -> tuple[list[Traced], list[str]]:
    """(the answers, warnings). Raises InputError for prompts, or a drafter, that cannot be had."""
    prompts, _, warnings = evaluation_prompts(target, config)
    strategy = load_strategy(
        target, config.drafter, head=head, tree=config.tree, draft_model=config.draft,
        bigrams=config.bigrams, probed=config.probed, reference=config.reference,
    )  # fmt: skip
    if strategy is None:
        raise InputError("drafter: plain drafts nothing: there is nothing to colour")
    wanted = generation_config(config.temperature, config.max_new_tokens)
    tracer = Tracer(strategy.drafter, name_of(config))
    return [
        _one(target, strategy, tracer, p, wanted, config.seed + i) for i, p in enumerate(prompts)
    ], warnings  # fmt: skip


def name_of(config: ReportConfig) -> str:
    """Of what drafts, as `--methods` would have it."""
    if config.drafter is not None:
        return config.drafter
    return f"head:{config.tree.width}x{config.tree.depth}"


def _one(
    target: Target, strategy: Strategy, tracer: Tracer, prompt: Any, wanted: Any, seed: int
) -> Traced:
    made = speculative(
        target, [prompt.ids], wanted, seeds=[seed], drafter=tracer, lookahead=strategy.lookahead,
        rule=strategy.rule,
    )  # fmt: skip
    ids, answer = list(prompt.ids), made.tokens[0]
    origins = tuple(tracer.origins[: len(answer)])  # what lies behind a stop is no part of the text
    assert [origin.token for origin in origins] == answer, "every token comes from somewhere"
    texts = pieces(target.tokenizer, ids, answer)
    return Traced(text_of(target.tokenizer, ids), prompt.row, origins, tuple(texts))


def pieces(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; of a character that is made of several tokens the last one
    has it all, and those before it nothing. before: tokens in front of them"""
    row, start, found = [*before, *ids], len(before), []
    for i in range(len(before), len(row)):
        first = max(0, start - _BEFORE_TOKENS)
        known = text_of(tokenizer, row[first:start])
        whole = text_of(tokenizer, row[first : i + 1])
        fits = whole.startswith(known)
        new = whole[len(known) :] if fits else text_of(tokenizer, row[start : i + 1])
        if new.endswith(_HALF) and i + 1 < len(row) and i + 1 - start < 4:
            found.append("")
            continue
        found.append(new)
        start = i + 1
    return found


# -------------------------------------------------------------------------------------- HTML


def show(texts: Sequence[Traced], config: ReportConfig, tokenizer: Any) -> str:
    """The answers, and a key to their colours."""
    drafters = list(dict.fromkeys(o.by[0] for t in texts for o in t.origins if o.by))
    how = "greedily" if config.temperature == 0 else f"at temperature {config.temperature:g}"
    parts = [
        paragraph(
            f"Decoded {how}, with {name_of(config)}. The text is the target's own: what was "
            "drafted and wrong never stands in it. A line before a token: here a forward of the "
            "target begins."
        ),
        _key(drafters),
    ]
    for text in texts:
        n, steps = len(text.origins), text.steps
        rate = f", {(n - 1) / steps:.2f} per step" if steps else ""
        said = f"Row {text.row}: {n} tokens in {steps} steps after the prompt{rate}"
        parts.append(f"<h3>{escape(said)}</h3>")
        parts.append(f'<p class="prompt" tabindex="0">{escape(visible(text.prompt))}</p>')
        spans, last = [], 0
        for origin, piece in zip(text.origins, text.pieces, strict=True):
            begins = origin.step != last
            last = origin.step
            spans.append((piece, _classes(origin, drafters, begins), _share(origin),
                          _say(origin, piece, tokenizer)))  # fmt: skip
        parts.append(tokens(spans, f"answer to row {text.row}, token by token"))
    return "".join(parts)


def _classes(origin: Origin, drafters: Sequence[str], begins: bool) -> str:
    found = [origin.kind, *["begin"] * begins]
    if origin.kind == "drafted":
        found.append(f"c{drafters.index(origin.by[0]) % N_COLOURS}")
    return " ".join(found)


def _share(origin: Origin) -> str:
    """The deeper, the stronger the colour."""
    return f"--share:{min(1.0, 0.4 + 0.2 * origin.depth):.1f}" if origin.depth else ""


def _say(origin: Origin, piece: str, tokenizer: Any) -> str:
    parts = [f"“{visible(piece).strip()}” (token {origin.token}): "]
    if origin.kind == "drafted":
        parts.append(f"drafted at depth {origin.depth} by {' and '.join(origin.by)}")
    else:
        parts.append(KINDS[origin.kind])
    parts.append(f"; step {origin.step}; the target gives it {_percent(origin.p)}")
    if origin.q is not None:
        parts.append(f", the drafter gave it {_percent(origin.q)}")
    if guesses := origin.rejected[:_SHOWN_GUESSES]:
        named = [
            f"“{visible(text_of(tokenizer, [token])).strip()}”"
            + ("" if q is None else f" ({_percent(q)})")
            for token, q in guesses
        ]
        more = len(origin.rejected) - len(guesses)
        parts.append(f"; drafted there: {', '.join(named)}" + f" and {more} more" * bool(more))
    return "".join(parts) + "."


def _percent(p: float | None) -> str:
    return "-" if p is None else f"{p:.0%}" if 0.005 <= p <= 0.995 else f"{p:.1%}"


def _key(drafters: Sequence[str]) -> str:
    drafted = "".join(
        f'<li><span class="drafted c{i % N_COLOURS}" style="--share:1">drafted</span> by '
        f"{escape(name)}; the deeper in the draft, the stronger</li>"
        for i, name in enumerate(drafters)
    )
    others = "".join(
        f'<li><span class="{kind}">{kind}</span>: {escape(said)}</li>'
        for kind, said in KINDS.items() if kind != "drafted"
    )  # fmt: skip
    return f'<ul class="key note">{drafted}{others}</ul>'
