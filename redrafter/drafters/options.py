"""Names with options, such as `suffix:10x2:factor=1.5` or `mix(head:4x3,lookup):nodes=17`.

    name    kind[(name,name,...)][:part...]
    part    key=value, in any number and order, or one of the kind's positional shorthands, in order

What a kind's options are is read off the function that makes it: the parameters behind its
positional ones, with their types and defaults. `**options` that the function passes on to a class
stand for what that class still lacks. Brackets protect what is in them: a value may be a list.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import textwrap
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from redrafter.contracts import InputError

_OPEN, _CLOSE = "([{", ")]}"


def split_list(text: str, separator: str = ",") -> list[str]:
    """Split outside of brackets; items are stripped. Raises InputError for unmatched brackets.

    `a,mix(b,c):n=2` -> [`a`, `mix(b,c):n=2`]
    """
    items, expected = [""], []
    for letter in text:
        if letter in _OPEN:
            expected.append(_CLOSE[_OPEN.index(letter)])
        elif letter in _CLOSE and (not expected or expected.pop() != letter):
            raise InputError(f"{text!r}: {letter!r} closes no bracket")
        if letter == separator and not expected:
            items.append("")
        else:
            items[-1] += letter
    if expected:
        raise InputError(f"{text!r}: {expected[-1]!r} is missing")
    return [item.strip() for item in items]


@dataclass(frozen=True)
class Name:
    """A name taken apart. text: as it was written; members: the names in its brackets, None where
    it has no brackets; parts: what stands behind its colons"""

    text: str
    kind: str
    members: tuple[str, ...] | None
    parts: tuple[str, ...]


def parse_name(text: str) -> Name:
    """Raises InputError naming the text where it is no name."""
    first, *parts = split_list(text, ":")
    found = re.fullmatch(r"(\w[\w-]*)(?:\((.*)\))?", first, re.DOTALL)
    if not found:
        raise InputError(f"{text!r} is no name: write kind:key=value:..., e.g. head:4x4")
    members = None
    if found[2] is not None:
        members = tuple(item for item in split_list(found[2]) if item)
    return Name(text, found[1], members, tuple(parts))


def options_of(
    name: str,
    parts: Sequence[str],
    make: Callable[..., Any],
    size: tuple[str, ...] | None = None,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """The options that the parts of a name set, typed; those not named have their defaults.

    name: for messages; make: whose options they are
    size: the options that a part AxB (or A) sets; more: those set by the positional parts behind it
    Raises InputError naming the name, the key and what there is.
    """
    _, known = _parser(make)
    given, place = {}, 0
    for part in parts:
        key, equals, value = part.partition("=")
        if equals:
            pairs = {key.strip(): value.strip()}
        else:
            pairs = _positional(name, part, place, size, more)
            place += 1
        for key, value in pairs.items():
            if key not in known:
                has = f"there are {', '.join(known)}" if known else "it has none"
                raise InputError(f"{name!r}: no option {key!r}; {has}")
            if key in given:
                raise InputError(f"{name!r}: {key} is set twice")
            given[key] = value
    for key in _required(make):
        if key not in given:
            raise InputError(f"{name!r}: {key} must be given")
    try:
        return deepcopy(_read(make, *(f"--{key}={value}" for key, value in given.items())))
    except ArgumentError as error:
        named = re.search(r'"(\w+)"', str(error))
        if not named or named[1] not in given:
            raise
        wanted, value = _type_name(known[named[1]]), given[named[1]]
        raise InputError(f"{name!r}: {named[1]}: {value!r} is not {wanted}") from None


def _positional(
    name: str, part: str, place: int, size: tuple[str, ...] | None, more: Sequence[str]
) -> dict[str, str]:
    if size is None:
        raise InputError(f"{name!r}: {part!r} is not key=value")
    if place == 0:
        found = re.fullmatch("x".join([r"([1-9]\d*)"] * len(size)), part)
        if not found:
            wanted, example = "x".join(key.upper() for key in size), "x".join("4" * len(size))
            raise InputError(
                f"{name!r}: {part!r} is neither key=value nor {wanted}, e.g. {example}"
            )
        return dict(zip(size, found.groups(), strict=True))
    if place > len(more):
        raise InputError(f"{name!r} has parts too many; see --help")
    return {more[place - 1]: part}


@functools.cache
def _parser(make: Callable[..., Any]) -> tuple[ArgumentParser, dict[str, Any]]:
    """A parser of the options, and {option: its type}. What is given as an object, such as another
    drafter's state, is no option."""
    skip = {
        key
        for key, parameter in inspect.signature(make).parameters.items()
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and not inspect.isclass(make)
    }
    while True:
        parser = ArgumentParser(exit_on_error=False, add_help=False)
        add = parser.add_class_arguments if inspect.isclass(make) else parser.add_function_arguments
        add(make, skip=skip)
        kinds = {action.dest: action._typehint for action in parser._actions}
        objects = {key.split(".")[0] for key, kind in kinds.items() if not _is_text(kind)}
        if not objects:
            return parser, kinds
        skip |= objects


@functools.cache
def _read(make: Callable[..., Any], *words: str) -> dict[str, Any]:
    """The values of all options. A command asks for the same ones dozens of times."""
    return vars(_parser(make)[0].parse_args(list(words)))


@functools.cache
def _required(make: Callable[..., Any]) -> list[str]:
    """Options without a default."""
    parser, kinds = _parser(make)
    defaults = vars(parser.get_defaults())
    return [
        k for k, kind in kinds.items() if defaults[k] is None and "null" not in _type_name(kind)
    ]


def _is_text(kind: Any) -> bool:
    """Can a value of this type be written in a name?"""
    if typing.get_origin(kind) is typing.Literal:
        return True
    if typing.get_origin(kind) is not None:
        return all(_is_text(inner) for inner in typing.get_args(kind) if inner is not ...)
    return kind in (int, float, bool, str, type(None))


def describe(
    name: str,
    make: Callable[..., Any],
    size: tuple[str, ...] | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """Lines of a help text: the name with its shorthands, then its options."""
    usage = ""
    if size:
        for part in reversed(["x".join(map(str.upper, size)), *map(str.upper, more)]):
            usage = f"[:{part}{usage}]"
    about = (inspect.getdoc(make) or "").splitlines() or [""]
    return [f"  {name}{usage}   {about[0]}".rstrip(), *describe_options(make)]


def describe_options(make: Callable[..., Any]) -> list[str]:
    """`key: type = default`, with the first sentence that a docstring says about each."""
    parser, kinds = _parser(make)
    defaults, required = vars(parser.get_defaults()), _required(make)
    returns = typing.get_type_hints(make).get("return") if not inspect.isclass(make) else None
    said = [_sentences(inspect.getdoc(source) or "") for source in (make, returns) if source]
    lines = []
    for key, kind in kinds.items():
        shown = defaults[key] if isinstance(defaults[key], str) else json.dumps(defaults[key])
        shown = ", must be given" if key in required else f" = {shown}"
        about = next((text[key] for text in said if key in text), "")
        lines += textwrap.wrap(
            f"{key}: {_type_name(kind)}{shown}" + (f"   {about}" if about else ""),
            width=100,
            initial_indent="      ",
            subsequent_indent="          ",
        )
    return lines


def _type_name(kind: Any) -> str:
    """As a user writes it: `int`, `levels | beams`, `float | null`."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, typing.get_args(kind)))
    if typing.get_origin(kind) is not None:  # list[int] and the like
        inner = ", ".join(map(_type_name, typing.get_args(kind)))
        return f"[{inner}, ...]"
    return getattr(kind, "__name__", str(kind))


def _sentences(docstring: str) -> dict[str, str]:
    """{key: text} from lines `key: text`, of which `; key: text` may follow on the same line, and
    deeper lines go on."""
    found: dict[str, str] = {}
    key = ""
    for line in docstring.splitlines():
        if line.startswith(" ") and key:
            found[key] += " " + line.strip()
            continue
        key = ""
        for item in re.split(r"; (?=\w+: )", line):
            start = re.match(r"(\w+): (.*)", item)
            if start:
                key = start[1]
                found[key] = start[2]
    # The first sentence, without an aside or what spells it out.
    ends = re.compile(r"\. | \(|: (?=[a-z])")
    return {key: ends.split(text)[0].rstrip(".") for key, text in found.items()}
