"""Does drafting change a token? Every row of a speculative batch against plain decoding of it.

A differing token is tolerated only as a *near-tie*, shown by teacher forcing: the target is run
over the speculative text token by token, exactly as `plain` runs it, and at every position

    gap        = its score of its own choice - its score of the token that was emitted
    difference = largest difference between its scores and those that the speculative run used
    rounding   = what rounding can explain: `_ROUNDING_FACTOR` times the largest difference, over
                 all rows, between these scores and those of one parallel forward over a row

and the token is explained iff gap <= 2 * difference and difference <= rounding; with
`target.exact invariant` none is. The first condition says that the loop emitted what its own scores
asked for; it holds for any scores. The second says that those scores are the target's, up to
rounding: both ways that it compares with are correct and share no shapes. Scores are the processed
ones, noise included. Sources: the rule, the design; the rounding bound, ours.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from redrafter.contracts import Drafter, RowState, Truth
from redrafter.decode.plain import plain
from redrafter.decode.request import Request
from redrafter.decode.speculative import speculative
from redrafter.decode.verify import choose
from redrafter.drafters.compose import Wrapped
from redrafter.drafting import Strategy, foreseen
from redrafter.targets.model import Target, TargetOutput

# A tree's forward has other shapes than the parallel pass: its rounding may be larger by luck, but
# not by much once the largest of many positions is taken.
_ROUNDING_FACTOR = 4.0
# The least that counts as rounding, in units of the last place of the largest score: very short
# texts may agree to the bit.
_ROUNDING_ULPS = 8.0
MAX_CASES = 100


class RecordingDrafter(Wrapped):
    """Drafts as another drafter does, and keeps the raw logits behind every emitted token.

    logits: per row, a list of (n, V) tensors, one per step
    """

    def __init__(self, drafter: Drafter):
        super().__init__(drafter, frozenset({"logits"}))

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.logits: list[list[Tensor]] = [[] for _ in seqs.length]
        self.known = seqs.prompt_length.tolist()

    def observe(self, truth: Truth) -> None:
        # By the rows' lengths, not by `truth.count`: that is 0 for a row that has just ended.
        for row, length in enumerate(self.seqs.length.tolist()):
            if length > self.known[row]:
                self.logits[row].append(truth.logits[row, : length - self.known[row]].clone())
            self.known[row] = length
        super().observe(truth)


class RecordingTarget:
    """A target that keeps the logits of every forward (plain, one row: one per token)."""

    def __init__(self, target: Target):
        self._target = target
        self.logits: list[Tensor] = []

    def __getattr__(self, name: str):
        return getattr(self._target, name)

    def forward(self, *args, **kwargs) -> TargetOutput:
        out = self._target.forward(*args, **kwargs)
        self.logits.append(out.logits[0].clone())
        return out


class Force(LogitsProcessor):
    """Leaves `text[i]` as the only choice for the i-th new token; frees what follows the text."""

    def __init__(self, prompt_length: int, text: Sequence[int]):
        self.prompt_length, self.text = prompt_length, text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.prompt_length
        if not 0 <= place < len(self.text):
            return scores
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.text[place]] = 0.0
        return forced


@dataclass
class Reference:
    """What the target says along a text of one row, run as `plain` runs it, alone and unpadded.

    tokens, finish: the text and why it ended; scores: (n, V) processed scores with noise, before
    each token; rounding: how far rounding may move a score
    """

    tokens: list[int]
    finish: str
    scores: Tensor
    rounding: float


@dataclass
class Case:
    """One differing token."""

    prompt: int
    batch_size: int
    position: int
    token: int | None
    reference_token: int | None
    gap: float | None
    difference: float | None
    rounding: float
    explained: bool

    def judged(self, rounding: float) -> Case:
        """The same under another bound on what rounding can explain."""
        near = self.gap is not None and self.gap <= 2 * self.difference
        explained = near and self.difference <= rounding and rounding > 0
        return replace(self, rounding=rounding, explained=explained)


@dataclass
class ModeResult:
    """Counts of one mode over all its batch sizes. `far_logits`: positions, tokens equal or not,
    whose scores differ by more than rounding explains: no changed token, but worth a look."""

    temperature: float
    prompts: int
    compared_tokens: int = 0
    near_ties: int = 0
    unexplained: int = 0
    rows_equal: int = 0
    rows_compared: int = 0
    far_logits: int = 0
    largest_difference: float = 0.0
    rounding: float = 0.0
    cases: list[Case] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    """The differences that `far_logits` counts."""

    def add(self, case: Case) -> None:
        self.near_ties += case.explained
        self.unexplained += not case.explained
        self.cases.append(case)

    def add_far(self, differences: Sequence[float]) -> None:
        self.far += [d for d in differences if d > self.rounding]
        self.far_logits = len(self.far)

    @classmethod
    def together(cls, parts: Sequence[ModeResult]) -> ModeResult:
        """Of one mode's prompts, compared part by part. What rounding can explain is the most that
        it did in any part, so every case is judged once more."""
        whole = cls(parts[0].temperature, sum(part.prompts for part in parts))
        whole.rounding = max(part.rounding for part in parts)
        whole.largest_difference = max(part.largest_difference for part in parts)
        for part in parts:
            for name in ("compared_tokens", "rows_equal", "rows_compared"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.add_far(part.far)
            for case in part.cases:
                whole.add(case.judged(whole.rounding))
        return whole

    def told(self) -> dict[str, Any]:
        """For JSON: of the cases unexplained ones first, then near-ties, while there is room."""
        told = {key: value for key, value in asdict(self).items() if key != "far"}
        told["cases"] = sorted(told["cases"], key=lambda case: case["explained"])[:MAX_CASES]
        return told

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModeResult:
        """What `asdict` gave."""
        return cls(**{**content, "cases": [Case(**case) for case in content["cases"]]})


def processed(
    target: Target, prompt: Sequence[int], text: Sequence[int], logits: Tensor,
    config: GenerationConfig, seed: int,
) -> Tensor:  # fmt: skip
    """Raw logits before each token of a text -> scores with noise, as both loops choose by.

    logits: (n, V), n <= len(text). Returns (n, V).
    """
    request = Request(target, [prompt], config, seed, None, None, None, None)
    n = len(logits)
    ids = torch.tensor([*prompt, *text], device=target.device)
    length = torch.arange(len(prompt), len(prompt) + n, device=target.device)
    rows = RowState(
        ids=ids.expand(n, -1),
        length=length,
        prompt_length=torch.full_like(length, len(prompt)),
        live=torch.ones_like(length, dtype=torch.bool),
    )
    scores = request.warp.rows(logits, rows)
    noise = request.noise([len(prompt)], n)
    return scores if noise is None else scores + noise[0].to(scores.dtype)


@torch.inference_mode()
def reference(
    target: Target,
    prompt: Sequence[int],
    config: GenerationConfig,
    seed: int,
    text: Sequence[int] | None = None,
) -> Reference:
    """Plain decoding of a row alone; along a given text (teacher forcing) where there is one."""
    recorder = RecordingTarget(target)
    force = None if text is None else [Force(len(prompt), text)]
    made = plain(recorder, [prompt], config, seeds=seed, logits_processor=force)
    tokens, n = made.tokens[0], len(made.tokens[0])
    # (Scores that are not finite chose no token, and ended the row.)
    sequential = torch.cat(recorder.logits)[:n]
    scores = processed(target, prompt, tokens, sequential, config, seed)
    # The same by one forward over the whole text, in other shapes and without a cache.
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=target.device)
    parallel = target.project(target.states(ids)[0, len(prompt) - 1 :][:n])
    other = processed(target, prompt, tokens, parallel, config, seed)
    largest = _largest(scores.masked_fill(scores.isinf(), 0.0))
    rounding = max(
        _ROUNDING_FACTOR * _largest(_differences(scores, other)),
        _ROUNDING_ULPS * torch.finfo(scores.dtype).eps * largest,
    )
    return Reference(tokens, made.finish[0], scores, rounding)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """(n,) largest difference per position; a token forbidden in both differs by nothing."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a.double() - b.double()).abs()).amax(-1)


def _largest(numbers: Tensor) -> float:
    """By size; 0 where there is none, as of a row without a token."""
    return float(numbers.abs().max()) if numbers.numel() else 0.0


def compare_row(
    result: ModeResult,
    own: Reference,
    tokens: list[int],
    finish: str,
    scores: Tensor,
    prompt: int,
    batch_size: int,
    bitwise: bool = False,
) -> None:
    """Count the differences of one speculative row.

    own: the reference along the speculative text
    scores: (n, V), those that the speculative run chose by
    bitwise: of a target with `target.exact invariant`: rounding explains nothing
    """
    n = min(len(tokens), len(own.tokens))
    result.rows_compared += 1
    result.compared_tokens += n
    differences = _differences(own.scores[:n], scores[:n])
    result.largest_difference = max(result.largest_difference, _largest(differences))
    result.rounding = rounding = 0.0 if bitwise else max(result.rounding, own.rounding)
    result.add_far(differences.tolist())
    for i, (token, choice) in enumerate(
        zip(tokens[:n], choose(own.scores[:n], None).tolist(), strict=True)
    ):
        if token == choice:
            continue
        gap = float(own.scores[i, choice].double() - own.scores[i, token].double())
        case = Case(prompt, batch_size, i, token, choice, gap, float(differences[i]), 0.0, False)
        result.add(case.judged(rounding))
    if tokens != own.tokens or finish != own.finish:
        # Along the same text, plain decoding would have stopped elsewhere or for another reason.
        token = tokens[n] if n < len(tokens) else None
        after = own.tokens[n] if n < len(own.tokens) else None
        result.add(Case(prompt, batch_size, n, token, after, None, None, rounding, False))


def references(
    target: Target, prompts: Sequence[Sequence[int]], config: GenerationConfig, seed: int = 0,
    advance: Callable[[int], Any] = lambda rows: None,
) -> list[Reference]:  # fmt: skip
    """Plain decoding of every prompt alone; prompt i has seed + i. Every method of a mode is
    compared with it. advance: told of every row when it is done"""
    found = []
    for i, row in enumerate(prompts):
        found.append(reference(target, row, config, seed + i))
        advance(1)
    return found


def _temperature(config: GenerationConfig) -> float:
    return float(config.temperature or 1.0) if config.do_sample else 0.0


@torch.inference_mode()
def check_mode(
    target: Target,
    make_strategy: Callable[[list[list[int]]], Strategy],
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    plain_of: Sequence[Reference],
    batch_sizes: Sequence[int] = (1, 4),
    seed: int = 0,
    speculative_target: Target | None = None,
    first: int = 0,
    advance: Callable[[int], Any] = lambda rows: None,
) -> ModeResult:
    """Compare speculative with plain decoding on every prompt, at every batch size.

    make_strategy: see `drafting.strategy_maker`; its rule is `seeded` or the decoding greedy, as a
        ratio rule's sampled text is another one
    config: greedy, or sampling; plain_of: `references` of the same prompts, config and seed
    speculative_target: the target of the speculative run, where a test plants a fault in it
    first: the number of the first of these prompts among all, for the report; seed is its own
    advance: told of the rows that are done
    """
    result = ModeResult(_temperature(config), len(prompts))
    if target.invariant is None:
        result.rounding = max(own.rounding for own in plain_of)
    for batch_size in batch_sizes:
        for start in range(0, len(prompts), batch_size):
            chunk = range(start, min(start + batch_size, len(prompts)))
            strategy = make_strategy([[*prompts[i], *plain_of[i].tokens] for i in chunk])
            decode = functools.partial(
                speculative,
                speculative_target or target,
                [prompts[i] for i in chunk],
                copy.deepcopy(config),
                seeds=[seed + i for i in chunk],
                rule=strategy.rule,
            )
            ahead = functools.partial(decode, drafter=strategy.drafter)
            strategy = foreseen(strategy, lambda lookahead, ahead=ahead: ahead(lookahead=lookahead))
            recorder = RecordingDrafter(strategy.drafter)
            made = decode(drafter=recorder, lookahead=strategy.lookahead)
            for row, i in enumerate(chunk):
                own, tokens = plain_of[i], made.tokens[row]
                result.rows_equal += tokens == own.tokens
                if tokens != own.tokens:
                    own = reference(target, prompts[i], config, seed + i, tokens)
                logits = torch.cat([own.scores[:0], *recorder.logits[row]])
                assert len(logits) == len(tokens), "scores were recorded for other tokens"
                scores = processed(target, prompts[i], tokens, logits, config, seed + i)
                compare_row(
                    result, own, tokens, made.finish[row], scores, first + i, batch_size,
                    bitwise=target.invariant is not None,
                )  # fmt: skip
            advance(len(chunk))
    return result


def ragged(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts themselves, or, where all are of one length, without the last i % 4 tokens of
    prompt i: a batch of equal rows would test less."""
    if len({len(p) for p in prompts}) > 1:
        return [list(p) for p in prompts]
    return [list(p[: max(1, len(p) - i % 4)]) for i, p in enumerate(prompts)]
