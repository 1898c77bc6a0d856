#!/usr/bin/env python
"""Train a very small language model, as a target to try things on.

No download is needed. `--size quickstart` learns small word problems that are made up by rule
(word_problems.py), and answers new ones; `--size test` learns Python's own standard library, which
every installation carries. The result is an ordinary Hugging Face folder (Llama, byte-level BPE
tokenizer, chat template). Two prompt files lie in it: prompts_train.jsonl (what the model was
trained on, for training heads) and prompts_heldout.jsonl (what it never saw), with rows of
{"question": ..., "answer": ...}, or {"text": ...} cut from disjoint source files.

Random weights would not do in its place: a draft head learns nothing from them. This model's next
token can often be guessed, and it is good for nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny_corpora import Corpus, cut_up, made_up, read_sources

from redrafter.cli.args import reports_input_errors
from redrafter.processes import name_the_cpu
from redrafter.threads import settle, wait_asleep

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MANIFEST = "tiny_target.json"
PROMPT_FILES = {"train": "prompts_train.jsonl", "heldout": "prompts_heldout.jsonl"}
#: Raised when a change to this file changes what it makes, so that old results are made again.
RECIPE = 2
BOS, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1; BOS is EOS too, as in GPT-2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}# {{ m['content'] | trim }}\n"
    "{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
LOOP_PROMPTS, LOOP_PROMPT_TOKENS, LOOP_NEW_TOKENS = 16, 64, 128


@dataclass(frozen=True)
class Size:
    """Model shape and training length of one --size."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    context_tokens: int
    batch_rows: int
    steps: int
    lr: float
    """Peak learning rate of the weight matrices (Muon)."""
    lr_other: float
    """Peak learning rate of the embedding and the norms (Adam)."""
    corpus_chars: int
    """Text to learn from at most."""
    text: Literal["problems", "sources"]
    """Word problems, or the standard library's sources."""


SIZES = {
    "quickstart": Size(
        vocab=512, width=128, layers=3, heads=4, kv_heads=2, ffn=384, context_tokens=256,
        batch_rows=4, steps=300, lr=0.02, lr_other=4e-3, corpus_chars=2_000_000, text="problems",
    ),
    "test": Size(
        vocab=512, width=64, layers=2, heads=4, kv_heads=2, ffn=176, context_tokens=512,
        batch_rows=2, steps=120, lr=0.03, lr_other=8e-3, corpus_chars=1_500_000, text="sources",
    ),
}  # fmt: skip


# ---------------------------------------------------------------- prompts


def write_prompts(folder: Path, prompts: dict[str, list[dict[str, str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in prompts.items():
        partial = folder / f"{PROMPT_FILES[split]}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        partial.replace(folder / PROMPT_FILES[split])


# ---------------------------------------------------------------- tokens


def train_tokenizer(texts: list[str], size: Size) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=size.context_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> torch.Tensor:
    """(rows, length) int64: BOS, then consecutive tokens of one file from the start of a line on,
    as prompts look too. A file's last, incomplete row is dropped."""
    import torch

    rows = []
    for text in texts:
        # The backend itself, because the wrapper warns of every file longer than the context.
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids, starts = encoded.ids, [start for start, _ in encoded.offsets]
        i = 0
        while i + length - 1 <= len(ids):
            rows.append([0, *ids[i : i + length - 1]])
            i += length - 1
            while i < len(ids) and text[starts[i] - 1] != "\n" and text[starts[i]] != "\n":
                i += 1
    return torch.tensor(rows)


def packed_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> torch.Tensor:
    """(rows, length) int64: short texts one behind the other, BOS, which is EOS too, before each. A
    row begins with a text, and its last one is cut."""
    import torch

    rows, row = [], []
    for text in texts:
        row += [0, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows)


# ---------------------------------------------------------------- training


def new_model(size: Size) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    # Every layer begins as the identity, which saves the first steps.
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def row_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of every token after the first, nats."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps with the coefficients of
    Muon (Jordan et al., 2024). Muon needs about half the steps of Adam here."""
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:  # the product below is then the small one
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x) * max(1.0, update.shape[0] / update.shape[1]) ** 0.5


def train(model: LlamaForCausalLM, rows: torch.Tensor, size: Size, seed: int) -> None:
    """Mutates `model`. Passes over `rows` in a new order each time round."""
    import torch

    from redrafter.bars import Bar

    layers = set(model.model.layers.parameters())
    matrices = [p for p in model.parameters() if p in layers and p.ndim == 2]
    others = [p for p in model.parameters() if not (p in layers and p.ndim == 2)]
    momentum = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.AdamW(others, lr=size.lr_other, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    progress = Bar(range(size.steps), desc="training", unit="step")
    for step in progress:
        if len(queue) < size.batch_rows:
            queue = torch.randperm(len(rows), generator=generator).tolist()
        batch, queue = queue[: size.batch_rows], queue[size.batch_rows :]
        loss = row_loss(model, rows[batch])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / 20, (size.steps - step) / (0.6 * size.steps))
        adam.param_groups[0]["lr"] = size.lr_other * scale
        adam.step()
        with torch.no_grad():
            for matrix, velocity in zip(matrices, momentum, strict=True):
                velocity.mul_(0.95).add_(matrix.grad)
                step_direction = orthogonalised(matrix.grad + 0.95 * velocity)
                matrix.mul_(1 - 0.1 * size.lr * scale).sub_(step_direction, alpha=size.lr * scale)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")


# ---------------------------------------------------------------- what came out


def measure(model: LlamaForCausalLM, rows: torch.Tensor) -> dict[str, float]:
    """On held-out rows: the loss, and how much greedy text repeats itself."""
    import torch

    from redrafter.evaluation.figures import loop_share

    model.eval()
    rows = rows[torch.linspace(0, len(rows) - 1, min(48, len(rows))).long()]
    tokens = rows[:, 1:].flatten().tolist()
    counts = Counter(tokens)
    prompts = rows[:LOOP_PROMPTS, :LOOP_PROMPT_TOKENS]
    with torch.inference_mode():
        loss = sum(row_loss(model, row[None]).item() for row in rows) / len(rows)
        greedy = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=LOOP_NEW_TOKENS,
            do_sample=False,
        )[:, LOOP_PROMPT_TOKENS:]
    answers = [[t for t in row if t > 1] for row in greedy.tolist()]
    natural = rows[:LOOP_PROMPTS, LOOP_PROMPT_TOKENS:][:, :LOOP_NEW_TOKENS].tolist()
    return {
        "loss_heldout_nats": round(loss, 4),
        "unigram_entropy_nats": round(
            -sum(n * log(n / len(tokens)) for n in counts.values()) / len(tokens), 4
        ),
        "loop_share_greedy": round(loop_share([([], a) for a in answers]) or 0.0, 4),
        "loop_share_real_text": round(loop_share([([], a) for a in natural]) or 0.0, 4),
    }


# ---------------------------------------------------------------- command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python scripts/make_tiny_target.py --output_dir quickstart/target\n"
        "  python scripts/make_tiny_target.py --output_dir /tmp/t --size test   (seconds, worse)\n",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder to make; an identical earlier result is kept, another one of this script is "
        "replaced, anything else is an error",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="quickstart",
        help="quickstart: about a minute on two cores; test: under half a minute "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument(
        "--prompts", type=Path, help="folder for the two prompt files (default: the output folder)"
    )
    return parser.parse_args(argv)


def earlier_identity(folder: Path) -> dict | None:
    """What the folder was made from; None if there is no folder. Refuses to touch other things."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return json.loads((folder / MANIFEST).read_text())["identity"]
    except (OSError, ValueError, KeyError):
        raise SystemExit(
            f"error: {folder} exists and was not made by this script (no readable {MANIFEST} in "
            "it). Choose another --output_dir, or remove the folder yourself."
        ) from None


def make(partial: Path, corpus: Corpus, identity: dict, size: Size, seed: int) -> dict:
    """Writes model, tokenizer and manifest into the folder `partial`. Returns the manifest."""
    started = time.perf_counter()
    print("importing torch and transformers", flush=True)
    import torch

    name_the_cpu()
    import transformers

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(corpus.texts["train"], size)
    in_rows = packed_rows if size.text == "problems" else token_rows
    rows, heldout_rows = (
        in_rows(tokenizer, corpus.texts[split], size.context_tokens) for split in PROMPT_FILES
    )
    model = new_model(size)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{rows.numel() / 1e6:.2f} M tokens of text, "
        f"{size.steps * size.batch_rows * size.context_tokens / 1e6:.2f} M to train on",
        flush=True,
    )
    train(model, rows, size, seed)
    results = measure(model, heldout_rows)
    model.generation_config.do_sample = False
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    manifest = {
        "identity": identity,
        "results": {**results, "seconds": round(time.perf_counter() - started, 1)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "files": corpus.files,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


@reports_input_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    wait_asleep()
    size, folder = SIZES[args.size], args.output_dir
    prompts = args.prompts or folder
    if size.text == "problems":
        corpus = made_up(size.corpus_chars, args.seed)
        read = corpus.texts
    else:
        read = read_sources(size.corpus_chars)
    digest = hashlib.sha256(json.dumps(read).encode()).hexdigest()
    # Through JSON, so that it compares equal to what is read back.
    identity = json.loads(
        json.dumps({"recipe": RECIPE, "seed": args.seed, "corpus": digest, **asdict(size)})
    )
    before = earlier_identity(folder)
    if before == identity and all((prompts / name).exists() for name in PROMPT_FILES.values()):
        print(f"{folder}: made earlier from the same text and settings, nothing to do")
        return 0

    if size.text == "sources":
        corpus = cut_up(read, args.seed)
    if before != identity:
        settle()
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            manifest = make(partial, corpus, identity, size, args.seed)
            if prompts == folder:
                write_prompts(partial, corpus.prompts)
            if folder.exists():
                shutil.rmtree(folder)  # ours or empty, see earlier_identity
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for name, value in manifest["results"].items():
            print(f"  {name}: {value}")
    if not all((prompts / name).exists() for name in PROMPT_FILES.values()) or prompts != folder:
        write_prompts(prompts, corpus.prompts)
    print(f"model: {folder}\nprompts: {' '.join(str(prompts / n) for n in PROMPT_FILES.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
