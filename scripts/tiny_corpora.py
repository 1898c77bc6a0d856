"""What `make_tiny_target.py` teaches: word problems, or code of Python's standard library."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from word_problems import Problem, problems

#: Folders of the standard library that are tables, tests or not installed everywhere.
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
FILE_CHARS = (1_000, 200_000)  # shorter files say nothing, longer ones are generated tables
HELDOUT_EVERY = 12  # one file, or problem, in so many
TRAIN_PIECE_CHARS = 1_400  # about 450 tokens
PROMPT_CHARS = 300  # about 100 tokens: leaves room in the context to generate


@dataclass(frozen=True)
class Corpus:
    """By split, "train" or "heldout"."""

    texts: dict[str, list[str]]
    """What is learned from, and what the result is measured on."""
    prompts: dict[str, list[dict[str, str]]]
    """Rows of the prompt files."""
    files: dict[str, list[str]]
    """Of the standard library, where the text is theirs."""


def made_up(max_chars: int, seed: int) -> Corpus:
    """Word problems; a text is what the chat template makes of one, BOS and EOS aside."""
    found: dict[str, list[Problem]] = {"train": [], "heldout": []}
    made, chars = problems(seed), 0
    while chars < max_chars:
        for i, problem in enumerate(islice(made, HELDOUT_EVERY)):
            found["train" if i else "heldout"].append(problem)
            chars += len(problem.question) + len(problem.answer)
    return Corpus(
        {split: [f"# {p.question}\n{p.answer}" for p in found[split]] for split in found},
        {split: [asdict(p) for p in found[split]] for split in found},
        {split: [] for split in found},
    )


def cut_up(sources: dict[str, str], seed: int) -> Corpus:
    """Code of the standard library, some of its files held out. Prompts are shuffled, so that the
    first few come from many files."""
    texts: dict[str, dict[str, str]] = {"train": {}, "heldout": {}}
    for i, (name, source) in enumerate(sources.items()):
        if code := bare_code(source):
            texts["train" if i % HELDOUT_EVERY else "heldout"][name] = code
    prompts: dict[str, list[dict[str, str]]] = {}
    for split, chars in (("train", TRAIN_PIECE_CHARS), ("heldout", PROMPT_CHARS)):
        rows = [piece for text in texts[split].values() for piece in pieces(text, chars)]
        random.Random(seed).shuffle(rows)
        prompts[split] = [{"text": row} for row in rows]
    return Corpus(
        {split: [*texts[split].values()] for split in texts},
        prompts,
        {split: sorted(texts[split]) for split in texts},
    )


def read_sources(max_chars: int) -> dict[str, str]:
    """{path below the library's folder: source}, in an order that is the same everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in SKIPPED_FOLDERS and "config-" not in d]
        found += [Path(folder, n).relative_to(root).as_posix() for n in names if n.endswith(".py")]
    sources, chars = {}, 0
    # By a hash of the path, so that any stretch of this order is a fair sample of the library.
    for name in sorted(found, key=lambda name: (zlib.crc32(name.encode()), name)):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if FILE_CHARS[0] <= len(text) <= FILE_CHARS[1] and chars < max_chars:
            sources[name] = text
            chars += len(text)
    if chars < 1_000_000:
        raise SystemExit(
            f"error: found {chars} characters of Python source under {root}, the standard library "
            "of this interpreter; 1000000 are needed. Some embedded and zipped installations leave "
            "the sources out: run this with a full Python (python.org, your system's, conda)."
        )
    return sources


def bare_code(source: str) -> str | None:
    """The code in one uniform layout, without comments and docstrings: prose is much harder to
    predict, and a model of this size would only learn to stammer it. None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    for node in ast.walk(tree):
        scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, scopes) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def pieces(text: str, chars: int) -> Iterator[str]:
    """Cuts whole lines into stretches of at least `chars`; a short rest is dropped."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= chars:
            yield piece
            piece = ""
