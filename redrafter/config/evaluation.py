"""`eval/lossless.py`, `eval/verify.py`, `eval/speed.py`, `eval/costs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import PromptFormat, TargetConfig, TreeConfig


@dataclass(frozen=True, kw_only=True)
class PartnersConfig:
    """What drafters are made from; each is asked for where a method needs it."""

    head: str | None = None
    """Folder or Hub id of a trained draft head: ours, Apple's ReDrafter, or IBM's or Arctic's
    mlp_speculator."""
    tree: TreeConfig = TreeConfig()
    """Of the drafter `head` without a size."""
    draft: str | None = None
    """Folder or Hub id of a smaller model with the target's vocabulary."""
    bigrams: str | None = None
    """Counted bigrams: a table made by data/bigrams.py, here or on the Hub, or a folder or URL of
    answers, texts or states to count on."""
    probed: str | None = None
    """Bigrams probed from the target: a table made by data/probe.py, here or on the Hub."""
    reference: str | None = None
    """Folder or URL of answers, texts or states that `suffix:reference=true` copies from."""
    allow_other_target: bool | Literal["merged"] = False
    """Accept a head that was trained for another target: `merged` one that computes the same, as a
    merged copy of base and adapter does (compared on fixed tokens), `true` any."""


@dataclass(frozen=True, kw_only=True)
class DraftingConfig(PartnersConfig):
    """The same where drafters are measured on prompts."""

    bigram_prompts: int = 64
    """Rows before the evaluated ones whose plain answers are counted where `bigrams` is None."""


@dataclass(frozen=True)
class LosslessConfig(DraftingConfig):
    """`eval/lossless.py`: does drafting change a token?"""

    target: TargetConfig
    prompts: str
    """JSON-lines file of prompts (.jsonl or .jsonl.gz); rows are taken from its end."""
    n_prompts: int = 30
    """Rows to use, from the end of the file."""
    prompt_format: PromptFormat = "auto"
    """What a row holds; `auto` looks at the keys of the first one."""
    prompt_column: str | None = None
    """For rows of other keys: the column of the user's message."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    methods: str = "head"
    """Ways of drafting, comma-separated; all of them, with their options, stand below."""
    max_new_tokens: int = 128
    """Per prompt."""
    batch_sizes: str = "1,4"
    """Rows per speculative batch, comma-separated; the reference is always a row alone."""
    temperatures: str = "1"
    """Temperatures of the seeded modes, comma-separated; greedy is always run."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else what is faster here: one, or all."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class VerifyConfig:
    """`eval/verify.py`: does a head compute here what it did when it was exported?"""

    head: str
    """Folder or Hub id of an exported head; `--head` itself may be left out."""
    target: TargetConfig = TargetConfig(path="")
    """Its path may be left out where the export tells of a Hub id or of a folder that is here;
    the dtype `auto` is that of the golden batch."""
    write: bool = False
    """Make the golden batch, for a head that was exported without one; nothing is compared."""
    prompts: str | None = None
    """For `write`: JSON-lines file of prompts; a few rows of its end are taken. None takes fixed
    texts."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class CostsConfig:
    """`eval/costs.py`: what forwards of n new tokens and drafted levels cost on this device."""

    target: TargetConfig
    head: str | None = None
    """Folder of a trained draft head; without head and draft the target alone is measured."""
    tree: TreeConfig = TreeConfig()
    """Of the head, where `drafters` names none."""
    draft: str | None = None
    """Folder or Hub id of a smaller model with the target's vocabulary."""
    drafters: str | None = None
    """What to measure of head and draft, comma-separated, e.g. `head:2x8,head:4x8,model:1x8`; None
    is the head with `tree`, and the draft model as a chain of `tree.depth`."""
    profile: bool = False
    """Keep the result in the folder of head and draft, as the profile of this device; whole steps
    of decoding are then measured too."""
    new_tokens: str = "1,2,3,5,9,17,25,33,41"
    """n, new tokens per row and forward, comma-separated."""
    contexts: str = "64,256"
    """Tokens per row already in the cache, comma-separated."""
    batch_sizes: str = "1,4"
    """Rows per forward, comma-separated."""
    rounds: int = 30
    """Measurements of everything, one after the other in turn."""
    temperature: float = 0.0
    """Above 0 the drafter is given noise to propose with."""
    slowdown: str | None = None
    """Rows and lengths, as `1,5,10x2,4,8`: what verifying k rows of w guesses costs beside one new
    token, as a batch of k rows (N-Grammys) and as one tree of as many nodes."""
    ngrammys: str | None = None
    """For `slowdown`: a table made by data/probe.py or data/bigrams.py, or a store to count on.
    Walks the drafter over plain answers to `prompts` and recommends k and w."""
    prompts: str | None = None
    """For `ngrammys`: JSON-lines file of prompts; rows are taken from its end."""
    n_prompts: int = 20
    """Rows to use, from the end of the file."""
    prompt_format: PromptFormat = "auto"
    """What a row holds; `auto` looks at the keys of the first one."""
    prompt_column: str | None = None
    """For rows of other keys: the column of the user's message."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    max_new_tokens: int = 128
    """Of a plain answer, in tokens."""
    plot: str | None = None
    """Draw the map of `slowdown` to PLOT.png and PLOT.svg; needs matplotlib."""
    allow_other_target: bool | Literal["merged"] = False
    """Accept a head that was trained for another target: `merged` one that computes the same, as a
    merged copy of base and adapter does (compared on fixed tokens), `true` any."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else what is faster here: one, or all."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class SpeedConfig(DraftingConfig):
    """`eval/speed.py`: ways of decoding compared on the same prompts."""

    target: TargetConfig
    prompts: str
    """JSON-lines file of prompts (.jsonl or .jsonl.gz); rows are taken from its end."""
    n_prompts: int = 30
    """Rows to use, from the end of the file."""
    prompt_format: PromptFormat = "auto"
    """What a row holds; `auto` looks at the keys of the first one."""
    prompt_column: str | None = None
    """For rows of other keys: the column of the user's message."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    methods: str = "stock,plain,head"
    """Ways of decoding, comma-separated; all of them, with their options, stand below."""
    max_new_tokens: int = 128
    """Per prompt, the same for every method."""
    temperature: float = 0.0
    """0 is greedy."""
    batch_size: int = 1
    """Rows decoded at a time."""
    repeats: int = 1
    """Times that every prompt is run by every method; the median counts."""
    ignore_eos: bool = False
    """Always generate max_new_tokens."""
    cost_rounds: int = 60
    """Measurements of each forward and drafted level, for the bound."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else what is faster here: one, or all."""
    out: str | None = None
    """JSON file to write."""
