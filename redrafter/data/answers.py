"""Second stage: the target's own answers to prompts, which is what a draft head learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import GenerationConfig

from redrafter.config import AnswersConfig
from redrafter.contracts import Drafter, InputError
from redrafter.data.build_rows import columns_of, need_rows
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.finite import NOT_FINITE
from redrafter.data.rows import TokenRow
from redrafter.data.store import Store, open_job
from redrafter.data.vocabulary import check_store_ids
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.target.identity import target_identity, text_identity
from redrafter.target.model import Target

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
    identity = {
        "target": target_identity(target),
        "prompts": prompts.digest,
        "temperatures": [float(t) for t in config.temperatures],
        "samples_per_prompt": config.samples_per_prompt,
        "max_new_tokens": config.max_new_tokens,
        "seed": seed,
        "shard_prompts": config.shard_prompts,
    }
    job = open_job(folder, "answers", identity, named)
    if job.complete:
        return need_rows(open_filled(job), prompts.name)
    check_store_ids(prompts, target)
    passes = [
        (float(t), sample)
        for t in config.temperatures
        for sample in range(config.samples_per_prompt if t > 0 else 1)
    ]
    step, n = config.shard_prompts, prompts.n_rows
    groups = [range(first, min(first + step, n)) for first in range(0, n, step)]

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
    """Prompt number -> prompt and answer, in order; and the prompts that have none.

    Batches hold prompts of similar length; which they are does not change an answer.
    """
    read = prompts.rows(chosen)
    ids = {i: read.ids(place) for place, i in enumerate(chosen)}
    room = target.max_positions
    why = {
        i: f"a prompt of {len(ids[i])} tokens fills the context of {room}"
        for i in chosen if room is not None and len(ids[i]) >= room
    }  # fmt: skip
    bar.update(len(why))
    generation = generation_config(temperature, config.max_new_tokens)
    order = sorted((i for i in chosen if i not in why), key=lambda i: (len(ids[i]), i))
    made: dict[int, TokenRow] = {}
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        source_rows = [int(prompts.source_row[i]) for i in batch]
        seeds = [answer_seed(seed, row, temperature, sample) for row in source_rows]
        rows = [ids[i] for i in batch]
        if drafter is None:
            said = plain(target, rows, generation, seeds=seeds)
        else:
            said = speculative(target, rows, generation, seeds=seeds, drafter=drafter())
        for i, row, prompt, text, end in zip(
            batch, source_rows, rows, said.tokens, said.finish, strict=True
        ):
            if end == NOT_FINITE:
                why[i] = _OVERFLOW.format(str(target.dtype).removeprefix("torch."))
                continue
            mask = (False,) * len(prompt) + (True,) * len(text)
            made[i] = TokenRow((*prompt, *text), mask, row)
        bar.update(len(batch))
    rejected = [
        {"source_row": int(prompts.source_row[i]), "failed": False, "reason": why[i]}
        for i in chosen if i in why
    ]  # fmt: skip
    return {i: made[i] for i in chosen if i in made}, rejected


def answer_seed(seed: int, source_row: int, temperature: float, sample: int) -> int:
    """32 bits that an answer is drawn with."""
    text = f"{seed}/{source_row}/{float(temperature)!r}/{sample}"
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
