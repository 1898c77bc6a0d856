"""Second stage: the target's own answers to prompts, which is what a draft head learns from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm
from transformers import GenerationConfig

from redrafter.config import AnswersConfig
from redrafter.contracts import Drafter, Generation, InputError
from redrafter.data.build_rows import columns_of, need_rows
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.formats import Messages
from redrafter.data.rows import TokenRow
from redrafter.data.store import Store, open_job
from redrafter.data.template import Tools
from redrafter.data.vocabulary import check_store_ids
from redrafter.decode.refill import refilled
from redrafter.decode.request import NOT_FINITE
from redrafter.decode.speculative import speculative
from redrafter.targets.identity import target_identity, text_identity
from redrafter.targets.model import Target

_OVERFLOW = "scores of the target in {} that are not finite: a wider target.dtype may hold them"


@dataclass(frozen=True)
class Asked:
    """ids: a prompt; messages, tools: the chat that it renders, where that is known"""

    ids: list[int]
    messages: Messages | None = None
    tools: Tools | None = None


@dataclass(frozen=True)
class Answer:
    """tokens: the prompt excluded, the EOS that ended them included; finish: "eos" or "length";
    counted: what else a store's `tally` is to count of it"""

    tokens: list[int]
    finish: str
    counted: dict[str, int] | None = None


@dataclass(frozen=True)
class LeftOut:
    """No answer. reason: why; failed: it could not be made (else the prompt is refused)"""

    reason: str
    failed: bool = False


class Answerer(Protocol):
    """Who answers prompts: the target here, or a server (`served.py`).

    identity: what its answers depend on, besides what `answers_identity` says of all
    """

    identity: dict[str, Any]

    def __call__(
        self, asked: Sequence[Asked], seeds: Sequence[int], temperature: float, bar: tqdm
    ) -> list[Answer | LeftOut]:
        """The answer to every prompt; moves the bar by one each."""
        ...


def build_answers(
    target: Target,
    prompts: Store,
    config: AnswersConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    drafter: Callable[[], Drafter] | None = None,
    answerer: Answerer | None = None,
    named: bool = False,
    progress: bool = True,
) -> Store:
    """Let the target answer every prompt, or open the answers it gave before.

    seed: with a prompt's source row, the temperature and the sample number it fixes the answer
    drafter: makes a drafter; answers are then made by speculative decoding, which is faster and
        changes none of them
    answerer: who answers in the target's place
    named: use a folder in `folder` that is named after the content
    One shard is `config.shard_prompts` prompts at one temperature; a kill loses the one being made,
    and several processes share them out (`filling.py`). A prompt that fills the context, and an
    answer that met scores that are not finite, are left out and listed.
    """
    check_same_text(prompts, target)
    answerer = answerer or OwnAnswers(target, config, drafter)
    identity = {
        "prompts": prompts.digest, **answers_identity(target, config, seed), **answerer.identity
    }  # fmt: skip
    job = open_job(folder, "answers", identity, named)
    if job.complete:
        return need_rows(open_filled(job), prompts.name)
    check_store_ids(prompts, target)
    passes, n = passes_of(config), prompts.n_rows
    groups = groups_of(n, config.shard_prompts)

    def make(index: int, bar: tqdm) -> Shard:
        number, group = divmod(index, len(groups))
        rows, rejected, tally = _answer(
            prompts, groups[group], *passes[number], seed, target.max_positions, answerer, bar
        )
        return columns_of(rows.values(), [number * n + i for i in rows]), rejected, tally

    sizes = [len(group) for _ in passes for group in groups]
    store = fill(
        job, sizes, make, what=_asked(n, config), unit="row", progress=progress,
        together=target.together, input=sum(sizes), made_from=prompts.lineage,
    )  # fmt: skip
    return need_rows(store, prompts.name)


def _asked(n: int, config: AnswersConfig) -> str:
    """Why there are more answers than prompts, for who watches them being made."""
    at = " and ".join(f"{t:g}" for t in config.temperatures)
    times = f", {config.samples_per_prompt} times each" if config.samples_per_prompt > 1 else ""
    return f"answers to {n} prompts at T {at}{times}"


def answers_identity(target: Target, config: AnswersConfig, seed: int) -> dict[str, Any]:
    """What answers depend on, besides what they answer."""
    return {
        "target": target_identity(target),
        "temperatures": [float(t) for t in config.temperatures],
        "samples_per_prompt": config.samples_per_prompt,
        "max_new_tokens": config.max_new_tokens,
        "seed": seed,
        "shard_prompts": config.shard_prompts,
    }


def passes_of(config: AnswersConfig) -> list[tuple[float, int]]:
    """(temperature, sample number) of every time that all prompts are answered."""
    return [
        (float(t), sample)
        for t in config.temperatures
        for sample in range(config.samples_per_prompt if t > 0 else 1)
    ]


def groups_of(n: int, size: int) -> list[range]:
    """0 .. n - 1 in runs of `size`, the last one shorter."""
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def check_same_text(store: Store, target: Target) -> None:
    """Raises InputError where rows of tokens were made with another tokenizer or template."""
    made = store.identity.get("text") or store.identity.get("target") or {}
    here = {} if target.tokenizer is None else text_identity(target.tokenizer)
    for part, digest in here.items():
        if part in made and made[part] != digest:
            raise InputError(
                f"{store.name} was made with another {part} ({made[part]}, this target has "
                f"{digest}): give the target it was made for, or make it anew"
            )


def _answer(
    prompts: Store,
    chosen: Sequence[int],
    temperature: float,
    sample: int,
    seed: int,
    room: int | None,
    answerer: Answerer,
    bar: tqdm,
) -> tuple[dict[int, TokenRow], list[dict], Counter[str]]:
    """Prompt number -> prompt and answer, in order; the prompts that have none; and a tally."""
    read = prompts.rows(chosen)
    ids = {i: read.ids(place) for place, i in enumerate(chosen)}
    out: dict[int, LeftOut] = {
        i: LeftOut(f"a prompt of {len(ids[i])} tokens fills the context of {room}")
        for i in chosen if room is not None and len(ids[i]) >= room
    }  # fmt: skip
    bar.update(len(out))
    fitting = [i for i in chosen if i not in out]
    source_rows = {i: int(prompts.source_row[i]) for i in fitting}
    seeds = [answer_seed(seed, source_rows[i], temperature, sample) for i in fitting]
    answers = answerer([Asked(ids[i]) for i in fitting], seeds, temperature, bar)
    made: dict[int, TokenRow] = {}
    for i, found in zip(fitting, answers, strict=True):
        if isinstance(found, LeftOut):
            out[i] = found
        else:
            made[i] = answered_row(ids[i], found.tokens, source_rows[i])
    rejected = [left_out(int(prompts.source_row[i]), out[i]) for i in chosen if i in out]
    return made, rejected, tally_of(answers)


def left_out(source_row: int, why: LeftOut) -> dict[str, Any]:
    """A prompt without an answer, as a shard's receipt lists it."""
    return {"source_row": source_row, "failed": why.failed, "reason": why.reason}


def tally_of(answers: Iterable[Answer | LeftOut]) -> Counter[str]:
    """How often answers ended why, and what else they count."""
    tally: Counter[str] = Counter()
    for found in answers:
        if isinstance(found, Answer):
            tally.update({f"ended by {found.finish}": 1, **(found.counted or {})})
    return tally


class OwnAnswers:
    """The target answers here, `config.batch_size` prompts at a time. What else is in the batch
    changes no answer."""

    def __init__(
        self, target: Target, config: AnswersConfig, drafter: Callable[[], Drafter] | None = None
    ):
        self.target, self.config, self.drafter = target, config, drafter
        self.identity: dict[str, Any] = {}

    def __call__(
        self, asked: Sequence[Asked], seeds: Sequence[int], temperature: float, bar: tqdm
    ) -> list[Answer | LeftOut]:
        """LeftOut: those that met scores that are not finite."""
        rows, size = [prompt.ids for prompt in asked], self.config.batch_size
        if not rows:
            return []
        generation = generation_config(temperature, self.config.max_new_tokens)
        if self.drafter is None:
            made = refilled(
                self.target, rows, generation, slots=size, seeds=list(seeds),
                ended=lambda row: bar.update(1),
            )  # fmt: skip
            return self._read(made)
        answers: dict[int, Answer | LeftOut] = {}
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))  # of similar lengths
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            made = speculative(
                self.target, [rows[i] for i in batch], generation,
                seeds=[seeds[i] for i in batch], drafter=self.drafter(),
            )  # fmt: skip
            answers.update(zip(batch, self._read(made), strict=True))
            bar.update(len(batch))
        return [answers[i] for i in range(len(rows))]

    def _read(self, made: Generation) -> list[Answer | LeftOut]:
        ends = zip(made.tokens, made.finish, strict=True)
        why = LeftOut(_OVERFLOW.format(str(self.target.dtype).removeprefix("torch.")))
        return [why if end == NOT_FINITE else Answer(tokens, end) for tokens, end in ends]


def answered_row(prompt: Sequence[int], text: Sequence[int], source_row: int) -> TokenRow:
    """A prompt and its answer, of which the answer is learned."""
    mask = (False,) * len(prompt) + (True,) * len(text)
    return TokenRow((*prompt, *text), mask, source_row)


def answer_seed(
    seed: int, source_row: int, temperature: float, sample: int, turn: int = 0
) -> int:
    """32 bits that an answer is drawn with. turn: 0 for the first of its source row."""
    text = f"{seed}/{source_row}/{float(temperature)!r}/{sample}" + (f"/{turn}" if turn else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def generation_config(temperature: float, max_new_tokens: int) -> GenerationConfig:
    """The target's pure distribution at a temperature; 0 is greedy."""
    if temperature == 0:
        return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=float(temperature),
        top_k=0,
        top_p=1.0,
    )
