"""`data/lookahead.py` and `train/disco.py`."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter.config.common import DraftingConfig, PromptFileConfig


@dataclass(frozen=True, kw_only=True)
class RecordsConfig(DraftingConfig, PromptFileConfig):
    """`data/lookahead.py`: what a drafter says at every place of the target's own answers."""

    drafter: str
    """Name of the drafter with its options, drafting as many levels as a lookahead may ask for."""
    out: str
    """Folder to write the records to; the same command goes on after an interruption."""
    n_prompts: int = 400
    """Rows to walk over."""
    skip_rows: int = 100
    """Rows at the end of the file that are left out: what eval/ measures on."""
    max_new_tokens: int = 64
    """Of an answer."""
    temperature: float = 0.0
    """0 is greedy; else that of the decoding that the lookahead is for."""
    seed: int = 0
    """The prompt in row i of the file samples with seed + i."""
    batch_size: int = 10
    """Texts walked at a time."""
    shard_prompts: int = 100
    """Prompts per file; a kill loses the one being made."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""


@dataclass(frozen=True)
class DiscoTrainConfig:
    """`train/disco.py`: a lookahead from records."""

    records: str
    """Folder made by data/lookahead.py. Its last `validation_prompts` rows validate, choose the
    threshold and lambda; the others train."""
    costs: str
    """JSON of eval/costs.py for the same drafter on the device that will draft; a profile in a
    head's folder is one."""
    out: str
    """Folder to write; HEAD/disco is found by `lookahead=disco` beside its head."""
    features: list[str] | None = None
    """Which of the drafter's features to read. None: those that cost nothing (of models and heads
    `drafters.features.SURE`, of copies `drafters.lookup.SURE_OF_COPIES`), of others all."""
    context: bool = False
    """Read the target's chance of the root too: what there is to know where it decides once per
    step (when=step). Level by level it tells less than it costs."""
    validation_prompts: int = 100
    """Prompts kept from training."""
    hidden: int = 32
    """Width of the network's one hidden layer."""
    rollouts: int = 3
    """Passes of random policies over each text; see `records.fit.examples`."""
    batch_size: int = 1024
    """Moments per step of the optimiser, each with all levels."""
    learning_rate: float = 1e-2
    """At first; it falls to zero along half a cosine."""
    weight_decay: float = 1e-2
    epochs: int = 40
    """At most."""
    patience_epochs: int = 10
    """Stop after so many without a smaller validation loss."""
    seed: int = 0
