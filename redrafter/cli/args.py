"""The one way commands read their arguments: a dataclass, a YAML file, `--section.key value`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from redrafter.cli.given import look, with_recipes
from redrafter.cli.naming import as_typed, typed
from redrafter.config import PlanConfig
from redrafter.contracts import InputError
from redrafter.launcher import end_launcher, follow, last_word, sigterm_interrupts
from redrafter.processes import (
    check_alone,
    check_launch,
    hide_bars,
    is_main,
    join,
    launched,
    linger,
    one_voice,
    say,
)

Config = TypeVar("Config")
_HELPS = {"-h", "--help", "--help-all"}
_LINE = 100  # of what is written to be read line by line
_SCREEN = 20  # options that a help text may explain at once


class _Formatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Line by line as it was written, commands as they are typed; too long ones are wrapped."""
        lines = text.splitlines()
        filled = [
            line if len(line) <= _LINE else textwrap.fill(line, width, break_on_hyphens=False)
            for line in lines
        ]
        return textwrap.indent("\n".join(filled), indent)


class _All(argparse.Action):
    """`--help-all`"""

    def __call__(self, parser: ArgumentParser, *_: object) -> NoReturn:
        parser.first = ()
        parser.print_help()
        parser.exit()


class _Parser(ArgumentParser):
    """Says in one line what is wrong, and which option was probably meant; no usage of eighty."""

    #: options that `--help` shows; none: all
    first: Sequence[str] = ()
    #: that are parsed; of the class: a group that may be null is read by another parser
    words: ClassVar[Sequence[str]] = ()

    def teach(self, first: Sequence[str], must: Sequence[str], told: str) -> None:
        """Where all options would fill screens, let `--help` show what must be given, and what is
        first, or else what the text names. Raises ValueError for one that there is not."""
        known = {name for action in self._actions for name in action.option_strings}
        if unknown := {f"--{name}" for name in first} - known:
            raise ValueError(f"no option {sorted(unknown)}")
        n = len({id(action) for action in self._actions})
        if n <= _SCREEN:
            return
        self.add_argument(
            "--help-all", action=_All, nargs=0, default=argparse.SUPPRESS,
            help=f"Explain all {n} options.",
        )  # fmt: skip
        words = () if first else re.findall(r"--[\w.]+", told)
        named = {k for word in words for k in known if f"{word}.".startswith(f"{k}.")}
        always = ("config", "help", "help-all", "plan", "list")
        self.first = [*named, *(f"--{name}" for name in (*first, *must, *always))]

    def format_help(self) -> str:
        if self.first:
            self.usage = "%(prog)s [options]"
            for group in self._action_groups:
                for action in group._group_actions:
                    if not set(action.option_strings) & set(self.first):
                        action.help = argparse.SUPPRESS
                if all(a.help is argparse.SUPPRESS for a in group._group_actions):
                    group.title = group.description = None
        return as_typed(super().format_help())

    def whole(self, message: str) -> str:
        """A refusal of a key by its last part alone, with the option that was given for it."""
        key = re.match(r"\w+(?=: )", message) or re.search(r"(?<=Option ')\w+", message)
        given = [word.partition("=")[0].removeprefix("--") for word in self.words]
        named = [name for name in given if key and name.endswith(f".{key[0]}")]
        return message.replace(key[0], named[0], 1) if named else message

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        words = []
        if message.startswith("unrecognized arguments"):
            words = re.findall(r"--[\w.-]+", message)
        elif wrong := re.match(r"Option '(.*)' is not accepted", message):
            words = [f"--{wrong[1]}"]
        elif wrong := re.search(r"Group '(.*)' does not accept option '(.*)'", message):
            words = [f"--{wrong[1]}.{wrong[2]}"]
            message += named_in(wrong[2], self.words)
        near = [m for word in words for m in difflib.get_close_matches(word, known, n=1)]
        message = self.whole(plainly(message))
        if below := re.match(r"Option '(.*\.)\w+' is not accepted", message):
            near = [f"--{below[1]}{name[2:]}" for name in near]  # of a group's own parser
        meant = f"; did you mean {' '.join(near)}?" if near else ""
        said = as_typed(f"error: {message}{meant}")
        self.exit(_REFUSED, f"{said} ({self.prog} --help explains all options)\n")


#: what jsonargparse says -> how it is said here
_PLAINLY = {
    r'Parser key "([\w.]+)":': r"\1:",
    r"<class '(\w+)'>": r"\1",
    r"\ba typing\.Literal\[(.*?)\]": r"one of \1",
    r"\btyping\.Literal\[(.*?)\]": r"\1",
    r"\bExpected (?:an? )?(.*?)\. Got value: (.*)": r"expected \1, not \2",
    r"\bNoneType\b": "null",
}


def named_in(key: str, words: Sequence[str]) -> str:
    """Which of the files given as `--config` has such a key."""
    files = (word for before, word in pairwise(words) if before == "--config")
    found = [file for file in files if f"{key}:" in Path(file).read_text(encoding="utf-8")]
    return f", in {' and '.join(found)}" if found else ""


_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<kinds>.*?)\] "
    r"Errors: - (?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)"
)


def _of_union(found: re.Match[str]) -> str:
    """What is wrong inside a value, where it is one of its kinds; else which kinds there are."""
    inside = [e for e in found["errors"].split(" - ") if not e.startswith("Expected a ")]
    return "; ".join(inside) or f"expected one of {found['kinds']}, not {found['value']}"


def plainly(message: str) -> str:
    """jsonargparse's refusal on one line, without the notation of Python's types."""
    message = _UNION.sub(_of_union, " ".join(message.split()))
    for theirs, ours in _PLAINLY.items():
        message = re.sub(theirs, ours, message)
    return message


def parse(
    cls: type[Config],
    argv: Sequence[str] | None,
    prog: str,
    description: str | None = None,
    names: str | None = None,
    alone: bool = False,
    plan: str | None = None,
    refuse: Callable[[Config], None] | None = None,
    first: Sequence[str] = (),
) -> Config:
    """Build a frozen configuration dataclass from the command line.

    `--config FILE.yaml` may stand anywhere and as often as wanted; whatever comes later on the
    line wins. An unknown key, a wrong type, a value out of range or a missing one ends the program
    with status 2 and a message that names it. `--help` shows the text under each field.

    argv: arguments without the program's name; None takes those of this process
    names: function of `redrafter.evaluation.methods` that describes the names which an option
        takes. Adds `--list`, which prints that and ends the program
    alone: the command works in one process and refuses more; others join those of the launch here,
        before any work. Raises InputError where the launch is not what was asked for
    plan: "module:function" of `redrafter.planning` that plans such a job. Adds `--plan`, which
        prints the plan and ends the program instead of returning; InputError where it cannot fit
    first: names of options that `--help` shows beside those that must be given, where there are
        many; none: those that the description names. `--help-all` shows all
    refuse: raises InputError for what is known to be wrong before anything heavy is imported
    """
    words = _words(cls, argv, plan is not None)
    make = _parser_of.__wrapped__ if _HELPS & set(words) else _parser_of  # helping changes it
    parser = make(cls, typed(prog), description, names is not None, plan is not None, tuple(first))
    if names is not None and "--list" in words:
        _list(names)
    config, planned, wanted = _read(parser, cls, words)
    if planned:
        show_plan(plan, config, wanted)
        raise SystemExit(0)
    _settle(config, prog, alone, refuse)
    return config


def _words(cls: type, argv: Sequence[str] | None, plans: bool) -> list[str]:
    """What the parser reads of the arguments."""
    words = with_recipes(sys.argv[1:] if argv is None else argv)
    if plans and "--plan" in words:
        # Paths may be left out; those given stand later on the line and win.
        kinds = get_type_hints(cls)
        words = [f"--{name}=" for name in _required(cls) if kinds.get(name) is str] + words
    return words


@functools.cache  # a process may run a command often
def _parser_of(
    cls: type, prog: str, description: str | None, lists: bool, plans: bool, first: tuple[str, ...]
) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, description=description, formatter_class=_Formatter)
    parser.add_argument("--config", action="config", help="YAML file with any of the values below.")
    parser.add_class_arguments(cls)
    if lists:
        parser.add_argument("--list", action="store_true", help=_LIST_HELP)
    if plans:
        parser.add_argument("--plan", action="store_true", help=_PLAN_HELP)
        parser.add_class_arguments(PlanConfig, "plan_for")
    parser.teach(first, _required(cls), description or "")
    return parser


def _read(
    parser: _Parser, cls: type[Config], words: Sequence[str]
) -> tuple[Config, bool, PlanConfig | None]:
    """(the configuration, whether a plan is asked for, what it is to plan for)."""
    with one_voice():
        _Parser.words = words
        given = parser.parse_args(words)
        try:
            values = parser.instantiate(given)
            for name in ("config", "list"):
                values.pop(name, None)
            planned, wanted = values.pop("plan", False), values.pop("plan_for", None)
            return cls(**vars(values)), planned, wanted
        except ValueError as error:  # of a dataclass that does not like its values
            parser.error(str(error))


def _list(names: str) -> NoReturn:
    say(getattr(import_module("redrafter.evaluation.methods"), names)())
    raise SystemExit(0)


def _settle(
    config: Config, prog: str, alone: bool, refuse: Callable[[Config], None] | None
) -> None:
    """What is known to be wrong; then meet the other processes of the launch, where there are any
    and the command works in several."""
    if refuse is not None:
        refuse(config)
    look(config)
    if alone:
        check_alone(prog)
    elif launched() == 1:
        check_launch()
    else:
        target = getattr(config, "target", None)
        join(cpu=getattr(target, "device", "auto") == "cpu")


_LIST_HELP = "Print every name of a drafter or method, with its options, and stop there."
_PLAN_HELP = (
    "Say what the job needs on this device with this launch (memory, disk, hours by a short probe, "
    "and what a draft may gain), refuse what cannot fit, and stop there. Paths of data and output "
    "may be left out, and a target that is only a config.json will do."
)


def _required(cls: type, above: str = "") -> list[str]:
    """Names of the options without a default, those of required groups included."""
    kinds, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        name, kind = f"{above}{field.name}", kinds[field.name]
        if field.default is field.default_factory is dataclasses.MISSING:
            whole = dataclasses.is_dataclass(kind)
            found += _required(kind, f"{name}.") if whole else [name]
    return found


def show_plan(plan: str, config: object, wanted: PlanConfig) -> None:
    """Print the plan, on the first process of a launch. Raises InputError where it cannot fit."""
    from redrafter.planning.machine import is_first_process

    module, function = plan.split(":")
    made = getattr(import_module(f"redrafter.planning.{module}"), function)(config, wanted)
    if is_first_process():
        print(made.show(), flush=True)
    made.check()


#: exit status of a command that has said in one line what it cannot take, as argparse has it
_REFUSED = 2
_STOPPED = "what is written is whole, the same command goes on from it or begins anew"


def reports_input_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorates a command's main(): an InputError becomes its message and status 2, no traceback,
    also not of a launcher; SIGINT and SIGTERM (or a launcher that is gone) one line and 128 +
    their number.

    Any other exception is a fault of ours and keeps its traceback. What all processes of a launch
    have to say is said once.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        follow()
        if not sys.stderr.isatty():  # a log would have a hundred fragments of each
            hide_bars()
        try:
            with sigterm_interrupts():
                return main(argv) or 0
        except InputError as error:
            linger()
            print(as_typed(f"error: {error}"), file=sys.stderr, flush=True)
            end_launcher()
            raise SystemExit(_REFUSED) from None
        except SystemExit as end:
            if end.code == _REFUSED:  # the parser has said why
                end_launcher()
            raise
        except KeyboardInterrupt as stop:
            name = str(stop) or "SIGINT"
            if is_main():
                last_word(f"stopped by {name}: {_STOPPED}")
            raise SystemExit(128 + signal.Signals[name]) from None

    return wrapped
