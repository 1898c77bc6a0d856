"""A head that learns while it drafts: from the text that is decoded anyway, between two steps.

What a step emits is known with the target's hidden states: the levels that were accepted, and what
the target said where one was rejected. The newest of it is kept (`ring.py`), and every so many
tokens a copy of the head, the *student*, takes one optimiser step on it by the trainer's own loss;
then the head that drafts is given the student's weights. That happens in a lookahead's `observe`,
after a verification and before the next draft, so that all levels of a draft are of one head; and
no more often than a share of the time allows. The text is the target's whatever the head becomes.

Source: ours; a draft model that is distilled while it serves is Online Speculative Decoding's
(arXiv 2310.07177).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from redrafter.config import LearnConfig, OptimConfig
from redrafter.contracts import InputError, Lookahead, RowState, Truth
from redrafter.data.reading import generator
from redrafter.drafting import Strategy
from redrafter.files import plain_values, remove_leftovers
from redrafter.heads import lora
from redrafter.heads.base import DraftHead
from redrafter.learning.ring import Ring
from redrafter.lookahead.wrapped import WrappedLookahead
from redrafter.processes import name_the_cpu
from redrafter.targets.model import Target
from redrafter.training import checkpoint
from redrafter.training.feed import Batch, draft_columns, gather
from redrafter.training.optimizer import learning_rate, make_optimizer
from redrafter.training.refusals import find
from redrafter.training.sharded import Whole
from redrafter.training.step import batch_loss, needed_teacher, total_weight


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Learner:
    """Lets a head learn from every generation of the strategies that it watches.

        with Learner(head, target, folder) as learner:
            strategy = learner.watching(load_strategy(target, "head:4x4", head=head))
            generate(target, ..., draft=strategy)      # as often as you like

    head: the one that drafts, from `load_head`; its weights change between steps, its folder does
        not
    folder: for checkpoints, and for the learned head as `load_head` reads it; what an earlier
        learner of the same head left there is gone on from. None keeps nothing
    clock: seconds; by it the time of decoding (prefills left out) and of learning is measured
    tell: called with what the user should know
    steps, skipped: optimiser steps made, and left out because they were not finite
    decode_s, learning_s: seconds so far, of this object
    Raises InputError where the head cannot learn, or the folder is not one of this head's learner.
    """

    def __init__(
        self,
        head: DraftHead,
        target: Target,
        folder: str | Path | None = None,
        settings: LearnConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
        tell: Callable[[str], None] = _tell,
    ):
        if head.only_drafts:
            raise InputError(f"learn: {head.only_drafts} can draft here, but not be trained")
        if head.reads_prefix:
            raise InputError(
                "learn: this head reads the whole row (head.prefix attention), of which only the "
                "newest tokens are kept: take a head trained with head.prefix none, or retrain it"
            )
        self.head, self.target, self.clock, self.tell = head, target, clock, tell
        self.settings = settings = (settings or LearnConfig()).resolved()
        self.folder = None if folder is None else Path(folder)
        self.facts = {
            "start": head.fingerprint(), "target": target.fingerprint(),
            "lora": plain_values(settings.lora),
        }  # fmt: skip
        self.steps = self.skipped = 0
        self.decode_s = self.learning_s = 0.0
        self._ring = Ring(settings.buffer_tokens)
        self._new_tokens, self._step_s, self._saved = 0, 0.0, 0
        depth = head.max_depth or head.config.trained_depth or OptimConfig.depth
        self._optim = OptimConfig(
            lr=settings.lr, warmup_steps=settings.warmup_steps, final_lr_ratio=1.0, depth=depth
        )
        self._to_draft = draft_columns(getattr(head, "draft_ids", None), target.vocab_size)
        found = self._checkpoint()
        with torch.inference_mode(False):
            self.student = _student(head, target, settings)
            self._optimizer = make_optimizer(self.student, self._optim)
            if found is not None:
                self._go_on(found)

    def watching(self, strategy: Strategy) -> Strategy:
        """The same strategy; what it decodes is learned from."""
        return replace(strategy, lookahead=_Watching(strategy.lookahead, self))

    # -- between steps -----------------------------------------------------------------------

    def begin(self, n_rows: int) -> None:
        """A generation of so many rows begins."""
        self._ring.begin(n_rows)
        self._since = self.clock()

    def observe(self, truth: Truth) -> None:
        """What a step emitted; then, if it is time, an optimiser step."""
        now = self.clock()
        self.decode_s += now - self._since
        rows = truth.rows()
        self._ring.add(rows, self.target.pick(truth.hidden, self.head.aux_layers))
        self._new_tokens += sum(map(len, rows))
        if self._due():
            before = self.clock()
            with torch.inference_mode(False):
                self._learn()
            self._step_s = self.clock() - before
            if self.steps - self._saved >= self.settings.save_steps:
                self.save()
        self._since = self.clock()
        self.learning_s += self._since - now

    def _due(self) -> bool:
        """Whether there is something new, and a step like the last one keeps within the share."""
        if self._new_tokens < self.settings.every_tokens:
            return False
        learning_s = self.learning_s + self._step_s
        return learning_s <= self.settings.share * (self.decode_s + learning_s)

    def _learn(self) -> None:
        """One step of the student, which the head then follows."""
        batch = self._batch()
        if batch is None:
            return
        self._new_tokens = 0
        if not self._step(batch):
            if not self.skipped:
                self.tell(
                    "learning: the loss or its gradient was not finite; the step is left out, as "
                    "others will be without a word (lower learning.lr)"
                )
            self.skipped += 1
            return
        self.steps += 1
        self._publish()

    def _batch(self) -> Batch | None:
        """Positions drawn from the ring; None while it holds too few."""
        found, n = self._ring.columns(), self.settings.batch_positions
        if found is None or len(found[1]) < n:
            return None
        columns, starts = found
        drawn = generator(self.settings.seed, self.steps, self.skipped)
        t = starts[torch.randint(len(starts), (n,), generator=drawn).to(starts.device)]
        dtype = columns["states"].dtype
        return gather(
            columns, t, self._optim.depth, dtype, to_draft=self._to_draft,
            teacher=needed_teacher(self.settings.loss), last=self.target.hidden_size,
        )  # fmt: skip

    def _step(self, batch: Batch) -> bool:
        """Returns False, and changes nothing, where a number is not finite."""
        student, loss_config = self.student.train(), self.settings.loss
        self._optimizer.zero_grad()  # an interrupted step may have left some
        weight = total_weight(batch, loss_config)
        loss, _ = batch_loss(student, student, self.target, batch, loss_config, weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), self._optim.clip_norm)
        fine = bool((norm + loss.detach()).isfinite())
        if fine:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self._optim, self.steps)
            self._optimizer.step()
        return fine

    @torch.no_grad()
    def _publish(self) -> None:
        """The head that drafts takes the student's weights, in its own precision."""
        self.head.load_state_dict(lora.merged(self.student.eval()).state_dict())
        self.head.eval()  # what it had packed for products is of the old ones
        self.head.__dict__.pop("_fingerprint", None)

    # -- files -------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint, and the learned head in the folder itself; each whole or absent."""
        if self.folder is None or self._saved == self.steps:
            return
        name_the_cpu()  # in order to save, transformers imports DeepSpeed
        state = {"learner": self.facts, "settings": plain_values(self.settings),
                 "skipped_steps": self.skipped}  # fmt: skip
        averages = Whole(self.student, self._optimizer).averages()
        place = self.folder / "checkpoints"
        path = checkpoint.save(place, self.steps, self.student, averages, state)
        checkpoint.export(path, self.student, self.folder)
        checkpoint.prune(place, self.settings.keep_checkpoints, None)
        self._saved = self.steps

    def _checkpoint(self) -> Path | None:
        """The newest one of the folder, if there are any."""
        if self.folder is None:
            return None
        place = self.folder / "checkpoints"
        if find("auto", place) is None and (self.folder / "config.json").exists():
            raise InputError(
                f"learn: {self.folder} holds a head that no learner left there: give an empty or "
                "new folder"
            )
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"learn: {place} cannot be made ({error}): give a folder") from None
        for text in checkpoint.set_aside(place):
            self.tell(text)
        remove_leftovers(place)
        return find("auto", place)

    def _go_on(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        was = state.get("learner")
        if was is None:
            raise InputError(f"learn: {path} is a training's: give an empty or new folder")
        for name, value in self.facts.items():
            if was[name] != value:
                raise InputError(
                    f"learn: {path} was left by the learner of another {name} ({was[name]}, now "
                    f"{value}): give what it learned with, or another folder"
                )
        checkpoint.load_weights(path, self.student)
        averages = checkpoint.load_averages(path, self.student)
        Whole(self.student, self._optimizer).load_averages(averages)
        self.steps, self.skipped = state["step"], state["skipped_steps"]
        self._saved = self.steps
        self._publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.save()

    def report(self) -> dict[str, Any]:
        """What it took, JSON-able."""
        return {
            "steps": self.steps, "skipped_steps": self.skipped,
            "learning_s": self.learning_s, "decode_s": self.decode_s,
        }  # fmt: skip


def _student(head: DraftHead, target: Target, settings: LearnConfig) -> DraftHead:
    """A copy to train, at least in float32; with LoRA where that is asked for."""
    student = type(head)(head.config)
    student.load_state_dict(head.state_dict())
    dtype = next(head.parameters()).dtype
    student = student.to(target.device, torch.float64 if dtype == torch.float64 else torch.float32)
    student.bind(target)
    if settings.lora is not None:
        lora.adapt(student, settings.lora, getattr(head, "name_or_path", ""))
    return student


class _Watching(WrappedLookahead):
    """Decides as another lookahead does; the learner is told what came of every step."""

    def __init__(self, inner: Lookahead | None, learner: Learner):
        super().__init__(inner)
        self.learner = learner
        self.needs = self.needs | {"hidden"}

    def begin(self, seqs: RowState) -> None:
        super().begin(seqs)
        self.learner.begin(len(seqs.length))

    def observe(self, drafted: Tensor, accepted: Tensor, truth: Truth) -> None:
        super().observe(drafted, accepted, truth)
        self.learner.observe(truth)
