"""What a launcher is called: `python eval/speed.py` in a clone is `redrafter speed` anywhere.

Texts of the library name the clone's files; who typed the console command may have no clone. So
what a command says before it works (help, refusals) goes through here once, in `cli.args`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCH = "--launch."
#: file of a clone -> the subcommand that does the same, where it does not bear the file's name
_OTHERWISE = {
    "train/redrafter": "train",
    "train/disco": "train-disco",
    "data/check": "check-store",
    "data/bigrams": "count-bigrams",
    "data/probe": "probe-bigrams",
    "data/lookahead": "lookahead-records",
    "scripts/push_to_hub": "push",
}
#: scripts that are launchers, too; others need the clone, and keep their names
_SCRIPTS = "chat|convert_head|push_to_hub|make_smollm2"
_FILE = re.compile(
    r"(?:python |accelerate launch (?P<options>(?:--\w+ (?:[\w/.]+(?<!\.py) )?)*))?"
    rf"(?<![\w/])(?P<file>(?:train|data|eval)/\w+|scripts/(?:{_SCRIPTS}))\.py"
)


def subcommand(script: str) -> str:
    """The words that start what a launcher of a clone starts. script: such as "eval/speed.py" """
    stem = script.removesuffix(".py")
    return f"redrafter {_OTHERWISE.get(stem, Path(stem).name.replace('_', '-'))}"


def from_console() -> bool:
    """Whether this is `redrafter SUBCOMMAND` (whose name `redrafter.cli.main` leaves there), or a
    module of the library that accelerate was told to start for it."""
    program = Path(sys.argv[0])
    return program.name.startswith("redrafter ") or program.parent == Path(__file__).parent


def typed(script: str) -> str:
    """What the user called it: `redrafter SUBCOMMAND`, or the script."""
    name = Path(sys.argv[0]).name
    if name.startswith("redrafter "):
        return name
    return subcommand(script) if from_console() and script.endswith(".py") else script


def asks(words: Sequence[str]) -> bool:
    """Whether a launch by accelerate is asked for."""
    return any(word.startswith(LAUNCH) for word in words)


def as_typed(text: str) -> str:
    """A text that names launchers, with the names that the user of the console can type."""
    return _FILE.sub(_console, text) if from_console() else text


def _console(found: re.Match[str]) -> str:
    """One start, whose options of accelerate's become `--launch.X`."""
    options = (found["options"] or "").strip().replace("--", LAUNCH)
    return f"{subcommand(found['file'])} {options}".rstrip()
