"""The target's own answers to prompts: what a draft head learns from.

One pass over all prompts is one *part* (a temperature and a sample number), one safetensors file
with a manifest beside it. A part that lies there already is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from redrafter.contracts import InputError
from redrafter.data.prompts import Prompt
from redrafter.decode.plain import plain
from redrafter.files import digest_json, new_folder, write_json
from redrafter.target.model import Target

_FORMAT = 1


@dataclass(frozen=True)
class Answers:
    """Rows of tokens, one after the other.

    tokens: (S,) int64, prompt + answer of every row
    supervised: (S,) bool, True for the tokens of answers
    offsets: (R + 1,) int64; row r is tokens[offsets[r] : offsets[r + 1]]
    digest: of everything that the content depends on
    """

    tokens: Tensor
    supervised: Tensor
    offsets: Tensor
    digest: str

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def answer_tokens(self) -> int:
        return int(self.supervised.sum())

    def lengths(self) -> Tensor:
        """(R,) int64, tokens per row."""
        return self.offsets[1:] - self.offsets[:-1]


def make_answers(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    temperatures: Sequence[float],
    samples_per_prompt: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    folder: str | Path,
    progress: bool = True,
) -> Answers:
    """Let the target answer, or read the answers it gave before.

    temperatures: 0 is greedy (one pass); each other one is sampled `samples_per_prompt` times
    max_new_tokens: per answer; the target's context may cut it shorter
    batch_size: rows per forward; it changes the speed, not the answers
    seed: with a prompt's row, the temperature and the sample number it fixes the answer
    folder: where the parts lie or will lie
    Raises InputError naming the file if a part there cannot be read.
    """
    prompt_digest = digest_json([(p.row, p.ids) for p in prompts])
    parts, digests = [], []
    for temperature in temperatures:
        for sample in range(samples_per_prompt if temperature > 0 else 1):
            manifest = {
                "format": _FORMAT,
                "target": target.fingerprint(),
                "prompts": prompt_digest,
                "n_prompts": len(prompts),
                "temperature": float(temperature),
                "sample": sample,
                "max_new_tokens": max_new_tokens,
                "seed": seed if temperature > 0 else None,
            }
            digest = digest_json(manifest)
            part = Path(folder) / f"part-{digest[:16]}"
            if not part.exists():
                seeds = [_seed(seed, p.row, temperature, sample) for p in prompts]
                label = f"answers, temperature {temperature:g}, sample {sample + 1}"
                bar = tqdm(total=len(prompts), desc=label, unit="row", disable=not progress)
                rows = _answer(
                    target, prompts, temperature, seeds, max_new_tokens, batch_size, bar
                )
                _write(part, rows, manifest)
            parts.append(_read(part, manifest))
            digests.append(digest)
    return _join(parts, digest_json(digests))


def _seed(seed: int, row: int, temperature: float, sample: int) -> int:
    text = f"{seed}/{row}/{float(temperature)!r}/{sample}"
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


def _answer(
    target: Target,
    prompts: Sequence[Prompt],
    temperature: float,
    seeds: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    bar: tqdm,
) -> list[tuple[Sequence[int], list[int]]]:
    """(prompt, answer) in the order of the prompts; batches hold prompts of similar length."""
    config = generation_config(temperature, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    answers: dict[int, list[int]] = {}
    with bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            made = plain(
                target,
                [prompts[i].ids for i in batch],
                config,
                seeds=[seeds[i] for i in batch],
            )
            answers.update(zip(batch, made.tokens, strict=True))
            bar.update(len(batch))
    return [(p.ids, answers[i]) for i, p in enumerate(prompts)]


def _write(part: Path, rows: list[tuple[Sequence[int], list[int]]], manifest: dict) -> None:
    tensors = {
        "tokens": torch.tensor([t for p, a in rows for t in (*p, *a)], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(p) for p, _ in rows], dtype=torch.int32),
        "answer_lengths": torch.tensor([len(a) for _, a in rows], dtype=torch.int32),
    }
    with new_folder(part) as folder:
        save_file(tensors, folder / "answers.safetensors")
        write_json(folder / "manifest.json", manifest)


def _read(part: Path, manifest: dict) -> Answers:
    file = part / "answers.safetensors"
    try:
        found = json.loads((part / "manifest.json").read_text(encoding="utf-8"))
        with safetensors.safe_open(file, framework="pt") as opened:
            tokens, prompts, answers = (
                opened.get_tensor(name).long()
                for name in ("tokens", "prompt_lengths", "answer_lengths")
            )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        message = f"{file} cannot be read ({error}): delete {part} to make it anew"
        raise InputError(message) from None
    lengths = prompts + answers
    if found != manifest or len(lengths) != manifest["n_prompts"] or lengths.sum() != len(tokens):
        raise InputError(f"{part} does not hold what its name says: delete it to make it anew")
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    supervised = torch.arange(len(tokens)) - offsets[row] >= prompts[row]
    return Answers(tokens, supervised, offsets, "")


def _join(parts: Sequence[Answers], digest: str) -> Answers:
    offsets, at = [torch.zeros(1, dtype=torch.long)], 0
    for part in parts:
        offsets.append(part.offsets[1:] + at)
        at += len(part.tokens)
    return Answers(
        torch.cat([p.tokens for p in parts]),
        torch.cat([p.supervised for p in parts]),
        torch.cat(offsets),
        digest,
    )


def right_padded(answers: Answers, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows as a batch: tokens (B, T) int64, padded with 0 on the right, and lengths (B,)."""
    pieces = [answers.tokens[answers.offsets[r] : answers.offsets[r + 1]] for r in rows]
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), lengths


def batches_by_length(
    answers: Answers, rows: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Rows grouped with others of similar length, at most `batch_tokens` tokens with padding."""
    lengths = answers.lengths()
    batch: list[int] = []
    for row in sorted(rows, key=lambda r: (int(lengths[r]), r)):
        if batch and (len(batch) + 1) * int(lengths[row]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
