"""The golden batch: what a head and its target computed when the head was exported.

    golden/golden.json         prompts, settings, tokens, texts, fingerprints, digests of files
    golden/golden.safetensors  the numbers, see `Golden`

`redrafter/export/verify.py` computes it again elsewhere and says where it first differs. It stays
small for any target (the hidden states dominate: 16 H numbers): a few prompts and positions, of the
head's logits the best ones and a sample evenly spread over its vocabulary, with the logsumexp over
all of them; of the target's scores the best few behind every emitted token. Source: ours.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from redrafter.config import TreeConfig
from redrafter.contracts import InputError, RowState, Truth
from redrafter.data.answers import generation_config
from redrafter.decode.speculative import speculative
from redrafter.drafters.build import Resources, build_drafter
from redrafter.evaluation.lossless import RecordingDrafter, processed, ragged
from redrafter.export.texts import describe_text
from redrafter.files import digest_file, digest_json, versions, write_json, write_tensors
from redrafter.heads.base import DraftHead
from redrafter.heads.load import load_head
from redrafter.targets.adapters import probe_tokens
from redrafter.targets.devices import device_name
from redrafter.targets.identity import target_identity
from redrafter.targets.model import Target
from redrafter.targets.text import encode

FOLDER, FACTS, NUMBERS = "golden", "golden/golden.json", "golden/golden.safetensors"
FORMAT = 1
#: of the folder, what a head computes with and what users run; patterns
FILES = ("config.json", "model.safetensors", "custom_generate/**/*.py")

WIDTH, DEPTH = 4, 4  # of the drafts, and of the draft path, whose logits are kept; at most
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 256, 16  # at most
_POSITIONS = 4  # whose hidden states are kept, the last ones of every prompt
_BEST, _SPREAD = 32, 96  # of the head's logits: the highest, and evenly spaced ones
_CANDIDATES = 8  # of the target's scores, the highest behind every emitted token
_TEXTS = (
    "Once upon a time there was a little girl who",
    "def main():",
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:",
    "The capital of France is",
)


@dataclass
class Golden:
    """One golden batch of P prompts. facts: the JSON file; tensors: the other one, on the CPU

    hidden (P, C, H): hidden states at the last C positions of every prompt, in the target's dtype
    draft_ids, draft_logits (P, K, S): columns of the head's logits, and the logits there, of the
        levels along facts["path"] (P rows of K tokens) from the last hidden state
    draft_logsumexp (P, K): over all columns
    NAME.score_ids, NAME.scores (n, M): behind each token of all rows, one row after the other: the
        M best tokens by the target's processed scores (noise included), and these
    NAME.nodes, NAME.parents, NAME.log_q (s, N): the drafted tree of each step of all rows
    with NAME one of facts["decodes"]. Numbers are float32 where nothing else is said, ids int32.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class Decoded:
    """What one decoding of a few rows did; lists are per row.

    accepted: drafted tokens emitted by each step
    scores: (n, V) processed scores behind each token; trees: per step (tokens, parents, log_q)
    """

    tokens: list[list[int]]
    finish: list[str]
    accepted: list[list[int]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    trees: list[list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=list)


class _Recorder(RecordingDrafter):
    """Keeps the tree of every step, too. trees: per row"""

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.trees: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in seqs.length]

    def observe(self, truth: Truth) -> None:
        steps = [len(row) for row in self.logits]
        super().observe(truth)
        if truth.tree is None:  # the prefill
            return
        tree = truth.tree
        for row, before in enumerate(steps):
            if len(self.logits[row]) > before:
                kept = (x[row].cpu().clone() for x in (tree.tokens, tree.parent, tree.log_q))
                self.trees[row].append(tuple(kept))


# ------------------------------------------------------------------------------- what is computed


def drafted_depth(head: DraftHead) -> int:
    """Levels of its drafts, of a head that can draft fewer than others too."""
    return min(DEPTH, head.max_depth or DEPTH)


def hidden_states(
    head: DraftHead, target: Target, prompts: Sequence[Sequence[int]], last: int
) -> Tensor:
    """(P, last, (1 + a) H), what the head reads: at the last positions of every prompt, each
    computed alone."""
    rows = [torch.tensor([prompt], device=target.device) for prompt in prompts]
    found = torch.cat([target.states(ids)[:, -last:] for ids in rows])
    return target.pick(found, head.aux_layers)


def draft_context(
    head: DraftHead,
    target: Target,
    hidden: Tensor,
    prompts: Sequence[Sequence[int]],
    path: Sequence[Sequence[int]],
) -> Tensor:
    """(P, H): c behind every prompt, from its last hidden states alone, (P, C, (1 + a) H). A head
    that reads the prefix is given rows that begin there, so that its layer is compared too."""
    if not head.reads_prefix:
        return head.contexts(target, hidden[:, -1])
    first = hidden.shape[1] - 1  # of each row's tokens, from the end of its prompt
    rows = zip(prompts, path, strict=True)
    follow = [[*prompt[len(prompt) - first :], drafted[0]] for prompt, drafted in rows]
    return head.contexts(target, hidden, torch.tensor(follow, device=target.device))[:, -1]


def draft_logits(
    head: DraftHead, target: Target, context: Tensor, path: Sequence[Sequence[int]]
) -> Tensor:
    """The head's logits along given paths. context: (P, H); path: P rows of K tokens.

    Returns (P, K, Vd); [:, k] is about depth k + 1.
    """
    head.round_while_drafting(False)
    tokens, context = torch.tensor(path, device=target.device), context[:, None]
    states, found = None, []
    for level, read in enumerate(tokens.unbind(1), start=1):
        states, logits = head.read(target, read[:, None], context, states, level)
        found.append(logits[:, 0])
    return torch.stack(found, 1)


def decode(
    head: DraftHead, target: Target, prompts: Sequence[Sequence[int]], how: dict[str, Any]
) -> Decoded:
    """Decode all prompts as one batch. how: `drafter`, `temperature`, `seed` (of the first prompt;
    the i-th has i more) and `max_new_tokens`."""
    config = generation_config(how["temperature"], how["max_new_tokens"])
    resources = Resources(head=head, tree=TreeConfig(rounded=False))  # numbers are compared
    recorder = _Recorder(build_drafter(how["drafter"], target, resources))
    seeds = [how["seed"] + i for i in range(len(prompts))]
    made = speculative(target, prompts, config, seeds=seeds, drafter=recorder)
    found = Decoded(made.tokens, made.finish, trees=recorder.trees)
    for prompt, tokens, logits, seed in zip(
        prompts, made.tokens, recorder.logits, seeds, strict=True
    ):
        found.accepted.append([len(step) - 1 for step in logits[1:]])
        found.scores.append(processed(target, prompt, tokens, torch.cat(logits), config, seed))
    return found


# ------------------------------------------------------------------------------- made and written


@torch.inference_mode()
def make_golden(
    folder: Path, target: Target, prompts: Sequence[Sequence[int]] | None = None
) -> Golden:
    """Compute the golden batch of the head in a folder; see `write_golden`."""
    head = load_head(folder, target)
    rows = choose_prompts(target, prompts)
    last = min(_POSITIONS, *map(len, rows))
    depth = drafted_depth(head)
    settings = {"drafter": f"head:{WIDTH}x{depth}", "max_new_tokens": NEW_TOKENS, "seed": 0}
    decodes = {"greedy": {**settings, "temperature": 0.0},
               "sampled": {**settings, "temperature": 1.0}}  # fmt: skip
    found = {name: decode(head, target, rows, how) for name, how in decodes.items()}
    for name, how in decodes.items():
        made = found[name]
        how |= {"tokens": made.tokens, "finish": made.finish, "accepted": made.accepted,
                "texts": text_of(target, made.tokens)}  # fmt: skip
    path = [(row + [row[-1]] * depth)[:depth] for row in found["greedy"].tokens]
    hidden = hidden_states(head, target, rows, last)
    context = draft_context(head, target, hidden, rows, path)
    tensors = {"hidden": hidden, **_sampled_logits(draft_logits(head, target, context, path))}
    for name, made in found.items():
        tensors |= {f"{name}.{key}": value for key, value in _numbers(made).items()}
    facts = {
        "format": FORMAT,
        "target": describe_target(target),
        "head": {"fingerprint": head.fingerprint(), "dtype": dtype_name(head.dtype)},
        "text": describe_text(target.tokenizer, rows),
        "prompts": rows,
        "path": path,
        "decodes": decodes,
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return Golden(facts, {k: v.cpu().contiguous() for k, v in tensors.items()})


def write_golden(
    folder: str | Path, target: Target, prompts: Sequence[Sequence[int]] | None = None
) -> None:
    """Make the golden batch of the head in a folder and write it there, replacing any other.

    target: the head's own, not sharded; prompts: token ids; some are taken (None: fixed texts)
    Raises InputError where the head is damaged or another target's.
    """
    folder = Path(folder)
    golden = make_golden(folder, target, prompts)
    remove_golden(folder)
    write_tensors(folder / NUMBERS, golden.tensors)
    facts = {**golden.facts, "files": digests(folder)}
    write_json(folder / FACTS, {**facts, "digest": digest_json(facts)})


def remove_golden(folder: Path) -> None:
    """The batch of another head says nothing of this one."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of what a head computes with, of what its users run, and of the golden numbers; other
    files (costs of a device, a lookahead, a model card) may come and go."""
    found = [file for pattern in (*FILES, NUMBERS) for file in sorted(folder.glob(pattern))]
    return {file.relative_to(folder).as_posix(): digest_file(file) for file in found}


def choose_prompts(
    target: Target, prompts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """A few prompts of different lengths; the first tokens of those that are very long."""
    if prompts:
        rows = [[int(token) for token in prompt] for prompt in prompts[:PROMPTS]]
    elif target.tokenizer is not None:
        rows = [encode(target.tokenizer, text) for text in _TEXTS]
    else:
        rows = [probe_tokens(target.vocab_size, n)[0].tolist() for n in (12, 5, 9, 16)]
    room = PROMPT_TOKENS
    if target.max_positions is not None:
        room = max(1, min(room, target.max_positions - NEW_TOKENS))
    return ragged([row[:room] for row in rows])


def describe_target(target: Target) -> dict[str, Any]:
    """What the target is, and how it computes; no folder of this machine. Weights and adapter are
    told apart from the tokenizer, which a fingerprint is not."""
    identity, parts, name = target_identity(target), target.digests(), str(target.name)
    local = Path(name).exists() or name.count("/") != 1
    return {
        "name": Path(name).name if local else name,
        "on_hub": not local,
        "weights": parts.base,
        "adapter": parts.adapter,
        "fingerprint": target.fingerprint(),
        "config": identity["config"],
        "eos": identity["eos"],
        "dtype": dtype_name(target.dtype),
        "attention": getattr(target.config, "_attn_implementation", None),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text_of(target: Target, rows: Sequence[Sequence[int]]) -> list[str] | None:
    """Every row's tokens as text, None without a tokenizer."""
    if target.tokenizer is None:
        return None
    return target.tokenizer.batch_decode(list(map(list, rows)), skip_special_tokens=False)


def _sampled_logits(logits: Tensor) -> dict[str, Tensor]:
    """The highest of (P, K, Vd) logits, some evenly spread ones, and the logsumexp of all."""
    n = logits.shape[-1]
    best = logits.topk(min(_BEST, n), dim=-1).indices
    spread = torch.arange(0, n, max(1, n // _SPREAD), device=logits.device)
    ids = torch.cat((best, spread.expand(*logits.shape[:2], -1)), -1)
    return {
        "draft_ids": ids.int(),
        "draft_logits": logits.gather(-1, ids).float(),
        "draft_logsumexp": logits.float().logsumexp(-1),
    }


def _numbers(made: Decoded) -> dict[str, Tensor]:
    """Scores and trees of all rows as tensors, see `Golden`."""
    scores = torch.cat(made.scores)
    best = scores.topk(min(_CANDIDATES, scores.shape[-1]), dim=-1)
    found = {"score_ids": best.indices.int(), "scores": best.values.float()}
    steps = [step for row in made.trees for step in row]
    for key, part in zip(("nodes", "parents", "log_q"), zip(*steps, strict=True), strict=False):
        found[key] = torch.stack(part).to(torch.float32 if key == "log_q" else torch.int32)
    return found


# ------------------------------------------------------------------------------- read back


def read_facts(folder: Path) -> dict[str, Any] | None:
    """golden.json of a folder, None where it is damaged. Raises InputError where there is none, or
    one of a later format."""
    file = folder / FACTS
    if not file.is_file():
        raise InputError(
            f"{folder} has no {FACTS}: this head was exported without a golden batch. Make one "
            f"where the head is known to be good: python eval/verify.py {folder} --target.path "
            "TARGET --write true"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        digest = facts.pop("digest")
    except (ValueError, KeyError, AttributeError):
        return None
    if digest != digest_json(facts):
        return None
    if facts["format"] != FORMAT:
        raise InputError(f"{file} has format {facts['format']}, this version reads {FORMAT}")
    return facts


def read_golden(folder: Path) -> Golden:
    """The batch in a folder whose files were found whole (`file_faults`)."""
    return Golden(read_facts(folder), load_file(folder / NUMBERS))


def file_faults(folder: Path, facts: dict[str, Any] | None) -> list[str]:
    """Files that are not those of the export, by name; empty where all are. facts: `read_facts`"""
    if facts is None:
        return [f"{FACTS} is damaged: its content is not what was written"]
    found, here = [], digests(folder)
    for name, digest in facts["files"].items():
        if name not in here:
            found.append(f"{name} is missing")
        elif here[name] != digest:
            found.append(
                f"{name} is not the file that was exported (sha256 {here[name][:12]} instead of "
                f"{digest[:12]})"
            )
    return found + [f"{name} was not exported" for name in here if name not in facts["files"]]
