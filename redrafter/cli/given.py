"""What the words of a command line name: configurations, files, repositories of the Hub; looked at
before anything heavy is imported, so that a slip of the pen costs a second."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from redrafter.contracts import InputError
from redrafter.shipped import find

#: last names of options that say where something lies
_PLACES = {
    "path", "base", "prompts", "head", "draft", "init_from", "bigrams", "probed", "reference",
    "store", "stores", "rows", "costs", "records", "sets", "questions", "stream",
}  # fmt: skip
#: of those that may name a repository
_ON_THE_HUB = {"path", "base", "head", "draft", "init_from", "bigrams", "probed", "reference"}
_FILES = (".jsonl", ".json", ".gz", ".parquet", ".safetensors", ".gguf")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/[^@]+)?(@[\w./-]+)?")
_PATIENCE_S = 5.0  # for the Hub to say anything


def with_recipes(words: Sequence[str]) -> list[str]:
    """The words, with `--config NAME` of what comes with the library as a path; a file of the
    user's goes first. Raises InputError naming a file that is none, or no YAML."""
    found = list(words)
    for i, word in enumerate(found):
        before, equals, value = word.rpartition("=")
        if found[i - 1 : i] == ["--config"]:
            found[i] = _recipe(word)
        elif equals and before == "--config":
            found[i] = f"--config={_recipe(value)}"
    return found


def _recipe(name: str) -> str:
    file = Path(name) if Path(name).is_file() else find(name, option="config")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: {name} is no YAML ({' '.join(str(error).split())})") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"config: {name} holds no options by name, but a {type(content).__name__}")
    return str(file)


def places(config: object, above: str = "", here: bool = False) -> Iterator[tuple[str, str]]:
    """(option, value) of every place that a configuration names. here: the option itself is one"""
    if isinstance(config, str) and here:
        yield above, config
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            name = f"{above}.{field.name}" if above else field.name
            yield from places(getattr(config, field.name), name, field.name in _PLACES)
    elif isinstance(config, Mapping) and here:
        yield from ((f"{above}.{key}", v) for key, v in config.items() if isinstance(v, str))
    elif isinstance(config, (list, tuple)) and here:
        for value in config:
            yield from places(value, above, here)


def look(config: object) -> None:
    """Before any work: are its files there, and can the Hub be asked?"""
    check_files(config)
    settle_hub(config)


def check_files(config: object) -> None:
    """Raises InputError, with a name like it, for a file that is plainly meant and not there."""
    for option, value in places(config):
        elsewhere = "://" in value or "{" in value or glob.has_magic(value)
        if elsewhere or not value.endswith(_FILES) or Path(value).exists():
            continue
        beside = Path(value).parent
        if len(beside.parts) == 2 and not (beside.is_absolute() or Path(beside.parts[0]).exists()):
            continue  # USER/NAME/FILE may lie on the Hub
        there = sorted(p.name for p in beside.iterdir()) if beside.is_dir() else []
        near = difflib.get_close_matches(Path(value).name, there, n=1)
        meant = f": did you mean {beside / near[0]}?" if near else ""
        raise InputError(f"{option}: {value} does not exist{meant}")


def settle_hub(config: object) -> None:
    """Where the Hub is asked for something and cannot be reached, say so at once, and have its
    cache looked in alone: the Hub's own library would try for minutes, once per file."""
    asked = [
        (option, value) for option, value in places(config)
        if option.rpartition(".")[2] in _ON_THE_HUB
        and _REPOSITORY.fullmatch(value) and not Path(value).exists()
    ]  # fmt: skip
    if not asked or os.environ.get("HF_HUB_OFFLINE") or (why := _unreachable()) is None:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    option, value = asked[0]
    print(
        f"warning: {option}: there is no folder {value} here, and the Hub cannot be reached "
        f"({why}): looking in its cache alone",
        file=sys.stderr, flush=True,
    )  # fmt: skip


@functools.cache
def _unreachable() -> str | None:
    """Why the Hub cannot be asked, None where it answers, whatever it says."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_PATIENCE_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:  # no name, no route, no answer in time, no address
        return str(getattr(error, "reason", error))
    return None
