"""The training run: prepare, step, measure, save, export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redrafter.bars import Bar
from redrafter.config import HeadConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.reading import Part
from redrafter.export.complete import complete
from redrafter.files import (
    plain_values,
    provenance,
    remove_leftovers,
    write_config,
    write_json,
)
from redrafter.heads import lora
from redrafter.heads.base import DraftHead
from redrafter.heads.load import head_class, load_trainable
from redrafter.heads.owner import belong_to
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.training import checkpoint
from redrafter.training.data import (
    check_settings,
    data_folder,
    held_out_prompts,
    load_training_data,
)
from redrafter.training.engine import Engine, connect
from redrafter.training.faults import Interruption, lost_peers
from redrafter.training.feed import Feed, frequent_ids
from redrafter.training.measure import Measure
from redrafter.training.optimizer import learning_rate, make_optimizer
from redrafter.training.refusals import check_depths, check_prefix, find, refuse
from redrafter.training.step import StepLoss, needed_teacher, total_weight

#: values that may change between a checkpoint and the run that resumes from it
_FREE = frozenset(
    {
        "output_dir", "resume", "tracker", "log_steps", "save_steps", "keep_checkpoints", "eval.",
        "target.path", "target.base", "target.gguf_file", "target.device", "target.revision",
        "target.shard", "target.device_map", "target.device_bytes", "target.host_bytes",
        "target.offload_folder", "loss.chunk_rows",
        "optim.max_bad_steps",
        # The digest of the data tells whether these changed anything.
        "data.stores", "data.source.", "data.text", "data.answers.", "data.states.", "data.mode",
        "data.folder", "data.source",
    }
)  # fmt: skip


def load_initial_head(config: HeadConfig, target: Target) -> DraftHead:
    """`head.init_from` for this target, in float32, with LoRA where that is asked for."""
    head = load_trainable(config.init_from, target, True, "head.init_from").float()
    belong_to(head, target)
    return head if config.lora is None else lora.adapt(head, config.lora, config.init_from)


def make_head(config: TrainConfig, target: Target, parts: list[Part]) -> DraftHead:
    """A new head for the target, or the one to go on from; float32."""
    wanted = config.head
    if wanted.init_from is not None:
        head = load_initial_head(wanted, target)
    else:
        fields = dict(wanted.options)
        if (n := fields.pop("draft_vocab_size", None)) is not None:
            fields["draft_ids"] = frequent_ids(parts, n, target.vocab_size)
        cls = head_class(wanted.kind)
        if cls.depth_field is not None:  # one head, or one set of maps, for each depth
            fields[cls.depth_field] = config.optim.depth
        head = cls.for_target(target, **fields)
    head.config.trained_depth = config.optim.depth
    return head


def check_head(config: TrainConfig, target: Target) -> None:
    """Raises InputError where the head of this configuration, or the one to go on from, cannot be
    trained as is asked for; before any data is made, with the states of the layers that it reads:
    the target shows them from here on."""
    if config.head.init_from is not None:
        head = load_initial_head(config.head, target)
        check_depths(config, head.max_depth)
        check_prefix(config, head.reads_prefix)
        return
    cls, fields = head_class(config.head.kind), config.head.options
    sizes = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
    cls.config_class(**sizes, **fields).check("head")
    target.show(fields.get("aux_layers") or ())
    check_depths(config, None if cls.depth_field is None else config.optim.depth)
    check_prefix(config, fields.get("prefix", "none") != "none")


class Training:
    """One training run. `Training(config).train()` returns what the best head measured.

    Every process of a launch makes one; the main process alone writes and prints.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.out = Path(config.output_dir)
        self.checkpoints = self.out / "checkpoints"
        refuse(config)
        self.accelerator = connect(config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        resume_from = self._resume_from()
        # What can be refused is refused before the data is made, which may take days.
        check_settings(config)
        self.target = load_target(config.target, may_shard=True)
        check_head(config, self.target)
        folder, held_out = data_folder(config), None
        if config.eval.prompts > 0:
            held_out = held_out_prompts(config, self.target, folder)
        torch.manual_seed(config.seed)
        data = load_training_data(config, self.target)
        self.head = head = make_head(config, self.target, data.parts)
        optim, share = config.optim, (self.rank, self.world)
        row_starts = optim.row_starts if head.reads_prefix else None
        self.feed = Feed(
            self.target, data.parts, data.weights,
            positions=optim.batch_positions * optim.accumulation, depth=optim.depth,
            seed=config.seed, buffer_rows=config.data.buffer_rows, labels=config.data.labels,
            draft_ids=getattr(head, "draft_ids", None), teacher=needed_teacher(config.loss),
            row_starts=row_starts, share=share,
        )  # fmt: skip
        self.data_digest, self.data_receipt = data.digest, data.receipt
        self.done = 0  # optimiser steps
        self.skipped = 0  # of them, before this process began
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        if resume_from is not None:
            self._read(resume_from, head)
        loss = StepLoss(head, self.target, config.loss)
        self.engine = Engine(self.accelerator, loss, make_optimizer(head, optim), optim)
        if resume_from is not None:
            self.engine.parts.load_averages(checkpoint.load_averages(resume_from, head))
            checkpoint.load_generators(resume_from)
        self.measure = None
        if held_out is not None:
            total = self.engine.sum
            self.measure = Measure(
                self.target, held_out, config, folder, share, total, row_starts
            )

    def _resume_from(self) -> Path | None:
        if self.config.resume == "auto" and self.main:
            for text in checkpoint.set_aside(self.checkpoints):
                print(text)
        self.accelerator.wait_for_everyone()
        return find(self.config.resume, self.checkpoints)

    # -- the loop --------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end and export the best head to the output folder.

        Raises Interrupted after a SIGTERM, when a checkpoint is written.
        """
        if self.main:
            self._begin()
        if self.config.tracker is not None:
            scalars = checkpoint.flat(plain_values(self.config))
            self.accelerator.init_trackers(
                "redrafter", {k: v for k, v in scalars.items() if isinstance(v, (int, float, str))}
            )
        with lost_peers(self.world, self.checkpoints), Interruption() as self.interruption:
            self._loop()
            if self.main:
                self._export()
            for text in self.feed.end(self.done):
                if self.main:
                    print(text)
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.best or {"step": self.done}

    def _begin(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.checkpoints)
        write_config(self.out / "config.yaml", self.config)

    def _loop(self) -> None:
        config, total = self.config, self.config.optim.steps
        window, clock = None, time.perf_counter()
        bar = Bar(
            total=total, initial=self.done, desc="training", unit="step", disable=not self.main
        )
        with bar:
            while self.done < total:
                counts = self._step(self.done)
                window = counts if window is None else window + counts
                self.done += 1
                bar.update()
                last = self.done == total
                evaluate = self.measure and (last or self.done % config.eval.every_steps == 0)
                save = last or self.done % config.save_steps == 0
                log = self.done % config.log_steps == 0 or evaluate or save
                stop = not last and self._stop(log)
                if log:
                    self._log(window, time.perf_counter() - clock, bar)
                    window, clock = None, time.perf_counter()
                if evaluate:
                    save |= self._evaluate(bar)
                    clock = time.perf_counter()
                if save or stop:
                    self._save()
                if stop:
                    raise self.interruption.stopped(self.checkpoints / f"step-{self.done}")

    def _step(self, step: int) -> Tensor:
        """One optimiser step. Returns the counts of `batch_loss`, of this process."""
        config, optim = self.config, self.config.optim
        batch = self.feed.step(step)
        weight = total_weight(batch, config.loss)
        # A signal may reach only one process: its news travels with what is summed anyway.
        asked = torch.full_like(weight, float(self.interruption.asked))
        self.shared = self.engine.sum(torch.stack((weight, asked)))
        return self.engine.step(
            batch.split(optim.accumulation), self.shared[0], learning_rate(optim, step),
            done=step / max(1, optim.steps - 1),
        )  # fmt: skip

    def _stop(self, log: bool) -> bool:
        """Whether all processes should stop after this step; the same in all of them.

        On an accelerator only where the device is read anyway, every `log_steps`.
        """
        if self.world == 1:
            return self.interruption.asked
        if self.accelerator.device.type != "cpu" and not log:
            return False
        return bool(self.shared[1])

    def _log(self, window: Tensor, seconds: float, bar: Bar) -> None:
        """The only place that reads the loss from the device."""
        n, hits, losses = self.engine.sum(window).tolist()
        skipped, _, in_a_row = self.engine.skips.tolist()
        loss, top_1 = sum(losses) / max(1.0, sum(n)), sum(hits) / max(1.0, sum(n))
        limit = self.config.optim.max_bad_steps
        if in_a_row >= limit:
            raise InputError(
                f"the loss or its gradient was not finite in {in_a_row} optimiser steps in a row "
                f"before step {self.done} (optim.max_bad_steps {limit}): these steps were left "
                "out. Lower optim.lr, set optim.clip_norm, or use a wider target.dtype"
            )
        shown = {"loss": f"{loss:.3f}", "top1": f"{top_1:.3f}"}
        skipped += self.skipped
        bar.set_postfix(**shown, **({"skipped": skipped} if skipped else {}), refresh=False)
        values = {
            "train/learning_rate": learning_rate(self.config.optim, self.done - 1),
            "train/tokens_per_s": sum(n) / seconds,
            "train/skipped_steps": skipped,
        }
        if sum(n):  # else all of them were skipped
            values |= {"train/loss": loss, "train/top_1": top_1}
        self._track(values)

    def _track(self, values: dict[str, float]) -> None:
        if self.config.tracker is not None:
            self.accelerator.log(values, step=self.done)

    def _evaluate(self, bar: Bar) -> bool:
        """Measure the head; True if it is the best so far."""
        found = {"step": self.done, **self.measure(lora.merged(self.engine.whole_head()))}
        self.engine.release()
        self.history.append(found)
        first = found["tokens_per_step"][self.measure.names[0]]
        self._track({f"eval/{k}": v for k, v in checkpoint.flat(_scalars(found)).items()})
        rates = ", ".join(f"{v:.2f} ({k})" for k, v in found["tokens_per_step"].items())
        if self.main:
            bar.write(f"step {self.done}: tokens per step {rates}")
        better = self.best is None or first > self.best["tokens_per_step"][self.measure.names[0]]
        if better:
            self.best = found
        return better

    # -- files -----------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {
            "config": plain_values(self.config),
            "data_digest": self.data_digest,
            "target_fingerprint": self.target.fingerprint(),
        }

    def _save(self) -> None:
        """All processes give what they hold, the main process writes."""
        head, averages = self.engine.whole_head(), self.engine.parts.averages()
        if self.main:
            skipped = self.skipped + int(self.engine.skips[0])
            state = {**self._facts(), "best": self.best, "history": self.history,
                     "processes": self.world, "skipped_steps": skipped}  # fmt: skip
            checkpoint.save(self.checkpoints, self.done, head, averages, state)
            best = self.best["step"] if self.best else None
            checkpoint.prune(self.checkpoints, max(1, self.config.keep_checkpoints), best)
        self.engine.release()
        self.accelerator.wait_for_everyone()

    def _read(self, path: Path, head: DraftHead) -> None:
        """Weights and progress of a checkpoint, if it is one of this run."""
        state = checkpoint.read_state(path)
        facts = self._facts()
        checkpoint.check_same(state["config"], facts.pop("config"), _FREE, path)
        for name, value in facts.items():
            if state[name] != value:
                raise InputError(
                    f"{path} was made with another {name.replace('_', ' ')} ({state[name][:12]}, "
                    f"now {value[:12]}): give the same target, prompts and seed, or start anew"
                )
        checkpoint.load_weights(path, head)
        self.done, self.best, self.history = state["step"], state["best"], state["history"]
        self.skipped = state.get("skipped_steps", 0)
        if self.best and (wrong := checkpoint.fault(path.parent / f"step-{self.best['step']}")):
            if self.main:
                print(f"{wrong}: the best head so far is lost, the next evaluation counts anew")
            self.best = None

    def _export(self) -> None:
        """The best head, as `load_head` reads it, with where it came from."""
        step = self.best["step"] if self.best else self.done
        checkpoint.export(self.checkpoints / f"step-{step}", self.head, self.out)
        facts = provenance(
            **self._facts(), data=self.data_receipt, step=step, best=self.best,
            history=self.history, processes=self.world,
            skipped_steps=self.skipped + int(self.engine.skips[0]),
        )  # fmt: skip
        write_json(self.out / "provenance.json", facts)
        for text in complete(self.out, self.target, self.measure and self.measure.prompts):
            print(text)


def _scalars(found: dict[str, Any]) -> dict[str, Any]:
    """Lists by depth as `..._at_1`, ...; None (nothing to count) left out."""
    result: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            result[key] = _scalars(value)
        elif isinstance(value, list):
            result |= {f"{key}_at_{i}": v for i, v in enumerate(value, start=1) if v is not None}
        elif key != "step" and value is not None:
            result[key] = value
    return result


def train(config: TrainConfig) -> dict[str, Any]:
    """Training a training; see `Training`."""
    return Training(config).train()
