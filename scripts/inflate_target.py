#!/usr/bin/env python
"""Write a model of any larger shape that computes what a small one computes.

Its forwards cost what the large shape costs on a device, and its texts, and so what is accepted of
drafts, are those of the small model: real costs beside real acceptance, where no large model can be
had. Zeros are padded on; norms, rotations and scores are scaled so that the logits stay the same up
to rounding (redrafter/targets/inflation.py says how). Every report on such a model says "inflated".

  python scripts/inflate_target.py --target.path MODEL --like configs/plan/llama-3.1-8b
      --dtype bfloat16 --out runs/inflated-8b --head runs/head --head_out runs/inflated-8b-head
  python scripts/inflate_target.py --target.path MODEL --hidden_size 768 --num_hidden_layers 12
      --num_attention_heads 16 --num_key_value_heads 4 --intermediate_size 2048 --out runs/wide

Sizes that neither --like nor an option names stay what they are; the vocabulary always does. Known
are models of the types llama, mistral, qwen2 and qwen3.

A draft head belongs to the width of its target's hidden states, and to its weights: --head writes
the head of the small target as one of the large, padded alike and as much wider (a recurrent head;
others are refused). What holds no hidden states goes with both as it is: suffix, lookup, counted
bigrams, and a draft model of the same vocabulary. What was measured on the small model, a cost
profile or a trained lookahead beside its head, does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from redrafter import threads
from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import TargetConfig
from redrafter.config.common import at_least
from redrafter.export.inflated import empty_folder, weights_bytes, write_head, write_target
from redrafter.fetch import fetch
from redrafter.heads.load import load_trainable
from redrafter.targets.adapters import probe_tokens
from redrafter.targets.inflation import Shape, said
from redrafter.targets.load import load_model_config, load_target
from redrafter.targets.model import Target

_TOKENS = 16  # that both models are compared on
_SAME = 0.05  # relative error of logits that rounding to bfloat16 in every layer may come to


@dataclass(frozen=True)
class InflateConfig:
    """A small model, a larger shape, and where to write."""

    target: TargetConfig
    """The small model."""
    out: str
    """Folder to write; it must not exist, or be empty."""
    like: str | None = None
    """Folder (a config.json is enough) or Hub id of a model whose sizes to take."""
    hidden_size: int | None = None
    """Width of the hidden states; this and the following sizes win over `like`."""
    num_hidden_layers: int | None = None
    """Layers."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key-value heads."""
    head_dim: int | None = None
    """Width of a head; not hidden_size / num_attention_heads by itself."""
    intermediate_size: int | None = None
    """Width inside the MLP."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights that are written; none is what the small model is stored in."""
    head: str | None = None
    """Folder or Hub id of a recurrent head of the small model, to write as one of the large."""
    head_out: str | None = None
    """Folder to write it to."""
    check: bool = True
    """Load what was written and compare its logits with the small model's; `head` needs it."""
    threads: int | None = None
    """CPU threads of torch; none leaves its own choice."""

    def __post_init__(self) -> None:
        at_least(1, self, "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "intermediate_size", "threads")  # fmt: skip
        if (self.head is None) != (self.head_out is None):
            raise ValueError("head, head_out: give both, or none")
        if self.head is not None and not self.check:
            raise ValueError("check: false, but head needs the written model to be loaded")


def wanted_shape(config: InflateConfig, old: Shape) -> Shape:
    """The sizes asked for."""
    base = old
    if config.like is not None:
        other = replace(config.target, path=config.like, gguf_file=None, revision=None, base=None)
        base = Shape.of(load_model_config(other).get_text_config())
    own = {name: getattr(config, name) for name in asdict(old)}
    return replace(base, **{name: value for name, value in own.items() if value is not None})


def inflate(config: InflateConfig) -> int:
    """Write it, say what was written, and return the exit status: 1 if it computes otherwise."""
    threads.settle(config.threads)
    out = empty_folder("out", config.out)
    head_out = None if config.head_out is None else empty_folder("head_out", config.head_out)
    stored = load_model_config(config.target)
    new = wanted_shape(config, Shape.of(stored.get_text_config()))
    dtype = getattr(torch, config.dtype) if config.dtype else (stored.dtype or torch.float32)
    weights, size = weights_bytes(stored.get_text_config(), new, config.target.path, dtype)
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(new).items())
    print(
        f"{out}: {weights:,} weights, {size / 1e9:.2f} GB in {str(dtype)[6:]}: {sizes}", flush=True
    )
    small = load_target(replace(config.target, device="cpu"))
    head = None
    if config.head is not None:
        head = load_trainable(fetch(config.head, "head"), small)
    write_target(small, new, out, dtype)
    if not config.check:
        return 0
    large = load_target(replace(TargetConfig(path=str(out)), device=config.target.device))
    print(f"{out}: {said(large.config)}")
    error = difference(small, large)
    if error > _SAME:
        print(f"{out}: its logits differ by {error:.1%} from the small model's", file=sys.stderr)
        return 1
    print(f"on {_TOKENS} fixed tokens its logits are the small model's up to {error:.2g} of them")
    if head is not None:
        for told in write_head(head, large, head_out):
            print(told)
        print(f"{head_out}: the head {config.head}, for {out}")
    return 0


@torch.inference_mode()
def difference(small: Target, large: Target) -> float:
    """Relative error (L2) of the large model's logits on fixed tokens."""
    ids = probe_tokens(small.vocab_size, min(_TOKENS, small.max_positions or _TOKENS))
    each = [t.project(t.states(ids.to(t.device))).double().cpu() for t in (small, large)]
    return float((each[1] - each[0]).norm() / each[0].norm())


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(InflateConfig, argv, "scripts/inflate_target.py", __doc__, alone=True)
    return inflate(config)


if __name__ == "__main__":
    sys.exit(main())
