"""What of a run's folder is published: an allow list. Everything else stays where it is.

Receipts and results name folders of the machine that made them; of those only the last name is
published (`without_folders`). What is read back by the library goes up as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from redrafter.contracts import InputError
from redrafter.files import remove_leftovers, write_bytes

#: pattern of a path in the folder: what stands there. `*` matches no slash
CONTENT = {
    "config.json": "what the head is made of, and which target it belongs to",
    "model.safetensors": "its weights",
    "config.yaml": "every setting of the training",
    "provenance.json": "versions, commit, data receipt and what was measured while training",
    "lossless*.json": "drafted text beside plain decoding, token by token (`redrafter lossless`)",
    "speed*.json": "tokens per step and speed (`redrafter speed`)",
    "speculation_profile.json": "acceptance by position, as serving engines count it",
    "results/*.json": "measured tables (`redrafter table`)",
    "results/*.yaml": "what they were asked for",
    "results/*.md": "the tables for people",
    "results/*.png": "and their pictures",
    "results/*.svg": "and their pictures",
    "*.png": "pictures of the run",
    "*.svg": "pictures of the run",
    "disco/*.json": "the lookahead: when to stop drafting",
    "disco/*.safetensors": "the lookahead: when to stop drafting",
    "disco/*.png": "how well it predicts",
    "disco/*.svg": "how well it predicts",
    "profiles/*.json": "what forwards and drafts cost on a device (`redrafter costs`)",
    "golden/*.json": "a batch to check a copy against (`redrafter verify`)",
    "golden/*.safetensors": "a batch to check a copy against (`redrafter verify`)",
    "custom_generate/*.py": "decoding with plain transformers",
    "custom_generate/*.json": "decoding with plain transformers",
    "custom_generate/*.md": "decoding with plain transformers",
    "custom_generate/*.txt": "decoding with plain transformers",
}
#: written for the card at every push
CARD_CONTENT = {
    "README.md": "this card",
    "pictures/*.png": "pictures of this card",
    "pictures/*.svg": "pictures of this card",
}
#: of those, what tells where it was made, and is read by people
_RECEIPTS = (
    "config.yaml", "provenance.json", "lossless*.json", "speed*.json", "results/*.json",
    "results/*.yaml", "disco/report.json",
)  # fmt: skip
NEEDED = ("config.json", "model.safetensors")

Files = dict[str, Path | bytes]  # path in the repository -> where it lies, or what it is


def matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def is_ours(path: str) -> bool:
    """Whether a path in the repository is one that a push writes, and may remove."""
    return any(matches(path, pattern) for pattern in (*CONTENT, *CARD_CONTENT))


def files_of(folder: str | Path) -> tuple[Files, list[str]]:
    """(What is published of a run's folder, the names in it that are left out).

    Raises InputError where there is no head, or a receipt cannot be read.
    """
    folder = Path(folder)
    for name in NEEDED:
        if not (folder / name).is_file():
            raise InputError(
                f"head: {folder / name} does not exist: give the folder that a training exported "
                "its head to, or that a head was saved in"
            )
    found: Files = {}
    for pattern in CONTENT:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not path.name.startswith("."):
                is_receipt = any(matches(name, receipt) for receipt in _RECEIPTS)
                found[name] = _public(path) if is_receipt else path
    tops = {name.split("/")[0] for name in found}
    return found, sorted(path.name for path in folder.iterdir() if path.name not in tops)


def _public(path: Path) -> bytes:
    """A receipt without the folders it names."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".yaml":
            content = without_folders(yaml.safe_load(text))
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        else:
            content = without_folders(json.loads(text))
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({error}): make it again, or remove it") from None
    return text.encode()


_ROOT = r"(?:~|[A-Za-z]:(?=[\\/]))?[\\/]"
_WHOLE = re.compile(_ROOT + r"[^\"'\[\],]*")
_INSIDE = re.compile(r"(^|[\s\"'=\[(,])" + _ROOT + r"(?:[^\s\"'\[\],=:]+[\\/])+")


def without_folders(value: Any) -> Any:
    """Every absolute path in strings, however deep they lie, is left with its last name."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    option, equals, rest = value.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={without_folders(rest)}"
    if _WHOLE.fullmatch(value):
        windows = "\\" in value or value[1:2] == ":"
        return (PureWindowsPath if windows else PurePosixPath)(value).name or value
    return _INSIDE.sub(r"\1", value)


def write_card(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """The card and its pictures, in place of those of an earlier push."""
    folder = Path(folder)
    remove_leftovers(folder)
    for pattern in CARD_CONTENT:
        for path in folder.glob(pattern):
            if path.relative_to(folder).as_posix() not in files:
                path.unlink()
    for name, content in files.items():
        write_bytes(folder / name, content)
