"""Every configuration dataclass, and the one way they are read: YAML, then `--section.key value`.

Unknown keys and wrong types are errors that name the key (jsonargparse). `None` means off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True)
class TargetConfig:
    """The frozen language model."""

    path: str
    """Folder or Hub id of a Hugging Face causal language model."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one; else e.g. `cpu`, `cuda:0`."""
    dtype: DType = "auto"
    """`auto` is float32 on a CPU and the checkpoint's own dtype elsewhere."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel; `auto` lets transformers choose between sdpa and eager."""
    revision: str | None = None
    """Hub revision."""


@dataclass(frozen=True)
class SourceConfig:
    """Where rows of text come from, and what stands in them. Read by `datasets`."""

    path: str
    """A .jsonl, .json or .parquet file (.gz too), a glob of such, a folder, or a Hub id."""
    format: Literal["auto", "text", "question", "messages", "turns", "columns"] = "auto"
    """What a row holds: `text`; `question` (with or without `answer`); `messages` or ShareGPT
    `conversations`; `turns` of a user; `columns` named below. `auto` looks at the first row."""
    prompt_column: str | None = None
    """For `columns`: the user's message."""
    answer_column: str | None = None
    """For `columns`: the assistant's; none where the target is to answer."""
    split: str = "train"
    """Split of a Hub data set."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    revision: str | None = None
    """Hub revision."""
    streaming: bool = False
    """Read as a stream, without storing the data set first; needs holdout_rows 0."""
    n_rows: int | None = None
    """Rows to read, from the front; none reads all but the held-out ones."""
    holdout_rows: int = 0
    """Rows at the end that are never read."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    supervise: Literal["all", "last"] = "all"
    """Which assistant messages of a row are learned from."""
    max_failed_rows: int = 0
    """Malformed rows to put up with; one more ends the job and names them."""


@dataclass(frozen=True)
class TreeConfig:
    """The shape of what is drafted per step."""

    width: int = 4
    """W, nodes kept per level."""
    depth: int = 4
    """K, drafted levels (the token that is sure anyway is not counted)."""
    shape: Literal["levels", "beams", "best"] = "levels"
    """`levels` verifies every level's top W (N = 1 + W*K), `beams` only the prefixes of the final
    W beams (Apple's), `best` the `nodes` nodes of highest cumulative score over all levels."""
    nodes: int | None = None
    """N for shape `best`, the root counted."""
    seeded: bool = True
    """At temperature > 0, propose with the verifier's own noise (accepts more, stays exact)."""


@dataclass(frozen=True)
class LosslessConfig:
    """`eval/lossless.py`: does drafting change a token?"""

    target: TargetConfig
    head: str
    """Folder of a trained draft head."""
    prompts: str
    """JSON-lines file of prompts (.jsonl or .jsonl.gz); rows are taken from its end."""
    n_prompts: int = 30
    """Rows to use, from the end of the file."""
    prompt_format: Literal["auto", "text", "question", "messages", "turns"] = "auto"
    """What a row holds; `auto` looks at the keys of the first one."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    tree: TreeConfig = TreeConfig()
    max_new_tokens: int = 128
    """Per prompt."""
    batch_sizes: str = "1,4"
    """Rows per speculative batch, comma-separated; the reference is always a row alone."""
    temperatures: str = "1"
    """Temperatures of the seeded modes, comma-separated; greedy is always run."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    allow_other_target: bool = False
    """Accept a head that was trained for another target."""
    threads: int | None = None
    """CPU threads of torch; None leaves its own choice."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class CostsConfig:
    """`eval/costs.py`: what forwards of n new tokens and drafted levels cost on this device."""

    target: TargetConfig
    head: str | None = None
    """Folder of a trained draft head; None measures the target alone."""
    tree: TreeConfig = TreeConfig()
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
    allow_other_target: bool = False
    """Accept a head that was trained for another target."""
    threads: int | None = None
    """CPU threads of torch; None leaves its own choice."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class SpeedConfig:
    """`eval/speed.py`: ways of decoding compared on the same prompts."""

    target: TargetConfig
    prompts: str
    """JSON-lines file of prompts (.jsonl or .jsonl.gz); rows are taken from its end."""
    n_prompts: int = 30
    """Rows to use, from the end of the file."""
    prompt_format: Literal["auto", "text", "question", "messages", "turns"] = "auto"
    """What a row holds; `auto` looks at the keys of the first one."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    head: str | None = None
    """Folder of a trained draft head, for the methods named `head`."""
    methods: str = "stock,plain,head"
    """Comma-separated: stock (model.generate), plain, head, lookup, bigram, replay (a drafter that
    knows the answer). `head:8x5:beams` names width x depth and shape; `head:8x5:best:16` the nodes
    too; `bigram:4x4`; `lookup:10x3` is depth x longest n-gram; `replay:1x4`."""
    tree: TreeConfig = TreeConfig()
    """Of the method `head` without a suffix."""
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
    answers: str | None = None
    """Texts to count bigrams on: a folder of answers made by training, or JSON lines of
    {"tokens": [...]}. None counts on plain answers to `bigram_prompts` other rows of `prompts`."""
    bigram_prompts: int = 64
    """Rows before the evaluated ones whose plain answers are counted where `answers` is None."""
    cost_rounds: int = 60
    """Measurements of each forward and drafted level, for the bound."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    allow_other_target: bool = False
    """Accept a head that was trained for another target."""
    threads: int | None = None
    """CPU threads of torch; None leaves its own choice."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class HeadConfig:
    """The recurrent head to train; see `redrafter/heads/recurrent.py`."""

    init_from: str | None = None
    """Folder of a head to go on from (ours or Apple's); the other fields here then do nothing."""
    num_draft_layers: int = 2
    """Residual blocks."""
    exit_dim: int | None = None
    """E, width of the residual blocks; none is twice the target's hidden width."""
    first_state: Literal["code", "paper"] = "code"
    """s_1 = SiLU(W e_1 + b) as in Apple's code, or s_1 = e_1 as in the paper."""
    cell: Literal["simple", "gru", "sum"] = "simple"
    """The recurrence; `sum` adds up embeddings."""
    embedding_scale: Literal["none", "rms"] = "rms"
    """`rms` divides the frozen embeddings by their root mean square; learns faster."""
    input_norm: bool = False
    """RMSNorm on the concatenated hidden state and recurrent state."""
    output: Literal["own", "target"] = "own"
    """The matrix over the vocabulary: trained, or the target's lm_head behind a projection."""
    draft_vocab_size: int | None = None
    """Draft only this many tokens, the most frequent ones of the answers; none drafts all."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts, and the target's own answers to them."""

    prompts: str
    """File of prompts, .jsonl or .jsonl.gz."""
    format: Literal["text", "question", "messages", "turns"] = "question"
    """Key that holds the prompt; see `redrafter/data/prompts.py`."""
    n_prompts: int | None = None
    """Prompts to train on, from the front of the file; none takes all but the held-out ones."""
    holdout_rows: int = 500
    """Rows at the end of the file that training never reads."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` that are the prompt."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Temperatures that the answers are made at; 0 is greedy."""
    samples_per_prompt: int = 1
    """Answers per prompt at each temperature above 0."""
    max_new_tokens: int = 128
    """Length of an answer, in tokens."""
    answer_batch: int = 128
    """Rows per forward when answers are made."""
    answers: str | None = None
    """Folder that keeps the answers for other runs; none is `answers` in the output folder."""
    labels: Literal["tokens", "greedy"] = "tokens"
    """Learn the answer's own tokens, or what the target would say greedily after each of them."""
    keep_states: Literal["memory", "none"] = "memory"
    """Hidden states of all answers: made once and kept, or made anew for each buffer."""
    max_state_bytes: int = 4_000_000_000
    """The most memory that kept hidden states may take, in bytes."""
    forward_tokens: int = 16384
    """Tokens per teacher-forced forward of the target, padding counted."""
    buffer_rows: int = 512
    """Rows whose positions are shuffled together; bounds the memory of keep_states `none`."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; see `redrafter/losses.py` for what each one serves."""

    cross_entropy: float = 1.0
    """Weight of -log q(label)."""
    kl: float = 0.0
    """Weight of KL(p || q)."""
    total_variation: float = 0.0
    """Weight of the total variation between p and q."""
    minus_log_acceptance: float = 0.0
    """Weight of -log sum min(p, q)."""
    depth_decay: float = 1.0
    """Depth k weighs depth_decay^(k-1)."""
    chunk_rows: int = 1024
    """Rows of logits (one per position and depth) held at once."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to zero."""

    steps: int = 8000
    """Optimiser steps."""
    batch_positions: int = 128
    """Start positions per micro-batch, each with all its depths."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    depth: int = 5
    """Depths trained."""
    lr: float = 2e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end, as a part of the peak."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices (never of biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; none does not clip."""


@dataclass(frozen=True)
class TrainEvalConfig:
    """What is measured while training, on held-out prompts."""

    every_steps: int = 1000
    """Steps between evaluations; one is always made at the end."""
    file: str | None = None
    """File of held-out prompts, of the same format; none takes the held-out end of
    `data.prompts`."""
    prompts: int = 40
    """Held-out prompts, from the end of the file; 0 measures nothing, and exports the last head."""
    max_new_tokens: int = 128
    """Tokens per held-out answer."""
    batch_size: int = 40
    """Rows decoded together."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Tokens per step are measured at each; the first one picks the best head."""
    tree: TreeConfig = TreeConfig()
    """The tree that is drafted."""


@dataclass(frozen=True)
class TrainConfig:
    """Fit a recurrent draft head to a frozen language model."""

    target: TargetConfig
    """The frozen language model."""
    data: DataConfig
    """Prompts and answers."""
    output_dir: str
    """Folder for the trained head, its checkpoints, logs and answers."""
    head: HeadConfig = HeadConfig()
    """The draft head."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optim: OptimConfig = OptimConfig()
    """The optimiser and its schedule."""
    eval: TrainEvalConfig = TrainEvalConfig()
    """Evaluation while training."""
    seed: int = 0
    """Fixes initial weights, answers and the order of the data."""
    save_steps: int = 1000
    """Steps between checkpoints; an evaluation that improves makes one too."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the best one comes on top."""
    resume: str = "none"
    """`auto` goes on from the newest checkpoint in the output folder (starts anew if there is
    none), a path from that checkpoint, `none` starts anew."""
    tracker: str | None = "tensorboard"
    """Where metrics are logged (a tracker that accelerate knows); none logs nowhere."""
    log_steps: int = 20
    """Steps between logged losses."""
