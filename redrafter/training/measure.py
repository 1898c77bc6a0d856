"""What a head is worth, on held-out prompts: accuracy by depth, and real tokens per step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redrafter.config import AnswersConfig, StatesConfig, TrainConfig
from redrafter.data.answers import build_answers, generation_config
from redrafter.data.reading import Fresh
from redrafter.data.states import StateMaker
from redrafter.data.store import Store
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.base import DraftHead
from redrafter.targets.model import Target
from redrafter.training.feed import Batch, Feed
from redrafter.training.step import depth_accuracy


class Measure:
    """Calling it on a head returns, by temperature ("greedy", "temperature 1", ...):

    tokens_per_step: tau, by decoding the prompts with the head (docs: redrafter.contracts)
    top_1, top_5, accepted: by depth, teacher-forced on the target's own answers to the prompts;
        see `depth_accuracy`

    Every process measures its share of the prompts, `total` adds up what they counted; so all of
    them call it together.
    """

    def __init__(
        self,
        target: Target,
        prompts: Store,
        config: TrainConfig,
        folder: Path,
        share: tuple[int, int] = (0, 1),
        total: Callable[[Tensor], Tensor] = lambda counts: counts,
        row_starts: int | None = None,
    ):
        self.target, self.config, self.total = target, config, total
        rows, (rank, world) = prompts.rows(), share
        self.prompts = [rows.ids(i) for i in range(rank, rows.n_rows, world)]
        self.source_rows = prompts.source_row[rank::world].tolist()
        self.names = [temperature_name(t) for t in config.eval.temperatures]
        forward_tokens = config.data.states.forward_tokens
        chunk, depth = config.loss.chunk_rows, config.optim.depth
        self.batches: dict[str, list[Batch]] = {}
        for temperature, name in zip(config.eval.temperatures, self.names, strict=True):
            how = AnswersConfig(
                temperatures=(temperature,), max_new_tokens=config.eval.max_new_tokens,
                batch_size=config.eval.batch_size,
            )  # fmt: skip
            answers = build_answers(
                target, prompts, how, folder, seed=config.seed, named=True, progress=False
            )
            part = Fresh(answers, StateMaker(target, StatesConfig(forward_tokens=forward_tokens)))
            feed = Feed(
                target, [part], positions=1, depth=depth, seed=0, row_starts=row_starts, share=share
            )
            # Made once: the target says the same at every evaluation.
            self.batches[name] = feed.batches(max(1, chunk // depth))

    def __call__(self, head: DraftHead) -> dict[str, Any]:
        rates, by_depth = {}, {}
        for temperature, name in zip(self.config.eval.temperatures, self.names, strict=True):
            rates[name] = self.tokens_per_step(head, temperature)
            accuracy = depth_accuracy(
                head, self.target, self.batches[name], self.config.loss.chunk_rows, self.total
            )
            for kind, shares in accuracy.items():
                by_depth.setdefault(kind, {})[name] = shares
        return {"tokens_per_step": rates, **by_depth}

    def tokens_per_step(self, head: DraftHead, temperature: float) -> float | None:
        """tau, pooled over the held-out prompts."""
        measured = self.config.eval
        config = generation_config(temperature, measured.max_new_tokens)
        emitted = steps = 0
        with self.target.together():
            for start in range(0, len(self.prompts), measured.batch_size):
                batch = self.prompts[start : start + measured.batch_size]
                rows = self.source_rows[start : start + measured.batch_size]
                made = speculative(
                    self.target,
                    batch,
                    config,
                    seeds=[self.config.seed + row for row in rows],
                    drafter=HeadDrafter(head, self.target, measured.tree),
                )
                emitted += sum(made.stats.emitted)
                steps += sum(made.stats.steps)
        counts = torch.tensor([emitted, steps], device=self.target.device)
        emitted, steps = self.total(counts).tolist()
        return emitted / steps if steps else 0.0


def temperature_name(temperature: float) -> str:
    """For keys and messages."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"
