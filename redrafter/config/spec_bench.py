"""`eval/spec_bench.py`: the protocol of Spec-Bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import DraftingConfig, PromptFormat, TargetConfig, at_least


@dataclass(frozen=True, kw_only=True)
class SpecBenchConfig(DraftingConfig):
    """`eval/spec_bench.py`: chats of several turns, figures by task, Spec-Bench's answer files."""

    target: TargetConfig
    questions: str
    """A .jsonl, .json or .parquet file (.gz too), a glob of such, a folder, or a Hub id."""
    out: str
    """Folder. What was answered there already, of the same configuration, is not run again."""
    format: PromptFormat = "auto"
    """What a row holds: `turns` (Spec-Bench, MT-bench), `question` (GSM8K), `humaneval`, `mbpp`,
    `summarization` (CNN/DailyMail), `messages`, or `columns`. `auto` looks at the first row."""
    prompt_column: str | None = None
    """For format `columns`: the user's message."""
    split: str = "train"
    """Split of a Hub data set."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    revision: str | None = None
    """Hub revision of the questions."""
    question_begin: int = 0
    """Rows to leave out at the front, e.g. those that the head was trained on."""
    n_questions: int | None = None
    """Rows to take behind them; none takes all."""
    question_step: int = 1
    """Take every so many-th row: 24 of Spec-Bench's 480 questions are 20, of all categories."""
    category: str | None = None
    """Of rows that name none; none takes the name of their format."""
    chat_template: str | None = None
    """File with a Jinja chat template, or `question`, a built-in one for models without: `Question:
    ...`, a new line, `Answer:`. None takes the tokenizer's own."""
    long_prompts: Literal["cut", "skip", "error"] = "cut"
    """Prompts that leave no room for max_new_tokens in the target's context: `cut` drops their
    first tokens but for a BOS, `skip` leaves the question out of every method, `error` stops.
    Which were is counted and reported."""
    methods: str = "plain,head"
    """Ways of decoding, comma-separated; `--list` prints all of them, with their options."""
    baseline: str = "plain"
    """The one of `methods` that speedups are over; `stock` is transformers' `generate`."""
    max_new_tokens: int = 1024
    """Per turn."""
    temperature: float = 0.0
    """0 is greedy."""
    repeats: int = 3
    """Runs over all questions; figures are means over runs, with their standard deviation."""
    warmups: int = 3
    """Runs of the first question by every method that are not counted."""
    compat: bool = False
    """Report Spec-Bench's own counting, too: tokens of the baseline by tokenising its decoded,
    stripped answers again, less one per turn, those of the others by their own count."""
    model_id: str | None = None
    """Of the answer files, before the method's name; none takes the name of the target's folder."""
    seed: int = 0
    """Row i samples with seed + i."""
    threads: int | None = None
    """CPU threads of torch; None takes OMP_NUM_THREADS, else all CPUs that it may use."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_questions", "question_step", "max_new_tokens", "repeats")
        at_least(0, self, "question_begin", "warmups", "temperature")
