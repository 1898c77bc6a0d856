"""`redrafter train`: what `accelerate launch train/redrafter.py` is in a clone; and the launch of
any other subcommand in several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from redrafter.cli.args import reports_input_errors
from redrafter.cli.naming import LAUNCH, asks
from redrafter.shipped import find


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Trains in this process, or becomes accelerate's launcher where `--launch.X` is given."""
    words = sys.argv[1:] if argv is None else argv
    if not asks(words):
        from redrafter.cli.train_redrafter import main as train

        return train(words)
    become(["redrafter.cli.train_redrafter"], words)


@reports_input_errors
def launch(words: Sequence[str]) -> int:
    """Becomes accelerate's launcher of another subcommand, the first of the words."""
    become(["redrafter.cli.main", words[0]], words[1:])


def become(module: Sequence[str], words: Sequence[str]) -> NoReturn:
    """module: and the first of its arguments"""
    options, own = split(words)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", *module, *own]
    os.execv(sys.executable, command)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(accelerate's arguments, training's own). A file of configs/accelerate may go by its name.

    Raises InputError for a configuration of a launch that is nowhere.
    """
    launch: list[str] = []
    own: list[str] = []
    here = own  # where a value that stands by itself belongs
    for word in words:
        if word.startswith(LAUNCH):
            name, equals, value = word.removeprefix(LAUNCH).partition("=")
            launch += [f"--{name}", *[value] * bool(equals)]
            here = own if equals else launch
        else:
            here = own if word.startswith("-") else here
            here.append(word)
            here = own
    for i, word in enumerate(launch[1:], start=1):
        if launch[i - 1] == "--config_file" and not os.path.exists(word):
            launch[i] = str(find(word, "accelerate", "launch.config_file"))
    return launch, own
