"""What is wrong with a training's settings whatever its target and data: known before torch is
imported, so that it is said at once."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from redrafter.config import TrainConfig
from redrafter.contracts import InputError

#: trackers that accelerate knows -> the packages with one of which it can use them
TRACKERS = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def refuse(config: TrainConfig) -> None:
    """Raises InputError for a run that would overwrite another, a checkpoint that is none, or a
    tracker that could not log."""
    find(config.resume, Path(config.output_dir) / "checkpoints")
    check_tracker(config.tracker)


def check_depths(config: TrainConfig, most: int | None) -> None:
    """Raises InputError for depths that the head cannot be trained on or measured at.

    most: levels that it has maps for; None: any
    """
    if most is None:
        return
    if config.optim.depth != most:  # some of its maps would go without a gradient, or be missing
        raise InputError(
            f"optim.depth {config.optim.depth}, but the head of head.init_from has maps for "
            f"{most} depths: set optim.depth {most}"
        )
    if config.eval.prompts and config.eval.tree.depth > most:
        raise InputError(
            f"eval.tree.depth {config.eval.tree.depth}, but this head drafts {most} tokens ahead "
            f"at most (optim.depth): set eval.tree.depth {most}, or train more depths"
        )


def check_prefix(config: TrainConfig, reads_prefix: bool) -> None:
    """Raises InputError for what a head that reads the prefix cannot be trained by."""
    if reads_prefix and config.data.labels == "local":
        raise InputError(
            "data.labels local with a head that reads the prefix (head.prefix attention): starts "
            "of a row share one pass over its text, and local labels give each of them a text of "
            "its own. Take labels tokens or greedy, or head.prefix none"
        )


def check_tracker(name: str | None) -> None:
    """accelerate leaves out, with one warning, a tracker whose package is missing."""
    if name is None or name == "all":
        return
    if name not in TRACKERS:
        near = difflib.get_close_matches(name, TRACKERS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"tracker: {name!r} is unknown; {meant}There are {', '.join(TRACKERS)}, `all` that are "
            "installed, and null for none"
        )
    packages = TRACKERS[name]
    # A folder of that name (wandb's own logs) is found, but has no origin.
    if not any(getattr(find_spec(package), "origin", None) for package in packages):
        raise InputError(
            f"tracker: {name} is not installed, nothing would be logged: pip install "
            f"{packages[0]}, or give --tracker tensorboard, or --tracker null"
        )


def all_steps(folder: Path) -> list[int]:
    """Steps that have a whole checkpoint, ascending."""
    found = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in found if name.isdigit())


def find(resume: str, folder: Path) -> Path | None:
    """What `--resume` means: a checkpoint's folder, or None to start anew.

    Raises InputError where a run would overwrite another, or there is nothing to resume from.
    """
    steps = all_steps(folder)
    if resume == "none":
        if steps:
            raise InputError(
                f"{folder} holds checkpoints up to step {steps[-1]}: give --resume auto to go on, "
                "another --output_dir, or remove it"
            )
        return None
    if resume == "auto":
        return folder / f"step-{steps[-1]}" if steps else None
    if not (Path(resume) / "state.json").is_file():
        raise InputError(f"--resume {resume}: no state.json there; not a checkpoint of a training")
    return Path(resume)
