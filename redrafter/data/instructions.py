"""First stage where one has no prompts: a chat model writes what a user might ask.

Given its own template up to where a user's words begin, a model that was tuned on chats goes on
with such words (Magpie, arXiv 2406.08464). They cover what the model is asked for at large, where a
file of questions covers one subject, and need no data that would have to be had or licensed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from redrafter.bars import Bar
from redrafter.config import InstructionsConfig, SourceConfig
from redrafter.contracts import InputError
from redrafter.data.answers import answer_seed, generation_config, groups_of
from redrafter.data.build_rows import columns_of, need_rows
from redrafter.data.chat import Renderer
from redrafter.data.day import dated, day_of
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.rows import TokenRow
from redrafter.data.store import Store, begun, job_folder, open_job
from redrafter.data.template import Template
from redrafter.decode.refill import refilled
from redrafter.processes import by_main
from redrafter.targets.identity import target_identity
from redrafter.targets.model import Target
from redrafter.targets.text import encode, tokenizer_of

_REMEDY = ": give it more room, or another temperature"


def build_instructions(
    target: Target,
    config: InstructionsConfig,
    folder: str | Path,
    *,
    named: bool = False,
    progress: bool = True,
) -> Store:
    """Let the target write `config.n` prompts, or open those that it wrote before.

    Returns prompts like those of `build_rows`, rendered as a server would render a user's words.
    What has not ended within `config.max_new_tokens`, what is shorter than `config.min_words` and
    what repeats another of its shard is left out and listed. Instruction i is drawn with a seed of
    its own, so neither the batch nor the number of processes changes it.
    Raises InputError where the target has no chat template.
    """
    tokenizer = tokenizer_of(target, "target.path")
    identity = {
        "target": target_identity(target), "seed": config.seed, "n": config.n,
        "temperature": float(config.temperature), "max_new_tokens": config.max_new_tokens,
        "min_words": config.min_words, "shard_prompts": config.shard_prompts,
    }  # fmt: skip
    day = by_main(lambda: day_of(tokenizer, begun(job_folder(folder, "prompts", identity, named))))
    job = open_job(folder, "prompts", dated(identity, day), named)
    if not job.complete:
        writer = _Writer(target, tokenizer, config, day)
        groups = groups_of(config.n, config.shard_prompts)
        fill(
            job, [len(g) for g in groups], lambda index, bar: writer.shard(groups[index], bar),
            what="instructions", unit="row", progress=progress, together=target.together,
            input=config.n, made_from=[{"kind": "instructions", "name": target.name}],
        )  # fmt: skip
    return need_rows(open_filled(job), "instructions", _REMEDY)


def around_user(template: Template) -> tuple[str, str]:
    """What a chat template puts before a user's first words, and behind them.

    Raises InputError for a tokenizer without a chat template, and for a template that changes what
    a user says.
    """
    said = "0123456789"
    if template.exists:
        text = template.render([{"role": "user", "content": said}], True, "instructions", None)
        before, found, behind = text.partition(said)
        if found and before.strip():
            return before, behind
    raise InputError(
        "target.path: instructions are what a model writes where its chat template puts a user's "
        "words, and this tokenizer's template tells of no such place: give a chat model, or read "
        "prompts from a file with data/prepare.py"
    )


class _Writer:
    def __init__(
        self, target: Target, tokenizer: Any, config: InstructionsConfig, day: str | None
    ) -> None:
        self.target, self.tokenizer, self.config = target, tokenizer, config
        before, behind = around_user(Template(tokenizer, day))
        self.before = encode(tokenizer, before)
        # A user's turn may end with another token than an assistant's.
        closing = tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"]
        ends = {*target.eos_token_ids, *closing[:1]}
        self.how = _until(sorted(ends), config)
        self.renderer = Renderer(tokenizer, SourceConfig(path="instructions"), day)

    def shard(self, numbers: range, bar: Bar) -> Shard:
        """The instructions of these numbers, and those left out."""
        made = refilled(
            self.target, [self.before] * len(numbers), self.how, slots=self.config.batch_size,
            seeds=[answer_seed(self.config.seed, i, self.config.temperature, 0) for i in numbers],
            ended=lambda row: bar.update(1),
        )  # fmt: skip
        rows, rejected, seen = {}, [], set()
        for i, ids in zip(numbers, made.tokens, strict=True):
            said, why = self._words(ids)
            if why is None and said in seen:
                why = "duplicate"
            if why is None:
                seen.add(said)
                try:
                    prompt = self._prompt(said, i)
                    rows[i] = TokenRow(prompt, (False,) * len(prompt), i)
                    continue
                except InputError as error:
                    why = str(error)
            rejected.append({"source_row": i, "failed": False, "reason": why})
        return columns_of(rows.values(), rows), rejected

    def _words(self, ids: list[int]) -> tuple[str, str | None]:
        """What was written, and why it is no instruction if it is none."""
        if not ids or ids[-1] not in self.how.eos_token_id:
            return "", f"not ended within {self.config.max_new_tokens} tokens"
        said = self.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False).strip()
        if len(said.split()) < self.config.min_words:
            return said, f"shorter than {self.config.min_words} words"
        if any(token in self.tokenizer.all_special_ids for token in ids[:-1]):
            return said, "holds a special token"
        return said, None

    def _prompt(self, said: str, number: int) -> tuple[int, ...]:
        messages = [{"role": "user", "content": said}]
        return self.renderer.conversation(messages, f"instruction {number}")


def _until(ends: list[int], config: InstructionsConfig) -> GenerationConfig:
    how = generation_config(config.temperature, config.max_new_tokens)
    how.eos_token_id = ends
    return how
