"""What several commands need: the target, a source of text, the shape of a draft, what drafters are
made from, prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["auto", "float32", "float64", "bfloat16", "float16"]
#: What a row of a file of prompts holds; see `redrafter/data/formats.py`.
PromptFormat = Literal[
    "auto", "text", "question", "prompt", "instruction", "messages", "turns", "humaneval", "mbpp",
    "summarization", "columns",
]  # fmt: skip


def at_least(least: int, config: object, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is smaller; None is off."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            where = type(config).__name__
            raise ValueError(f"{name}: {value} must be at least {least} ({where})")


def check_temperatures(temperatures: tuple[float, ...]) -> None:
    if not temperatures or not min(temperatures) >= 0:
        raise ValueError(f"temperatures: {list(temperatures)} must be one or more, none below 0")


@dataclass(frozen=True)
class TargetConfig:
    """The frozen language model."""

    path: str
    """Folder or Hub id of a Hugging Face causal language model, or of a peft adapter, which is
    merged into its base when loaded; or a GGUF file, or a folder that holds one."""
    gguf_file: str | None = None
    """Name of the GGUF file in the folder, or the Hub's repository, that `path` is."""
    base: str | None = None
    """For an adapter: its base's folder or Hub id, where adapter_config.json names another."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one; else e.g. `cpu`, `cuda:0`."""
    dtype: DType = "auto"
    """`auto` is the checkpoint's own dtype on an accelerator, and float32 on a CPU; bfloat16 for a
    bfloat16 checkpoint on a CPU with matrix units for it (AMX, AVX512-BF16) where a measurement at
    load finds them faster, which is said."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel; `auto` lets transformers choose between sdpa and eager."""
    exact: Literal["reported", "invariant"] = "reported"
    """`invariant`: every product in blocks of one shape, found by trying, so that a row's text does
    not change by a bit with drafting, batch or padding, in any dtype; for chains. `reported`: as
    fast as it goes; differences by rounding are shown and explained (docs/low-precision.md)."""
    logits: Literal["own", "float32"] = "own"
    """`float32`: the last product in float32, whatever the target computes in: fewer ties."""
    forward: Literal["auto", "model", "fused", "graphs"] = "auto"
    """Of new tokens on a cache: `model` is its class's own forward; `fused` gives the same up to
    rounding in fewer operations (joined weights; Llama, Mistral, Qwen2 and Qwen3); `auto` takes
    that wherever there is one, once it has been compared with the model's own; `graphs` is that
    recorded once per shape and replayed (CUDA graphs: one launch a forward)."""
    revision: str | None = None
    """Hub revision."""
    shard: Literal["none", "zero3"] = "none"
    """`zero3`, in training under DeepSpeed: every process holds a part of each of the target's
    layers, and all gather them layer by layer; for targets larger than one device."""
    device_map: Literal["none", "auto"] = "none"
    """`auto`, in one process: layers that the device has no room for lie in host memory, or stay
    in the checkpoint's files, and are brought to the device in every forward pass."""
    device_bytes: int | None = None
    """With device_map: bytes of the accelerator's memory that the target's weights may take; none
    takes all that are free (a head in training, keys and values need some, too)."""
    host_bytes: int | None = None
    """With device_map: bytes of host memory that they may take; what is left stays on disk."""
    offload_folder: str | None = None
    """With device_map: folder for weights that cannot be read from the checkpoint as they are
    (mixtures of experts)."""

    def __post_init__(self) -> None:
        at_least(0, self, "device_bytes", "host_bytes")
        if self.shard != "none" and self.device_map != "none":
            raise ValueError("shard and device_map: give one of them (TargetConfig)")
        if self.exact == "invariant":
            if self.attention == "sdpa":
                raise ValueError("exact invariant brings its own attention: leave attention out")
            if self.forward in ("fused", "graphs"):
                raise ValueError("exact invariant goes with the class's own forward: leave it out")
            if self.shard != "none" or self.device_map != "none":
                raise ValueError("exact invariant is for targets that are whole on one device")


@dataclass(frozen=True)
class SourceConfig:
    """Where rows of text come from, and what stands in them; see `redrafter/data/sources.py`."""

    path: str
    """A .jsonl, .json or .parquet file (.gz too), a glob of such, a folder, or a Hub id."""
    format: PromptFormat = "auto"
    """What a row holds: `text`; `question` (with or without `answer`); `prompt` (`completion`);
    `instruction` (`input`, `output`); `messages` or ShareGPT `conversations`; `turns` of a user; a
    row of `humaneval`, `mbpp` or, for `summarization`, of CNN/DailyMail; `columns` named below.
    `auto` looks at the first row."""
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
        at_least(0, self, "text_prompt_tokens")


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
    rounded: bool = True
    """Draft by matrices rounded to bfloat16 where this CPU's kernels multiply: half the bytes are
    read, the draft changes by little, and the text by nothing."""


# What commands share is all in this file: jsonargparse looks for the types of inherited fields in
# the files of a class and of the first of its bases, and takes anything where it finds none.


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
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
class DraftingConfig(ResourcesConfig):
    """The same where drafters are measured on prompts."""

    bigram_prompts: int = 64
    """Rows before the evaluated ones whose plain answers are counted where `bigrams` is None."""
    seed: int = 0
    """Prompt i samples with seed + i."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Prompts that a target answers; whoever has other defaults says them anew."""

    target: TargetConfig = field(kw_only=False)
    n_prompts: int = 30
    """Rows to use, from the end of the file."""
    prompt_column: str | None = None
    """For rows of other keys: the column of the user's message."""
    text_prompt_tokens: int = 16
    """Tokens of a `text` row that are the prompt, BOS not counted."""
    max_new_tokens: int = 128
    """Per prompt."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else what is faster here: one, or all."""


@dataclass(frozen=True, kw_only=True)
class PromptFileConfig(PromptsConfig):
    """The same of one file."""

    prompts: str = field(kw_only=False)
    """JSON-lines file of prompts (.jsonl or .jsonl.gz); rows are taken from its end."""
    prompt_format: PromptFormat = "auto"
    """What a row holds; `auto` looks at the keys of the first one."""
