"""The data pipeline: its stages, and the commands that run them one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import (
    SourceConfig,
    TargetConfig,
    TreeConfig,
    at_least,
    check_temperatures,
)


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
        check_temperatures(self.temperatures)
        names = ("samples_per_prompt", "max_new_tokens", "batch_size", "shard_prompts")
        at_least(1, self, *names)


@dataclass(frozen=True)
class RequestsConfig:
    """How a server is asked for answers."""

    model: str | None = None
    """The model's name there; none takes the only one that the server lists."""
    key_from: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, for servers that want one; it is stored nowhere."""
    send: Literal["tokens", "text", "chat"] = "tokens"
    """`tokens` sends the prompts' token ids (vLLM, SGLang, llama.cpp), `text` their text, both to
    /completions. `chat` sends messages to /chat/completions, where the server's own template
    renders them (conversations only)."""
    fields: Literal["engine", "openai"] = "engine"
    """`engine` sends what engines know besides the OpenAI API, too: nothing cut off by top_k and
    min_p, no penalties, token ids wanted. `openai` is for servers that refuse other fields."""
    at_once: int = 32
    """Requests on their way at a time; of several processes each has as many."""
    timeout_s: float = 600.0
    """Seconds that an answer may take; then it is asked for again."""
    retries: int = 8
    """Further tries of a request that found no server, or an overloaded or failing one."""
    backoff_s: float = 1.0
    """Seconds before the second try; twice as long before each next one, up to a minute, or what
    the server asks for."""
    check_prompts: int = 8
    """Prompts whose greedy answers are compared with the target's own before anything else; 0
    trusts the server."""

    def __post_init__(self) -> None:
        at_least(1, self, "at_once")
        at_least(0, self, "retries", "backoff_s", "check_prompts")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s: {self.timeout_s} must be more than 0 (RequestsConfig)")


@dataclass(frozen=True)
class AskedAnswersConfig(AnswersConfig):
    """The target's own answers, made here or by a server."""

    server: str | None = None
    """URL of an OpenAI-compatible server that serves the target and answers in its place, such as
    http://HOST:8000/v1; none decodes here."""
    requests: RequestsConfig = RequestsConfig()
    """How it is asked."""


@dataclass(frozen=True)
class StatesConfig:
    """Hidden states of the target, for every position of every row."""

    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16", "int8"] = "auto"
    """Numbers that are stored; `auto` are the target's own. int8 has one scale per position and
    layer."""
    max_bytes: int | None = 20_000_000_000
    """The most that may be written, in bytes; refused before any work. none sets no limit."""
    shard_bytes: int = 268_435_456
    """Size of a shard, in bytes; what an interruption can lose."""
    forward_tokens: int = 16384
    """Tokens per teacher-forced forward, padding counted; changes the speed, not the states."""
    teacher_top_k: int | None = None
    """Keep the target's k most probable next tokens, with their log-probabilities, too."""
    aux_layers: tuple[int, ...] | None = None
    """Keep the states after these decoder layers beside the last one's, for heads of which
    head.aux_layers names some of them; a training makes those of its own head by itself."""

    def __post_init__(self) -> None:
        at_least(1, self, "shard_bytes", "forward_tokens", "teacher_top_k")


@dataclass(frozen=True)
class DataConfig:
    """What is learned from: stores made before, or a source to make them from here."""

    stores: tuple[str, ...] = ()
    """Folders or URLs of hidden states (data/states.py), each as PATH or PATH=WEIGHT; with weights
    an epoch takes rows of each store in that proportion."""
    source: SourceConfig | None = None
    """Text to begin with, where there are no stores: data.source.path, .format, .n_rows,
    .holdout_rows and the other fields that `data/prepare.py --help` explains."""
    text: Literal["answers", "conversations", "source"] = "answers"
    """Learn from the target's own answers to the source's prompts; to every turn of its
    conversations, each put after the target's own earlier answers; or from its texts as they
    stand."""
    answers: AnswersConfig = AnswersConfig()
    """How answers are made."""
    states: StatesConfig = StatesConfig()
    """How hidden states are stored."""
    mode: Literal["offline", "online", "hybrid"] = "offline"
    """`offline` writes all hidden states, then trains; `online` makes them batch by batch and
    writes none; `hybrid` writes them while the first epoch trains (of several processes each
    makes its own rows' then, and its share of the store's after that epoch: twice, without a wait
    at first). The batches are the same."""
    labels: Literal["tokens", "greedy", "local"] = "tokens"
    """Learn the text's own tokens; what the target says greedily after each of them; or `local`:
    what the target says when it goes on greedily from each position (the paper's distillation)."""
    folder: str | None = None
    """Folder that keeps prompts, answers and states for other runs; none is `data` in the output
    folder."""
    buffer_rows: int = 512
    """Rows held in memory at a time; their positions are shuffled together."""

    def __post_init__(self) -> None:
        at_least(1, self, "buffer_rows")


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
        at_least(1, self, "max_tokens")
        at_least(0, self, "show")


@dataclass(frozen=True)
class InstructionsConfig:
    """`data/instructions.py`: prompts that a chat model writes itself."""

    target: TargetConfig
    """The target; its chat template says where a user's words stand."""
    output_dir: str
    """Folder for the prompts; the same command goes on after an interruption."""
    n: int = 1000
    """Instructions to write; those left out are counted among them."""
    temperature: float = 0.8
    """They are drawn at; more is more various, and less sensible from a small model."""
    max_new_tokens: int = 128
    """What is longer is left out, in tokens."""
    min_words: int = 3
    """What is shorter is left out."""
    batch_size: int = 64
    """Rows per forward; changes the speed, not the instructions."""
    shard_prompts: int = 1024
    """Instructions per shard; what an interruption can lose."""
    seed: int = 0
    """Fixes every instruction."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""

    def __post_init__(self) -> None:
        at_least(1, self, "n", "max_new_tokens", "min_words", "batch_size", "shard_prompts")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature: {self.temperature} must be above 0, or all instructions are one"
            )


@dataclass(frozen=True)
class MakeAnswersConfig:
    """`data/answers.py`: let the target answer prompts."""

    target: TargetConfig
    """The target that answers."""
    output_dir: str
    """Folder for the answers; the same command goes on after an interruption."""
    prompts: str | None = None
    """Folder of prompts made by data/prepare.py; one answer is given to each."""
    source: SourceConfig | None = None
    """Conversations, in place of prompts: every turn is answered, each next one put after the
    target's own earlier answers. source.path, .format and so on are those of data/prepare.py."""
    answers: AskedAnswersConfig = AskedAnswersConfig()
    """How they are made."""
    drafter: Literal["none", "head", "lookup"] = "none"
    """Draft with a trained head or by prompt lookup: faster, and the answers are the same."""
    head: str | None = None
    """Folder of the head, for drafter `head`."""
    tree: TreeConfig = TreeConfig()
    """What the head drafts."""
    allow_other_target: bool | Literal["merged"] = False
    """Accept a head that was trained for another target: `merged` one that computes the same, as a
    merged copy of base and adapter does (compared on fixed tokens), `true` any."""
    seed: int = 0
    """Fixes every sampled answer."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""


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
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""

    def __post_init__(self) -> None:
        at_least(0, self, "continuation")


@dataclass(frozen=True)
class ImportSpeculatorsConfig:
    """`data/import_speculators.py`: a speculators folder as a store of states."""

    target: TargetConfig
    """The target whose states they are; its final norm is applied to them."""
    folder: str
    """Folder of the prepared data (a data set on disk, with input_ids and loss_mask)."""
    output_dir: str
    """Folder for the store; the same command goes on after an interruption."""
    hidden_states: str | None = None
    """Folder of the hs_*.safetensors; none is `hidden_states` in `folder`."""
    states: StatesConfig = StatesConfig()
    """How they are stored."""
    check_rows: int = 8
    """Rows whose states are compared with the target's own first; 0 trusts the folder."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""

    def __post_init__(self) -> None:
        at_least(0, self, "check_rows")


@dataclass(frozen=True)
class ExportSpeculatorsConfig:
    """`data/export_speculators.py`: a store of states as a speculators folder."""

    target: TargetConfig
    """The target whose states they are; its final norm is undone."""
    store: str
    """Folder or URL of states (data/states.py)."""
    output_dir: str
    """Folder to write, which must not exist."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""


@dataclass(frozen=True)
class CheckConfig:
    """`data/check.py`: is every byte of a store what was written?"""

    store: str
    """Folder or URL of rows, answers or states."""
    show: int = 0
    """Print this many rows, with what is learned from in colour; needs target.path."""
    html: str | None = None
    """HTML file to write those rows to (20 where `show` is 0), every token of them to be pointed
    at, instead of printing them."""
    target: TargetConfig | None = None
    """Whose tokenizer to print rows with."""

    def __post_init__(self) -> None:
        at_least(0, self, "show")


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
        at_least(1, self, "width")


@dataclass(frozen=True)
class ProbeConfig:
    """`data/probe.py`: ask the target what follows every single token."""

    target: TargetConfig
    """The target, whole."""
    out: str
    """File to write (.safetensors), for `eval/speed.py --bigrams`; the same command goes on after
    an interruption."""
    width: int = 16
    """Successors kept per token, and tokens of the ranking without context."""
    bos: bool = False
    """Put BOS before the token."""
    unigram: Literal["table", "weights", "bos"] = "table"
    """Rank tokens without context by their mean probability in the table, by the rows of lm_head
    alone, or by what follows BOS."""
    batch_size: int = 256
    """Tokens per forward; changes the speed, not the table."""
    part_tokens: int = 8192
    """Tokens per part; what an interruption can lose."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""

    def __post_init__(self) -> None:
        at_least(1, self, "width", "batch_size", "part_tokens", "threads")
