"""The one way commands read their arguments: a dataclass, a YAML file, `--section.key value`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from redrafter.contracts import InputError
from redrafter.processes import check_alone, check_launch, join, launched, linger, one_voice

Config = TypeVar("Config")


class _Formatter(DefaultHelpFormatter):
    """Keeps an epilog's lines; everything else is wrapped as ever."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return super()._fill_text(text, width, indent)


def parse(
    cls: type[Config],
    argv: Sequence[str] | None,
    prog: str,
    description: str | None = None,
    epilog: str | None = None,
    alone: bool = False,
) -> Config:
    """Build a frozen configuration dataclass from the command line.

    `--config FILE.yaml` may stand anywhere and as often as wanted; whatever comes later on the
    line wins. An unknown key, a wrong type, a value out of range or a missing one ends the program
    with status 2 and a message that names it. `--help` shows the text under each field.

    argv: arguments without the program's name; None takes those of this process
    epilog: stands as it is below the options in the help
    alone: the command works in one process and refuses more; others join those of the launch here,
        before any work. Raises InputError where the launch is not what was asked for
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=_Formatter
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the values below.")
    parser.add_class_arguments(cls)
    with one_voice():
        given = parser.parse_args(None if argv is None else list(argv))
        try:
            values = parser.instantiate(given)
            values.pop("config", None)
            config = cls(**vars(values))
        except ValueError as error:  # of a dataclass that does not like its values
            parser.error(str(error))
    if alone:
        check_alone(prog)
    elif launched() == 1:
        check_launch()
    else:
        target = getattr(config, "target", None)
        join(cpu=getattr(target, "device", "auto") == "cpu")
    return config


def reports_input_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorates a command's main(): an InputError becomes its message and status 2, no traceback.

    Any other exception is a fault of ours and keeps its traceback. What all processes of a launch
    have to say is said once.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except InputError as error:
            linger()
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None

    return wrapped
