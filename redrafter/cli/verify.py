"""`eval/verify.py`: does a head compute here what it did when it was exported?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from redrafter import threads
from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import TargetConfig, VerifyConfig
from redrafter.contracts import InputError

_DESCRIPTION = (
    "eval/verify.py HEAD [--target.path MODEL]: compute the golden batch of an exported head, one "
    "line per check: files, target, tokenizer, chat template, dtype, hidden states, draft logits, "
    "accepted tokens, text. The exit status is 1 where something differs, and the last line says "
    "what differs first. Numbers may differ by rounding, tokens by near-ties alone."
)


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Computes, prints, writes JSON. Returns 1 if something differs."""
    words = with_head(sys.argv[1:] if argv is None else list(argv))
    config = parse(VerifyConfig, words, "eval/verify.py", _DESCRIPTION, alone=True)
    from redrafter.fetch import fetch

    threads.settle(config.threads)
    folder = Path(fetch(config.head, "head"))
    return write(config, folder) if config.write else verify(config, folder)


def with_head(words: Sequence[str]) -> list[str]:
    """The arguments with `--head=` before the word that neither is an option nor an option's."""
    found = []
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        value = before.startswith("-") and "=" not in before
        found.append(word if word.startswith("-") or value else f"--head={word}")
    return found


def verify(config: VerifyConfig, folder: Path) -> int:
    """Compare with the golden batch in the folder. Returns the exit status."""
    from redrafter.evaluation.report import write_result
    from redrafter.export.golden import file_faults, read_facts
    from redrafter.export.verify import NAMES, compare, files_check, first_difference, skipped
    from redrafter.targets.load import load_target

    facts, target = read_facts(folder), None
    faults = file_faults(folder, facts)
    if facts is None:
        checks = [files_check(None, faults)]
        checks += skipped(NAMES[1:], "not made, as nothing is known of it")
    else:
        target = load_target(target_of(config.target, folder, facts))
        checks = compare(folder, target, facts, faults)
    first = first_difference(checks)
    if target is not None:
        body = {
            "passed": first is None,
            "first_difference": None if first is None else first.name,
            "checks": [asdict(check) for check in checks],
            "golden": {key: facts[key] for key in ("device", "versions", "written")},
        }
        write_result(config.out, config, target, body)
    print(show(checks))
    if first is None:
        print(f"{config.head} computes here what it did when it was exported")
        return 0
    print(f"{config.head} differs first in: {first.name}")
    return 1


def write(config: VerifyConfig, folder: Path) -> int:
    """Complete an export that has no golden batch."""
    from redrafter.data.prompts import load_prompts
    from redrafter.export.complete import complete
    from redrafter.export.golden import FACTS, FOLDER
    from redrafter.targets.load import load_target
    from redrafter.targets.text import tokenizer_of

    if folder != Path(config.head):
        raise InputError(f"write: {config.head} lies on the Hub; download it to a folder first")
    if (folder / FACTS).exists():
        raise InputError(
            f"write: {folder / FACTS} exists, and a new one would hide what differs from it: "
            f"remove {folder / FOLDER} to make another"
        )
    target = load_target(target_of(config.target, folder, None))
    prompts = None
    if config.prompts is not None:
        rows = load_prompts(
            config.prompts, tokenizer_of(target, config.prompts), "auto", n=4, part="last",
            vocab_size=target.vocab_size,
        )  # fmt: skip
        prompts = [row.ids for row in rows]
    for text in complete(folder, target, prompts):
        print(text)
    print(f"{folder / FOLDER}: written")
    return 0


def target_of(config: TargetConfig, folder: Path, facts: dict[str, Any] | None) -> TargetConfig:
    """The target to load: as given; else its Hub id, or the folder it was trained from if that is
    here; and in the dtype of the golden batch. Raises InputError where none is known."""
    then = {} if facts is None else facts["target"]
    path = config.path or (then["name"] if then.get("on_hub") else None) or _trained_from(folder)
    if path is None:
        name = f" (it was called {then['name']})" if then else ""
        raise InputError(f"give --target.path, the target that {folder} was trained for{name}")
    dtype = then["dtype"] if then and config.dtype == "auto" else config.dtype
    return replace(config, path=path, dtype=dtype)


def _trained_from(folder: Path) -> str | None:
    try:
        text = (folder / "provenance.json").read_text(encoding="utf-8")
        path = json.loads(text)["config"]["target"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if isinstance(path, str) and Path(path).exists() else None


def show(checks: Sequence[Any]) -> str:
    """One line per check."""
    words = {True: "passed", False: "FAILED", None: "-"}
    return "\n".join(f"{c.name:<10} {words[c.passed]:<7} {c.text}" for c in checks)
