"""Probed bigrams: what the target says after every single token, from its weights alone.

The model bigram and unigram of the N-Grammys (Stewart et al. 2024, arXiv 2411.03786): B[x] is the
top-k of p(. | x) for every token x of the vocabulary. Whether BOS stands before x, and how exactly
the unigram ranks, are options here with measured defaults (ours). Measured on greedy answers: 40
gsm8k and 40 tinystories prompts by gsm-stories-6m, 20 tinystories prompts by stories260K.
- Share of answer tokens among the first 1, 4, 10 successors of the token before them: without BOS
  .22 .42 .58, .32 .54 .75, .27 .49 .75; with BOS .06 .14 .23, .13 .31 .50, .11 .25 .43, since what
  follows BOS is how texts begin. Default: without.
- Share of answer tokens among the first 10 of the unigram: `table` .17, .24, .22; `weights` .01,
  .01, .06; `bos` .02, .01, .03. Default: `table`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from redrafter.bars import Bar
from redrafter.contracts import InputError
from redrafter.data.finite import OVERFLOWED, choice
from redrafter.drafters.bigram import BigramTable, load_bigrams, save_bigrams
from redrafter.files import plain_values, remove_leftovers, write_json, write_tensors
from redrafter.processes import by_main, everyone, is_main, mine, share_of, wait_to_see
from redrafter.targets.identity import target_identity
from redrafter.targets.model import Target

PROBED = "probed"  # the `kind` of such a table
Unigram = Literal["table", "weights", "bos"]
_CHUNK_ROWS = 16384  # rows of lm_head that are worked on at a time


@torch.inference_mode()
def top_successors(
    target: Target, tokens: Tensor, width: int, bos: int | None
) -> tuple[Tensor, Tensor]:
    """The `width` tokens most probable after each token alone, or after BOS and the token.

    tokens: (n,) int64 on the target's device. Returns ids (n, width) int64 and their
    log-probabilities (n, width) float32, the most probable first; of a token after which the scores
    are not finite no successor is known: ids 0, -inf.
    """
    context = tokens[:, None]
    if bos is not None:
        context = torch.cat([torch.full_like(context, bos), context], 1)
    return _top(target, context, width)


def _top(target: Target, context: Tensor, width: int) -> tuple[Tensor, Tensor]:
    logits = target.project(target.states(context)[:, -1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p, ids = logits.log_softmax(-1).topk(width, dim=-1)
    unknown = choice(logits)[:, None] == OVERFLOWED
    return ids.masked_fill(unknown, 0), log_p.float().masked_fill(unknown, float("-inf"))


@torch.inference_mode()
def unigram_after_bos(target: Target, width: int, bos: int) -> Tensor:
    """(width,) int64: the tokens most probable after BOS alone (ours)."""
    context = torch.tensor([[bos]], device=target.device)
    ids, log_p = _top(target, context, width)
    if not bool(log_p[0, 0].isfinite()):
        raise _overflows(target, "what it says after BOS")
    return ids[0].cpu()


@torch.inference_mode()
def unigram_of_weights(target: Target, width: int) -> Tensor:
    """(width,) int64: the tokens whose rows of lm_head lie farthest from the rows' mean, in the
    inner product that makes the rows' covariance the identity ("causal" inner product).

    The paper ranks by distance to the mean in such an inner product; the exact form is ours, and
    so is the direction: nearest to the mean are the tokens that training never met.
    """
    distance = unembedding_distance(target)
    if not bool(distance.isfinite().all()):
        raise _overflows(target, "its lm_head")
    return distance.argsort(stable=True, descending=True)[:width].cpu()


def _overflows(target: Target, what: str) -> InputError:
    computed = str(target.dtype).removeprefix("torch.")
    return InputError(
        f"{target.name} in {computed}: {what} is not finite, so it ranks no tokens: take a wider "
        "target.dtype, or --unigram table"
    )


def unigram_of_table(table: BigramTable, width: int) -> Tensor:
    """(width,) int64: the tokens most probable after a token of which nothing is known, that is
    by the mean of p(. | x) over the vocabulary, as far as the table holds it (ours)."""
    p_next = torch.zeros(table.vocab_size, dtype=torch.float64)
    p_next.index_add_(0, table.tokens.flatten(), table.log_p.double().exp().flatten())
    return p_next.argsort(stable=True, descending=True)[:width]


def unembedding_distance(target: Target) -> Tensor:
    """(V,) float64: squared Mahalanobis distance of each row of lm_head to their mean."""
    chunks = target.lm_head_weight.split(_CHUNK_ROWS)
    mean = sum(chunk.double().sum(0) for chunk in chunks) / target.vocab_size
    covariance = sum((c.double() - mean).T @ (c.double() - mean) for c in chunks)
    inverse = torch.linalg.pinv(covariance / target.vocab_size, hermitian=True)

    def distance(rows: Tensor) -> Tensor:
        away = rows.double() - mean
        return ((away @ inverse) * away).sum(1)

    return torch.cat([distance(rows) for rows in chunks])


# ------------------------------------------------------------------------------------ building


def probe_bigrams(
    target: Target,
    out: str | Path,
    *,
    width: int = 16,
    bos: bool = False,
    unigram: Unigram = "table",
    batch_size: int = 256,
    part_tokens: int = 8192,
    progress: bool = False,
) -> BigramTable:
    """Probe every token of the vocabulary and write the table to `out`.

    Parts of `part_tokens` tokens are written to a folder `<out>.parts` beside it, and taken from
    there when an interrupted build is started again; a finished table removes them. Several
    processes share the parts out, and the main one joins them; each gets the table.
    bos: put BOS before the token
    unigram: how tokens are ranked without context: by the table itself, by the rows of lm_head, or
        by what follows BOS
    batch_size: tokens per forward
    Raises InputError where there is no BOS to put, the vocabulary is smaller than `width`, or the
    parts are of another target or other settings.
    """
    out = Path(out)
    if not 1 <= width <= target.vocab_size:
        raise InputError(
            f"width: {width} must be 1 to {target.vocab_size}, the vocabulary of {target.name}"
        )
    bos_id = bos_of(target)
    if bos_id is None and (bos or unigram == "bos"):
        name, off = ("bos", "--bos false") if bos else ("unigram", "--unigram table")
        raise InputError(f"{name}: {target.name} has no BOS token; use {off}")
    about = probed_identity(target, bos, unigram)
    parts = out.with_name(out.name + ".parts")
    by_main(lambda: _open_parts(parts, {**about, "width": width, "part_tokens": part_tokens}))

    pieces = torch.arange(target.vocab_size).split(part_tokens)
    own = [pieces[i] for i in mine(len(pieces))]
    with Bar(total=sum(map(len, own)), desc=share_of("probe"), unit="token",
              disable=not (progress and is_main())) as bar:  # fmt: skip
        for tokens in own:
            if _read_part(parts, tokens, width) is None:
                part = _probe_part(target, tokens, width, bos_id if bos else None, batch_size)
                write_tensors(_part_file(parts, tokens), part)
            bar.update(len(tokens))
    everyone(None)

    def finish() -> None:
        table = _joined_parts(parts, pieces, width)
        if not table.n_seen:
            raise _overflows(target, "what it says after every token")
        if unigram == "weights":
            ranked = unigram_of_weights(target, width)
        elif unigram == "bos":
            ranked = unigram_after_bos(target, width, bos_id)
        else:
            ranked = unigram_of_table(table, width)
        save_bigrams(out, replace(table, unigram=ranked), about)
        rmtree(parts)

    by_main(finish)
    wait_to_see(out)
    return load_bigrams(out, target.vocab_size)[0]


def bos_of(target: Target) -> int | None:
    """The token that begins a text: the tokenizer's, the configuration's where there is none."""
    # A configuration may name a BOS that its tokenizer never writes (Qwen).
    known = target.config if target.tokenizer is None else target.tokenizer
    return getattr(known, "bos_token_id", None)


def probed_identity(target: Target, bos: bool, unigram: str) -> dict[str, Any]:
    """What a probed table says about itself."""
    about = target_identity(target)
    return {
        "kind": PROBED,
        "bos": bos,
        "unigram": unigram,
        "target": about,
        "tokenizer": about.get("tokenizer"),
    }


def check_probed(path: str | Path, about: dict[str, Any], target: Target) -> None:
    """Raises InputError where a table was probed from other weights: drafts would be wrong."""
    made = (about.get("target") or {}).get("weights")
    if made != target.fingerprint():
        raise InputError(
            f"{path} was probed from another target (fingerprint {made}, {target.name} has "
            f"{target.fingerprint()}): probe this one with data/probe.py"
        )


def _open_parts(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or check that its parts belong to this build."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    note, settings = folder / "settings.json", plain_values(settings)
    made: Any = None
    if note.is_file():
        try:
            made = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            made = "unreadable"
    elif not any(folder.iterdir()):  # written before the first part
        write_json(note, settings)
        return
    if made == settings:
        return
    other = made if isinstance(made, dict) else {}
    differ = [key for key in settings if settings[key] != other.get(key)]
    raise InputError(
        f"{folder} holds parts of another build (it differs in {', '.join(differ)}): give another "
        "out, or remove that folder"
    )


def _probe_part(
    target: Target, tokens: Tensor, width: int, bos: int | None, batch_size: int
) -> dict[str, Tensor]:
    found = [
        top_successors(target, batch.to(target.device), width, bos)
        for batch in tokens.split(batch_size)
    ]
    ids, log_p = (torch.cat(rows).cpu() for rows in zip(*found, strict=True))
    return {"tokens": ids, "log_p": log_p}


def _part_file(folder: Path, tokens: Tensor) -> Path:
    return folder / f"{int(tokens[0]):09d}.safetensors"


def _read_part(folder: Path, tokens: Tensor, width: int) -> dict[str, Tensor] | None:
    """The part of some tokens, written before; None where it must be made."""
    path, shape = _part_file(folder, tokens), (len(tokens), width)
    if not path.is_file():
        return None
    try:
        part = load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None
    whole = set(part) == {"tokens", "log_p"} and all(x.shape == shape for x in part.values())
    return part if whole else None


def _joined_parts(folder: Path, pieces: Sequence[Tensor], width: int) -> BigramTable:
    """Of all tokens, whichever process wrote them."""
    found = []
    for tokens in pieces:
        wait_to_see(_part_file(folder, tokens))
        part = _read_part(folder, tokens, width)
        if part is None:
            raise InputError(f"{_part_file(folder, tokens)} is damaged: run the command again")
        found.append(part)
    return BigramTable(*(torch.cat([part[name] for part in found]) for name in ("tokens", "log_p")))
