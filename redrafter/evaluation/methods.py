"""Ways of decoding that are compared with each other, by name."""

from __future__ import annotations

import copy
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import GenerationConfig

from redrafter.config import SpeedConfig, TreeConfig
from redrafter.contracts import Drafter, InputError, StepStats
from redrafter.decode.plain import plain
from redrafter.decode.request import Request
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import BigramTable, CountedBigrams
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.model import DraftModel
from redrafter.drafters.recurrent import RecurrentDrafter
from redrafter.drafters.recycling import TokenRecycling
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.evaluation.costs import synchronize
from redrafter.heads.recurrent import RecurrentHead
from redrafter.target.model import Target, TargetOutput

_SHAPES = ("levels", "beams", "best")


@dataclass(frozen=True)
class Batch:
    """Rows decoded together. texts: prompt and plain answer, for the drafter that knows them."""

    prompts: list[list[int]]
    seeds: list[int]
    texts: list[list[int]] = field(default_factory=list)


@dataclass
class Run:
    """One timed call. seconds["total"] is wall-clock around everything, prefill included;
    "forward" is the time inside the target's forwards after the prefill, a part of "verify".
    nodes: new tokens per row of each of those forwards"""

    tokens: list[list[int]]
    seconds: dict[str, float]
    stats: StepStats | None = None
    nodes: list[int] = field(default_factory=list)


class TimedTarget:
    """A target whose forwards are timed; the first one of a run is the prefill."""

    def __init__(self, target: Target):
        self._target = target
        self.times_s: list[float] = []
        self.nodes: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._target, name)

    def forward(self, tokens: Tensor, *args, **kwargs) -> TargetOutput:
        clock = time.perf_counter()
        out = self._target.forward(tokens, *args, **kwargs)
        self.times_s.append(time.perf_counter() - clock)
        self.nodes.append(tokens.shape[1])
        return out


class Method(ABC):
    """One way of decoding. `run` is what is timed."""

    #: the drafter whose costs bound the method's speed; None drafts nothing
    drafter: Drafter | None = None

    def __init__(self, name: str, target: Target, config: GenerationConfig):
        self.name, self.target, self.config = name, target, config

    def prepare(self, batch: Batch) -> None:  # noqa: B027 - most methods know all they need
        """Untimed work before a batch."""

    def run(self, batch: Batch) -> Run:
        synchronize(self.target.device)
        clock = time.perf_counter()
        run = self._run(batch)
        synchronize(self.target.device)
        run.seconds["total"] = time.perf_counter() - clock
        return run

    @abstractmethod
    def _run(self, batch: Batch) -> Run: ...


class Stock(Method):
    """transformers' own `model.generate`, padded on the left as it wants it."""

    def __init__(self, name: str, target: Target, config: GenerationConfig):
        super().__init__(name, target, config)
        self.eos = Request(target, [[0]], config, 0, None, None, None, None).eos
        # What is not set here, `generate` would take from the model's generation_config.
        self.config = copy.deepcopy(config)
        self.config.update(
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=min(self.eos, default=0),
            repetition_penalty=1.0,
            use_cache=True,
        )
        if not self.eos:
            self.config.eos_token_id = -1

    @torch.inference_mode()
    def _run(self, batch: Batch) -> Run:
        width = max(map(len, batch.prompts))
        ids = torch.full((len(batch.prompts), width), self.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.target.device
        torch.manual_seed(batch.seeds[0])
        made = self.target.model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=self.config
        )
        return Run([self._until_stop(row) for row in made[:, width:].tolist()], {})

    def _until_stop(self, row: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(row) if token in self.eos), len(row))
        return row[:end]


class Loop(Method):
    """Our loops: `plain`, or `speculative` with a drafter."""

    def __init__(
        self,
        name: str,
        target: Target,
        config: GenerationConfig,
        drafter: Drafter | None = None,
    ):
        super().__init__(name, target, config)
        self.drafter = drafter

    def _run(self, batch: Batch) -> Run:
        timed = TimedTarget(self.target)
        decode = plain if self.drafter is None else speculative
        made = decode(timed, batch.prompts, self.config, seeds=batch.seeds, drafter=self.drafter)
        seconds = {**made.stats.seconds, "forward": sum(timed.times_s[1:])}
        return Run(made.tokens, seconds, made.stats, timed.nodes[1:])


class Replay(Loop):
    """Drafts what plain decoding said: the ceiling of any chain (or tree) of this depth."""

    def __init__(self, name: str, target: Target, config: GenerationConfig, tree: TreeConfig):
        super().__init__(name, target, config)
        self.tree = tree
        self.drafter = self._drafter([[0]])

    def prepare(self, batch: Batch) -> None:
        self.drafter = self._drafter(batch.texts)

    def _drafter(self, texts: list[list[int]]) -> ReplayDrafter:
        return ReplayDrafter(texts, self.target.vocab_size, self.tree.depth, self.tree.width)


def tree_of(name: str, default: TreeConfig) -> TreeConfig:
    """`head:8x5:best:16` -> the tree it names; parts that are missing are the default's.

    Raises InputError naming the method.
    """
    _, *parts = name.split(":")
    tree = default
    if parts:
        size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", parts[0])
        if not size:
            raise InputError(f"methods: {name!r}: {parts[0]!r} is not WIDTHxDEPTH, e.g. 4x4")
        tree = replace(tree, width=int(size[1]), depth=int(size[2]), shape="levels", nodes=None)
    if len(parts) > 1:
        if parts[1] not in _SHAPES:
            raise InputError(f"methods: {name!r}: {parts[1]!r} is not one of {', '.join(_SHAPES)}")
        tree = replace(tree, shape=parts[1])
    if len(parts) > 3 or (len(parts) == 3 and not (tree.shape == "best" and parts[2].isdigit())):
        raise InputError(f"methods: {name!r} has parts too many; see --help")
    if len(parts) == 3:
        tree = replace(tree, nodes=int(parts[2]))
    return tree


def bigram_width(names: Sequence[str]) -> int:
    """Successors per token that the widest method `bigram...` needs; 0 where there is none."""
    widths = [tree_of(n, TreeConfig()).width for n in names if n.split(":")[0] == "bigram"]
    return max(widths, default=0)


@dataclass(frozen=True)
class Partners:
    """What drafters are made from besides the target; None where no method asks for it (see
    `check_partners`).

    bigrams: at least `bigram_width` wide
    """

    head: RecurrentHead | None = None
    bigrams: BigramTable | None = None
    draft: Target | None = None


def _head(name: str, target: Target, config: SpeedConfig, partners: Partners) -> Drafter:
    return RecurrentDrafter(partners.head, target, tree_of(name, config.tree))


def _lookup(name: str, target: Target, config: SpeedConfig, partners: Partners) -> Drafter:
    size = tree_of(name, TreeConfig(width=10, depth=3))  # the name says depth x n-gram
    return PromptLookup(depth=size.width, max_ngram=size.depth)


def _bigram(name: str, target: Target, config: SpeedConfig, partners: Partners) -> Drafter:
    tree = tree_of(name, TreeConfig())
    return CountedBigrams(partners.bigrams, tree.width, tree.depth, target.device)


def _suffix(name: str, target: Target, config: SpeedConfig, partners: Partners) -> Drafter:
    size = tree_of(name, TreeConfig(width=10, depth=1))  # the name says depth x shortest match
    return SuffixDrafter(depth=size.width, min_match=size.depth)


def _recycling(name: str, target: Target, config: SpeedConfig, partners: Partners) -> Drafter:
    if ":" in name:
        raise InputError(f"methods: {name!r}: recycling has one tree and takes no size")
    return TokenRecycling(target.vocab_size, device=target.device)


def _model(name: str, target: Target, config: SpeedConfig, partners: Partners) -> Drafter:
    tree = tree_of(name, TreeConfig(width=1, depth=4))
    return DraftModel(partners.draft, target, tree.depth, tree.width, tree.seeded)


#: What a user may write before the first colon, and who makes the drafter of that name.
DRAFTERS: dict[str, Callable[[str, Target, SpeedConfig, Partners], Drafter]] = {
    "head": _head,
    "lookup": _lookup,
    "bigram": _bigram,
    "suffix": _suffix,
    "recycling": _recycling,
    "model": _model,
}
KINDS = ("stock", "plain", "replay", *DRAFTERS)


def parse_methods(text: str) -> list[str]:
    """Names, in order and once each. Raises InputError naming an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError("methods: give at least one, e.g. stock,plain,head")
    for name in names:
        kind = name.split(":")[0]
        if kind not in KINDS or (":" in name and kind in ("stock", "plain")):
            raise InputError(f"methods: {name!r} is unknown; choose from {', '.join(KINDS)}")
    return names


def check_partners(names: Sequence[str], config: SpeedConfig) -> None:
    """Raises InputError, before anything is loaded, naming an option that a method lacks."""
    kinds = {name.split(":")[0] for name in names}
    if "head" in kinds and config.head is None:
        raise InputError("methods: 'head' needs --head, the folder of a trained draft head")
    if "model" in kinds and config.draft is None:
        raise InputError("methods: 'model' needs --draft, a smaller model of this vocabulary")


def build_method(
    name: str,
    target: Target,
    config: SpeedConfig,
    generation_config: GenerationConfig,
    partners: Partners,
) -> Method:
    """The method of a name from `parse_methods`. Raises InputError where its size is wrong."""
    kind = name.split(":")[0]
    if kind == "stock":
        return Stock(name, target, generation_config)
    if kind == "plain":
        return Loop(name, target, generation_config)
    if kind == "replay":
        tree = tree_of(name, TreeConfig(width=1, depth=config.tree.depth))
        return Replay(name, target, generation_config, tree)
    drafter = DRAFTERS[kind](name, target, config, partners)
    return Loop(name, target, generation_config, drafter)


def plain_answers(
    target: Target,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    batch_size: int = 1,
) -> list[list[int]]:
    """Plain decoding of every prompt."""
    answers: list[list[int]] = []
    for i in range(0, len(prompts), batch_size):
        rows, own = prompts[i : i + batch_size], seeds[i : i + batch_size]
        answers += plain(target, rows, config, seeds=own).tokens
    return answers
