"""`eval/lossless.py`, `eval/verify.py`, `eval/speed.py`, `eval/costs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import DraftingConfig, PromptFileConfig, TargetConfig, TreeConfig


@dataclass(frozen=True, kw_only=True)
class LosslessConfig(DraftingConfig, PromptFileConfig):
    """`eval/lossless.py`: does drafting change a token?"""

    methods: str = "head"
    """Ways of drafting, comma-separated; `--list` prints all of them, with their options."""
    batch_sizes: str = "1,4"
    """Rows per speculative batch, comma-separated; the reference is always a row alone."""
    temperatures: str = "1"
    """Temperatures of the seeded modes, comma-separated; greedy is always run."""
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


@dataclass(frozen=True, kw_only=True)
class CostsConfig(PromptFileConfig):
    """`eval/costs.py`: what forwards of n new tokens and drafted levels cost on this device."""

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
    max_new_tokens: int = 128
    """Of a plain answer, in tokens."""
    plot: str | None = None
    """Draw the map of `slowdown` to PLOT.png and PLOT.svg; needs matplotlib."""
    allow_other_target: bool | Literal["merged"] = False
    """Accept a head that was trained for another target: `merged` one that computes the same, as a
    merged copy of base and adapter does (compared on fixed tokens), `true` any."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(DraftingConfig, PromptFileConfig):
    """`eval/speed.py`: ways of decoding compared on the same prompts."""

    methods: str = "stock,plain,head"
    """Ways of decoding, comma-separated; `--list` prints all of them, with their options."""
    max_new_tokens: int = 128
    """Per prompt, the same for every method."""
    temperature: float = 0.0
    """0 is greedy."""
    batch_size: int = 1
    """Prompts decoded at a time."""
    samples_per_prompt: int = 1
    """Rows of every prompt, each with a seed of its own, in the same batch: they draft for each
    other by the method `consensus`."""
    repeats: int = 1
    """Times that every prompt is run by every method; the median counts."""
    ignore_eos: bool = False
    """Always generate max_new_tokens."""
    cost_rounds: int = 60
    """Measurements of each forward and drafted level, for the bound."""
    out: str | None = None
    """JSON file to write."""
