"""Command: fit a recurrent draft head to a frozen language model."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter import threads
from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import TrainConfig

_DESCRIPTION = """\
Fit a ReDrafter head to a frozen language model, on the model's own answers to your prompts.

  accelerate launch train/redrafter.py --config configs/stories260k.yaml \
--target.path MODEL --output_dir OUT

makes the answers and their hidden states (kept in OUT/data), trains on them, measures tokens per
step on held-out prompts as it goes, and leaves the best head in OUT. --resume auto goes on after an
interruption. On many processes (configs/accelerate says how to launch them) it learns the same,
only sooner; any launch can go on from a checkpoint of any other.

  accelerate launch train/redrafter.py --config configs/retune-lora.yaml \
--target.path MODEL --head.init_from HEAD --output_dir OUT

retunes a head, by LoRA, for a fine-tuned MODEL (an adapter's folder, too) or for other text; HEAD
itself is not changed.

A MODEL larger than one device: on many processes that DeepSpeed started
(configs/accelerate/zero3.yaml), --target.shard zero3 --data.mode online splits its layers among
them; in one process, --target.device_map auto leaves in host memory and on disk what does not fit.

SIGTERM ends the run after the step at hand: a checkpoint is written, the exit status is 75.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """argv: arguments without the program's name; None takes those of this process."""
    config = parse(
        TrainConfig, argv, "train/redrafter.py", _DESCRIPTION, plan="training_job:plan_training"
    )
    from transformers.utils import logging  # heavy: not needed for --help

    from redrafter.processes import join
    from redrafter.training.faults import RESUMABLE, Interrupted
    from redrafter.training.loop import train

    threads.settle()
    logging.disable_progress_bar()
    try:
        best = train(config)
    except Interrupted as stop:
        if join().is_main_process:
            print(stop)
        return RESUMABLE
    if join().is_main_process:
        print(f"{config.output_dir}: head of step {best['step']}", best.get("tokens_per_step", ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
