"""`redrafter report`."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter.config.common import (
    PromptFormat,
    PromptsConfig,
    ResourcesConfig,
    TargetConfig,
    at_least,
)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ResourcesConfig, PromptsConfig):
    """`redrafter report`: all that is known of a head, on one page."""

    head: str
    """Folder or Hub id of a head, or of a training run; `--head` itself may be left out."""
    target: TargetConfig = TargetConfig(path="")
    """To decode `prompts`; its path may be left out where the folder tells of one that is here."""
    prompts: str | None = None
    """JSON-lines file of prompts: a few rows of its end are decoded, and every token coloured by
    how it came. None decodes nothing, and loads no target."""
    prompt_format: PromptFormat = "auto"
    """What a row of `prompts` holds; `auto` looks at the keys of the first one."""
    n_prompts: int = 3
    """Rows of `prompts` to show, from its end."""
    max_new_tokens: int = 96
    """Per prompt."""
    drafter: str | None = None
    """Name of what drafts those texts; None is the head, with `tree`."""
    temperature: float = 0.0
    """Of those texts; 0 is greedy."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    out: str | None = None
    """HTML file to write; None is report.html in the head's folder."""

    def __post_init__(self) -> None:
        at_least(1, self, "n_prompts", "max_new_tokens")
        at_least(0, self, "temperature")
