#!/usr/bin/env python
"""Train a small Llama, with the target's own tokenizer, as a draft model for that target.

A draft model of another family has another vocabulary and cannot draft. This one is made for its
target: random weights learn the target's distribution (teacher forced, the target runs along) on
the target's own answers, or on any rows that data/prepare.py --keep texts has made. The result is
a Hugging Face folder with the tokenizer beside it, for eval/speed.py --methods model --draft.

  python scripts/make_draft_model.py --target.path MODEL --stores '["runs/answers"]' --heldout
  '["runs/heldout-answers"]' --output_dir runs/draft --loss '{"kl": 0.9, "cross_entropy": 0.1}'

One forward of the draft model is paid per drafted token: a fifth of the target's or less is a good
start; the last line says what it came to. With --loss '{"cross_entropy": 1}' the target does not
run along: a step is cheap, and learns less of each token. Held-out answers should be of prompts
that no store in --stores has. Two numbers tell what the draft is worth: `greedy`, how often both
models find the same token likeliest, and `overlap`, sum_v min(p, q), which is one minus the total
variation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from redrafter import threads

threads.wait_asleep()  # torch reads it when it is imported

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from redrafter.bars import Bar
from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import OptimConfig, TargetConfig
from redrafter.config.common import at_least
from redrafter.contracts import InputError
from redrafter.costs import CostMeter
from redrafter.data.answers import check_same_text
from redrafter.data.rows import Rows, batches_by_length, offsets_of, right_padded
from redrafter.data.store import Store
from redrafter.files import new_folder, plain_values, provenance, write_json
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.training.loop import learning_rate, make_optimizer
from redrafter.training.losses import SOFT, acceptance, kl, mixed

_SORTED_ROWS = 512  # rows that are batched by length together
_COST_CONTEXT, _COST_ROUNDS = 128, 40


@dataclass(frozen=True)
class DraftModelConfig:
    """A new draft model, its data and its training."""

    target: TargetConfig
    """The frozen language model to imitate."""
    stores: tuple[str, ...]
    """Folders of answers (data/answers.py) or texts (data/prepare.py --keep texts)."""
    output_dir: str
    """Folder for the draft model; replaced whole at every save."""
    heldout: tuple[str, ...] = ()
    """Folders of answers to other prompts, to measure on."""
    hidden: int = 128
    """Width of the model."""
    layers: int = 2
    """Layers; each costs a forward more than its arithmetic where models are small."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Heads of keys and values; none takes as many as `heads`."""
    intermediate: int | None = None
    """Width inside the MLP; none is twice `hidden`."""
    tied: bool = True
    """One matrix for embedding and lm_head."""
    loss: dict[str, float] = field(default_factory=lambda: {"kl": 1.0})
    """Weights of losses: kl (the target's whole distribution), cross_entropy (the stored tokens),
    and the others of redrafter/training/losses.py."""
    steps: int = 3000
    """Optimiser steps."""
    batch_tokens: int = 2048
    """Tokens per step, padding counted."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; linear warm-up, then a cosine to zero."""
    warmup_steps: int = 100
    """Steps of warm-up."""
    weight_decay: float = 0.05
    """AdamW's decay of matrices."""
    eval_steps: int = 500
    """Steps between measurements; one is always made at the end."""
    save_steps: int = 1000
    """Steps between saves; one is always made at the end."""
    heldout_rows: int = 64
    """Rows of each held-out store that are measured, from its front."""
    seed: int = 0
    """Fixes initial weights and the order of the data."""
    threads: int | None = None
    """CPU threads of torch; none leaves its own choice."""

    def __post_init__(self) -> None:
        names = ("hidden", "layers", "heads", "kv_heads", "intermediate", "steps", "batch_tokens")
        at_least(1, self, *names, "eval_steps", "save_steps", "heldout_rows", "threads")
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden: {self.hidden} must be an even number for each of {self.heads} heads"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads: {self.kv_heads} must divide heads, {self.heads}")
        known = {"cross_entropy", *SOFT}
        if set(self.loss) - known or not any(w > 0 for w in self.loss.values()):
            raise ValueError(f"loss: {self.loss} must give weights to some of {sorted(known)}")


def new_model(config: DraftModelConfig, target: Target) -> LlamaForCausalLM:
    """Random weights; the target's vocabulary, special tokens and context."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    shape = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate or 2 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=target.max_positions or 4096,
        tie_word_embeddings=config.tied,
        **{name: getattr(target.config, name, None) for name in special},
    )
    return LlamaForCausalLM(shape).to(target.device)


def read_rows(path: str, target: Target, n: int | None = None) -> Rows:
    """Tokens and masks of a store's first n rows, those without a token to learn from left out.
    Raises InputError where it is another tokenizer's, or where nothing is left."""
    store = Store(path)
    check_same_text(store, target)
    useful = store.starts[:, 0].nonzero()[:, 0]
    if not len(useful):
        raise InputError(
            f"{path} holds {store.identity['kind']} without a token to learn from: give answers "
            "(data/answers.py) or texts (data/prepare.py --keep texts)"
        )
    return store.rows(useful[:n])


def joined(parts: Sequence[Rows]) -> Rows:
    """One after the other."""
    offsets = offsets_of(torch.cat([part.lengths() for part in parts]))
    tokens = torch.cat([part.tokens for part in parts])
    return Rows(tokens, torch.cat([part.supervised for part in parts]), offsets)


def batches(rows: Rows, batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Numbers of the rows of each batch, epoch after epoch, rows of similar length together."""
    random, lengths = torch.Generator().manual_seed(seed), rows.lengths()
    while True:
        order = torch.randperm(rows.n_rows, generator=random)
        for some in order.split(_SORTED_ROWS):
            found = list(batches_by_length(lengths, some.tolist(), batch_tokens))
            for i in torch.randperm(len(found), generator=random).tolist():
                yield found[i]


def both_logits(
    model: LlamaForCausalLM, target: Target, rows: Rows, chosen: list[int], taught: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """At each position of a batch whose next token is supervised: the draft model's logits and
    log p of the target, both (S, V), and that next token (S,).

    taught: False leaves log p out, which is all that the target computes
    """
    tokens, _ = right_padded(rows, chosen)
    masks = [rows.supervised[rows.offsets[r] : rows.offsets[r + 1]] for r in chosen]
    learned = pad_sequence(masks, batch_first=True)[:, 1:]  # padding is never supervised
    tokens, learned = tokens.to(target.device), learned.to(target.device)
    log_p = None
    if taught:
        with torch.no_grad():
            states = target.states(tokens[:, :-1])[learned]
            log_p = target.project(states).float().log_softmax(-1)
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[learned]
    return model.lm_head(hidden), log_p, tokens[:, 1:][learned]


def measure(model: LlamaForCausalLM, target: Target, rows: Rows, batch_tokens: int) -> dict:
    """`greedy`, `overlap` and `kl` (nats), means over the supervised tokens."""
    total, n = torch.zeros(3), 0
    for chosen in batches_by_length(rows.lengths(), range(rows.n_rows), batch_tokens):
        with torch.no_grad():
            logits, log_p, _ = both_logits(model, target, rows, chosen)
            agree = logits.argmax(-1) == log_p.argmax(-1)
            found = (agree, acceptance(logits, log_p), kl(logits, log_p))
            total += torch.stack([x.float().sum() for x in found]).cpu()
        n += len(logits)
    return dict(zip(("greedy", "overlap", "kl"), (total / n).tolist(), strict=True))


def train(config: DraftModelConfig) -> dict[str, Any]:
    """Train, save, and return what was measured last, by held-out store."""
    threads.settle(config.threads)
    target = load_target(config.target)
    rows = joined([read_rows(path, target) for path in config.stores])
    heldout = {path: read_rows(path, target, config.heldout_rows) for path in config.heldout}
    torch.manual_seed(config.seed)
    model = new_model(config, target)
    optim = OptimConfig(
        steps=config.steps, lr=config.lr, warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    optimizer, order = make_optimizer(model, optim), batches(rows, config.batch_tokens, config.seed)
    taught = any(weight for name, weight in config.loss.items() if name in SOFT)
    found: dict[str, Any] = {}
    with Bar(total=config.steps, desc="draft model", unit="step") as bar:
        for step in range(config.steps):
            logits, log_p, labels = both_logits(model, target, rows, next(order), taught)
            loss = mixed(config.loss, logits, labels, log_p).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, step)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            done, last = step + 1, step + 1 == config.steps
            if done % 20 == 0 or last:
                now = loss.item()
                if not math.isfinite(now):
                    raise InputError(f"the loss became {now} at step {done}: lower lr")
                bar.set_postfix(loss=f"{now:.3f}", refresh=False)
            if last or done % config.eval_steps == 0:
                found = {path: measure(model, target, held, config.batch_tokens)
                         for path, held in heldout.items()}  # fmt: skip
                for path, numbers in found.items():
                    shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
                    bar.write(f"step {done}, {path}: {shown}", file=sys.stdout)
            if last or done % config.save_steps == 0:
                save(config, model, target, {"step": done, "heldout": found})
    print(cost_line(model, target))
    return found


def save(config: DraftModelConfig, model: LlamaForCausalLM, target: Target, facts: dict) -> None:
    """Replace the output folder in one step: weights, configuration, tokenizer, provenance."""
    with new_folder(config.output_dir) as folder:
        model.save_pretrained(folder)
        if target.tokenizer is not None:
            target.tokenizer.save_pretrained(folder)
        about = {"config": plain_values(config), "target_fingerprint": target.fingerprint()}
        write_json(folder / "provenance.json", provenance(**about, **facts))


def cost_line(model: LlamaForCausalLM, target: Target) -> str:
    """Milliseconds of one token's forward, the two models in turn."""
    context = min(_COST_CONTEXT, (target.max_positions or _COST_CONTEXT * 2) // 2)
    both = (Target(model), target)
    meters = [CostMeter(t, new_tokens=(1,), contexts=(context,)) for t in both]
    for _ in range(_COST_ROUNDS):
        for meter in meters:
            meter.round()
    draft, whole = (1e3 * meter.table().t(1, context, 1) for meter in meters)
    n = sum(p.numel() for p in model.parameters())
    return (
        f"{n:,} weights; one token's forward: draft model {draft:.2f} ms, target {whole:.2f} ms "
        f"({draft / whole:.0%})"
    )


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(DraftModelConfig, argv, "scripts/make_draft_model.py", __doc__)
    train(config)
    print(f"{config.output_dir}: a draft model of {config.target.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
