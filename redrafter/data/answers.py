"""Second stage: the target's own answers to prompts, which is what a draft head learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import GenerationConfig

from redrafter.config import AnswersConfig
from redrafter.contracts import Drafter, Generation, InputError
from redrafter.data.build_rows import columns_of, need_rows
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.rows import TokenRow
from redrafter.data.store import Store, open_job
from redrafter.data.vocabulary import check_store_ids
from redrafter.decode.refill import refilled
from redrafter.decode.request import NOT_FINITE
from redrafter.decode.speculative import speculative
from redrafter.targets.identity import target_identity, text_identity
from redrafter.targets.model import Target

_OVERFLOW = "scores of the target in {} that are not finite: a wider target.dtype may hold them"


def build_answers(
    target: Target,
    prompts: Store,
    config: AnswersConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    drafter: Callable[[], Drafter] | None = None,
    named: bool = False,
    progress: bool = True,
) -> Store:
    """Let the target answer every prompt, or open the answers it gave before.

    seed: with a prompt's source row, the temperature and the sample number it fixes the answer
    drafter: makes a drafter; answers are then made by speculative decoding, which is faster and
        changes none of them
    named: use a folder in `folder` that is named after the content
    One shard is `config.shard_prompts` prompts at one temperature; a kill loses the one being made,
    and several processes share them out (`filling.py`). A prompt that fills the context, and an
    answer that met scores that are not finite, are left out and listed.
    """
    check_same_text(prompts, target)
    identity = {"prompts": prompts.digest, **answers_identity(target, config, seed)}
    job = open_job(folder, "answers", identity, named)
    if job.complete:
        return need_rows(open_filled(job), prompts.name)
    check_store_ids(prompts, target)
    passes, n = passes_of(config), prompts.n_rows
    groups = groups_of(n, config.shard_prompts)

    def make(index: int, bar: tqdm) -> Shard:
        number, group = divmod(index, len(groups))
        rows, rejected = _answer(
            target, prompts, groups[group], *passes[number], config, seed, drafter, bar
        )
        return columns_of(rows.values(), [number * n + i for i in rows]), rejected

    sizes = [len(group) for _ in passes for group in groups]
    store = fill(
        job, sizes, make, what="answers", unit="row", progress=progress,
        together=target.together, input=sum(sizes), made_from=prompts.lineage,
    )  # fmt: skip
    return need_rows(store, prompts.name)


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
    target: Target,
    prompts: Store,
    chosen: Sequence[int],
    temperature: float,
    sample: int,
    config: AnswersConfig,
    seed: int,
    drafter: Callable[[], Drafter] | None,
    bar: tqdm,
) -> tuple[dict[int, TokenRow], list[dict]]:
    """Prompt number -> prompt and answer, in order; and the prompts that have none."""
    read = prompts.rows(chosen)
    ids = {i: read.ids(place) for place, i in enumerate(chosen)}
    room = target.max_positions
    why = {
        i: f"a prompt of {len(ids[i])} tokens fills the context of {room}"
        for i in chosen if room is not None and len(ids[i]) >= room
    }  # fmt: skip
    bar.update(len(why))
    fitting = [i for i in chosen if i not in why]
    source_rows = {i: int(prompts.source_row[i]) for i in fitting}
    seeds = [answer_seed(seed, source_rows[i], temperature, sample) for i in fitting]
    texts = answer(target, [ids[i] for i in fitting], seeds, temperature, config, drafter, bar)
    made: dict[int, TokenRow] = {}
    for i, text in zip(fitting, texts, strict=True):
        if text is None:
            why[i] = overflowed(target)
        else:
            made[i] = answered_row(ids[i], text, source_rows[i])
    rejected = [
        {"source_row": int(prompts.source_row[i]), "failed": False, "reason": why[i]}
        for i in chosen if i in why
    ]  # fmt: skip
    return made, rejected


def answer(
    target: Target,
    rows: list[list[int]],
    seeds: list[int],
    temperature: float,
    config: AnswersConfig,
    drafter: Callable[[], Drafter] | None,
    bar: tqdm,
) -> list[list[int] | None]:
    """The answer to every prompt, `config.batch_size` of them at a time; moves the bar by a row
    each. What else is in the batch changes no answer. None: it met scores that are not finite."""
    if not rows:
        return []
    generation = generation_config(temperature, config.max_new_tokens)
    if drafter is None:
        made = refilled(
            target, rows, generation, slots=config.batch_size, seeds=seeds,
            ended=lambda row: bar.update(1),
        )  # fmt: skip
        return _finite(made)
    texts: dict[int, list[int] | None] = {}
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))  # of similar lengths
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        made = speculative(
            target, [rows[i] for i in batch], generation,
            seeds=[seeds[i] for i in batch], drafter=drafter(),
        )  # fmt: skip
        texts.update(zip(batch, _finite(made), strict=True))
        bar.update(len(batch))
    return [texts[i] for i in range(len(rows))]


def _finite(made: Generation) -> list[list[int] | None]:
    ends = zip(made.tokens, made.finish, strict=True)
    return [None if finish == NOT_FINITE else tokens for tokens, finish in ends]


def overflowed(target: Target) -> str:
    """Why an answer is left out that met scores that are not finite."""
    return _OVERFLOW.format(str(target.dtype).removeprefix("torch."))


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
