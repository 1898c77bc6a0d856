"""Command: fit a draft head to a frozen language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redrafter import threads
from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import TrainConfig
from redrafter.training.refusals import refuse

_DESCRIPTION = """\
Fit a draft head to a frozen language model, on the model's own answers to your prompts.

  accelerate launch train/redrafter.py --config configs/gsm-stories-6m.yaml --target.path MODEL \\
      --data.source.path PROMPTS.jsonl --data.source.format auto --output_dir OUT

makes the answers and their hidden states (kept in OUT/data), trains on them, measures tokens per
step on held-out prompts as it goes, and leaves the best head in OUT. --resume auto goes on after an
interruption. On many processes (configs/accelerate says how to launch them) it learns the same,
only sooner; any launch can go on from a checkpoint of any other. Without a clone the same is

  redrafter train --launch.config_file ddp --config gsm-stories-6m --target.path MODEL ...

where --launch.X is accelerate launch's --X; `redrafter configs` lists the recipes.

  accelerate launch train/redrafter.py ... --head.kind medusa

trains another kind than ReDrafter's recurrent head from the same stores: medusa, hydra or
mlp_speculator, each with options of its own (docs/add-a-head.md).

  accelerate launch train/redrafter.py --config configs/retune-lora.yaml --target.path MODEL \\
      --head.init_from HEAD --data.source.path PROMPTS.jsonl --output_dir OUT

retunes a head, by LoRA, for a fine-tuned MODEL (an adapter's folder, too) or for other text; HEAD
itself is not changed.

A MODEL larger than one device: on many processes that DeepSpeed started
(configs/accelerate/zero3.yaml), --target.shard zero3 --data.mode online splits its layers among
them; in one process, --target.device_map auto leaves in host memory and on disk what does not fit.

SIGTERM or Ctrl-C, here or to the launcher, ends the run after the step at hand: a checkpoint is
written, the last line says how to go on, and the exit status is 75 (accelerate launch does not pass
it on: 143 with one process, 1 with several).
"""

#: what a first training is told; the rest has defaults that were measured
_FIRST = (
    "target.path", "output_dir", "data.source", "data.stores", "head.kind", "optim.steps",
    "optim.batch_positions", "optim.lr", "eval.every_steps", "resume",
)  # fmt: skip


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """argv: arguments without the program's name; None takes those of this process."""
    config = parse(
        TrainConfig, argv, "train/redrafter.py", _DESCRIPTION,
        plan="training_job:plan_training", refuse=refuse, first=_FIRST,
    )  # fmt: skip
    from transformers.utils import logging  # heavy: not needed for --help

    from redrafter.launcher import last_word
    from redrafter.processes import join, linger
    from redrafter.training.faults import RESUMABLE, Interrupted
    from redrafter.training.loop import train

    threads.settle()
    logging.disable_progress_bar()
    try:
        best = train(config)
    except Interrupted as stop:
        if join().is_main_process:
            last_word(str(stop))
        else:
            linger()  # the launcher ends the others as soon as one is gone
        return RESUMABLE
    if join().is_main_process:
        print(summary(config, best))
    return 0


def summary(config: TrainConfig, best: dict[str, Any]) -> str:
    """What a training ends with. best: of `Training.train`."""
    text = f"{config.output_dir} holds the head of step {best['step']}"
    if rates := best.get("tokens_per_step"):
        found = ", ".join(f"{rate:.2f} ({name})" for name, rate in rates.items())
        text += f", which makes {found} tokens per step on {config.eval.prompts} held-out prompts"
    if config.tracker == "tensorboard":
        text += f"; the curves: tensorboard --logdir {config.output_dir}/logs"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
