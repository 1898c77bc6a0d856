"""Every configuration dataclass, and the one way they are read: YAML, then `--section.key value`.

Unknown keys and wrong types are errors that name the key (jsonargparse). `None` means off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "float64", "bfloat16", "float16"]


def _at_least(least: int, config: object, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is smaller; None is off."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            where = type(config).__name__
            raise ValueError(f"{name}: {value} must be at least {least} ({where})")


def _check_temperatures(temperatures: tuple[float, ...]) -> None:
    if not temperatures or not min(temperatures) >= 0:
        raise ValueError(f"temperatures: {list(temperatures)} must be one or more, none below 0")


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
    """Where rows of text come from, and what stands in them; see `redrafter/data/sources.py`."""

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

    def __post_init__(self) -> None:
        _at_least(0, self, "text_prompt_tokens")


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
    bigrams: str | None = None
    """For `bigram`: a table made by data/bigrams.py, or a folder or URL of answers, texts or states
    to count on. None counts on plain answers to `bigram_prompts` other rows of `prompts`."""
    bigram_prompts: int = 64
    """Rows before the evaluated ones whose plain answers are counted where `bigrams` is None."""
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
class AnswersConfig:
    """The target's own answers to prompts."""

    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Temperatures that the answers are made at; 0 is greedy."""
    samples_per_prompt: int = 1
    """Answers per prompt at each temperature above 0."""
    max_new_tokens: int = 128
    """Length of an answer, in tokens."""
    batch_size: int = 128
    """Rows per forward; changes the speed, not the answers."""
    shard_prompts: int = 1024
    """Prompts per shard; what an interruption can lose."""

    def __post_init__(self) -> None:
        _check_temperatures(self.temperatures)
        names = ("samples_per_prompt", "max_new_tokens", "batch_size", "shard_prompts")
        _at_least(1, self, *names)


@dataclass(frozen=True)
class StatesConfig:
    """Hidden states of the target, for every position of every row."""

    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16", "int8"] = "auto"
    """Numbers that are stored; `auto` are the target's own. int8 has one scale per position."""
    max_bytes: int | None = 20_000_000_000
    """The most that may be written, in bytes; refused before any work. none sets no limit."""
    shard_bytes: int = 268_435_456
    """Size of a shard, in bytes; what an interruption can lose."""
    forward_tokens: int = 16384
    """Tokens per teacher-forced forward, padding counted; changes the speed, not the states."""
    teacher_top_k: int | None = None
    """Keep the target's k most probable next tokens, with their log-probabilities, too."""

    def __post_init__(self) -> None:
        _at_least(1, self, "shard_bytes", "forward_tokens", "teacher_top_k")


@dataclass(frozen=True)
class DataConfig:
    """What is learned from: stores made before, or a source to make them from here."""

    stores: tuple[str, ...] = ()
    """Folders or URLs of hidden states (data/states.py), each as PATH or PATH=WEIGHT; with weights
    an epoch takes rows of each store in that proportion."""
    source: SourceConfig | None = None
    """Text to begin with, where there are no stores; give data.source.path."""
    text: Literal["answers", "source"] = "answers"
    """Learn from the target's own answers to the source's prompts, or from its texts as they
    stand."""
    answers: AnswersConfig = AnswersConfig()
    """How answers are made."""
    states: StatesConfig = StatesConfig()
    """How hidden states are stored."""
    mode: Literal["offline", "online", "hybrid"] = "offline"
    """`offline` writes all hidden states, then trains; `online` makes them batch by batch and
    writes none; `hybrid` writes them while the first epoch trains. The batches are the same."""
    labels: Literal["tokens", "greedy", "local"] = "tokens"
    """Learn the text's own tokens; what the target says greedily after each of them; or `local`:
    what the target says when it goes on greedily from each position (the paper's distillation)."""
    folder: str | None = None
    """Folder that keeps prompts, answers and states for other runs; none is `data` in the output
    folder."""
    buffer_rows: int = 512
    """Rows held in memory at a time; their positions are shuffled together."""

    def __post_init__(self) -> None:
        _at_least(1, self, "buffer_rows")


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
    teacher: Literal["states", "top_k"] = "states"
    """Where p comes from: exactly, from the stored hidden states and the target's lm_head; or from
    the stored most probable tokens (data.states.teacher_top_k), without that matrix product."""
    depth_decay: float = 1.0
    """Depth k weighs depth_decay^(k-1)."""
    chunk_rows: int = 256
    """Rows of logits (one per position and depth) held at once."""

    def __post_init__(self) -> None:
        _at_least(1, self, "chunk_rows")


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

    def __post_init__(self) -> None:
        _at_least(1, self, "steps", "batch_positions", "accumulation", "depth")


@dataclass(frozen=True)
class TrainEvalConfig:
    """What is measured while training, on held-out prompts."""

    every_steps: int = 1000
    """Steps between evaluations; one is always made at the end."""
    source: SourceConfig | None = None
    """Held-out prompts; none takes the held-out end of `data.source`."""
    prompts: int = 40
    """Prompts, from the end of them; 0 measures nothing, and exports the last head."""
    max_new_tokens: int = 128
    """Tokens per held-out answer."""
    batch_size: int = 40
    """Rows decoded together."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Tokens per step are measured at each; the first one picks the best head."""
    tree: TreeConfig = TreeConfig()
    """The tree that is drafted."""

    def __post_init__(self) -> None:
        _check_temperatures(self.temperatures)
        _at_least(0, self, "prompts")
        _at_least(1, self, "every_steps", "max_new_tokens", "batch_size")


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

    def __post_init__(self) -> None:
        _at_least(1, self, "save_steps", "log_steps")


# ------------------------------------------------------------------ the pipeline's commands


@dataclass(frozen=True)
class PrepareConfig:
    """`data/prepare.py`: text of a source as rows of tokens."""

    target: TargetConfig
    """The target; only its tokenizer, chat template and configuration are read."""
    source: SourceConfig
    """Where the text comes from."""
    keep: Literal["prompts", "texts"] = "prompts"
    """`prompts`: what stands before the answer, for the target to go on (data/answers.py).
    `texts`: everything, with a mask over what is learned from (data/states.py)."""
    max_tokens: int | None = None
    """Longer rows are skipped and counted; none takes the target's context."""
    output_dir: str | None = None
    """Folder for the rows; none writes nothing (see show)."""
    show: int = 0
    """Print this many rows first, with what is learned from in colour."""

    def __post_init__(self) -> None:
        _at_least(1, self, "max_tokens")
        _at_least(0, self, "show")


@dataclass(frozen=True)
class MakeAnswersConfig:
    """`data/answers.py`: let the target answer prompts."""

    target: TargetConfig
    """The target that answers."""
    prompts: str
    """Folder of prompts made by data/prepare.py."""
    output_dir: str
    """Folder for the answers; the same command goes on after an interruption."""
    answers: AnswersConfig = AnswersConfig()
    """How they are made."""
    drafter: Literal["none", "head", "lookup"] = "none"
    """Draft with a trained head or by prompt lookup: faster, and the answers are the same."""
    head: str | None = None
    """Folder of the head, for drafter `head`."""
    tree: TreeConfig = TreeConfig()
    """What the head drafts."""
    allow_other_target: bool = False
    """Accept a head that was trained for another target."""
    seed: int = 0
    """Fixes every sampled answer."""
    threads: int | None = None
    """CPU threads of torch; None leaves its own choice."""


@dataclass(frozen=True)
class MakeStatesConfig:
    """`data/states.py`: store the target's hidden states of rows."""

    target: TargetConfig
    """The target whose states are stored."""
    rows: str
    """Folder of answers (data/answers.py) or texts (data/prepare.py)."""
    output_dir: str
    """Folder for the states; the same command goes on after an interruption."""
    states: StatesConfig = StatesConfig()
    """How they are stored."""
    continuation: int = 0
    """Greedy tokens to store per position, for data.labels `greedy` (1) or `local`
    (optim.depth + 1)."""
    threads: int | None = None
    """CPU threads of torch; None leaves its own choice."""

    def __post_init__(self) -> None:
        _at_least(0, self, "continuation")


@dataclass(frozen=True)
class CheckConfig:
    """`data/check.py`: is every byte of a store what was written?"""

    store: str
    """Folder or URL of rows, answers or states."""
    show: int = 0
    """Print this many rows, with what is learned from in colour; needs target.path."""
    target: TargetConfig | None = None
    """Whose tokenizer to print rows with."""

    def __post_init__(self) -> None:
        _at_least(0, self, "show")


@dataclass(frozen=True)
class BigramsConfig:
    """`data/bigrams.py`: count which token follows which, for the n-gram drafter."""

    store: str
    """Folder or URL of answers, texts or states."""
    target: TargetConfig
    """The target; only its configuration is read."""
    out: str
    """File to write (.safetensors), for `eval/speed.py --bigrams`."""
    width: int = 16
    """Successors kept per token."""

    def __post_init__(self) -> None:
        _at_least(1, self, "width")
