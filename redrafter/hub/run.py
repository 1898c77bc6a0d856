"""What is known of a head that is to be published: read from its folder, nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter.config import KINDS
from redrafter.contracts import InputError
from redrafter.evaluation.methods import needed
from redrafter.heads.base import DraftHead
from redrafter.heads.load import load_head, own_class
from redrafter.heads.reading import read_config

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: where eval/speed.py and eval/table.py leave their results beside a head
SPEEDS = ("speed*.json", "results/*.json")
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Result:
    """A file that eval/speed.py, eval/table.py or eval/lossless.py wrote. name: path in the
    folder; body: its content"""

    name: str
    body: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.body["provenance"]["config"]

    @property
    def prompts(self) -> str:
        """Name of the prompt file."""
        return Path(self.config["prompts"]).name

    @property
    def title(self) -> str:
        """Prompts and how they were decoded."""
        temperature = self.body["temperature"]
        how = "greedy" if temperature == 0 else f"T = {temperature:g}"
        samples = self.body.get("samples_per_prompt", 1)
        batch = f"batch {self.body['batch_size']}" + f" x {samples} samples" * (samples > 1)
        return f"{self.prompts}, {how}, {batch}"

    def of_head(self) -> dict[str, Any]:
        """Figures of the methods that draft with this head."""
        return {
            name: figures for name, figures in self.body["methods"].items()
            if "head" in needed([name])
        }  # fmt: skip


@dataclass(frozen=True)
class TargetFacts:
    """name: as people call it; hub_id: None where it is not known to be on the Hub; license: keys
    of its card (`license`, `license_name`, `license_link`), empty where it states none; stated_in:
    where the licence was found"""

    name: str
    hub_id: str | None
    license: dict[str, str]
    stated_in: str | None


@dataclass(frozen=True)
class Run:
    """folder; the head; `provenance.json` ({} where there is none); measured speeds and proofs of
    exactness, in order of name; the target"""

    folder: Path
    head: DraftHead
    facts: dict[str, Any]
    speeds: tuple[Result, ...]
    proofs: tuple[Result, ...]
    target: TargetFacts

    @property
    def settings(self) -> dict[str, Any]:
        return self.facts.get("config", {})


def read_run(
    folder: str | Path,
    base_model: str | None = None,
    license: str | None = None,
    online: bool = False,
) -> Run:
    """Read a folder, and check that what lies there belongs together.

    base_model, license: of the target, where they are not known from the run
    online: whether the target's card may be fetched from the Hub
    Raises InputError naming the file that is damaged, or was measured on another head.
    """
    folder = Path(folder)
    if own_class(folder) is None:
        kind = read_config(folder).get("model_type")
        raise InputError(
            f"head: {folder / 'config.json'}: model_type {kind!r} is not one of this library's "
            f"heads (those of the kinds {', '.join(KINDS)})"
        )
    head = load_head(folder)
    facts = {}
    if (folder / "provenance.json").exists():
        facts = read_file(folder / "provenance.json")
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise InputError(f"base_model: {base_model!r} is no owner/name of the Hub")
    target = target_facts(head.config, facts, base_model, license, online)
    speeds = results_of(folder, head, SPEEDS)
    proofs = results_of(folder, head, ("lossless*.json",))
    return Run(folder, head, facts, speeds, proofs, target)


def read_file(file: Path) -> dict[str, Any]:
    """A JSON file. Raises InputError naming one that cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): make it again, or remove it") from None


def results_of(folder: Path, head: DraftHead, patterns: Sequence[str]) -> tuple[Result, ...]:
    """What was measured on a head, in order of name. Raises InputError for another head's file."""
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    found = [Result(file.relative_to(folder).as_posix(), read_file(file)) for file in files]
    for result in found:
        _check(folder / result.name, result, head)
    return tuple(found)


def _check(file: Path, result: Result, head: DraftHead) -> None:
    """A figure of another head must not get into a card."""
    again = "measure this head again, or move the file elsewhere"
    try:
        made = result.body["provenance"]
        measured, target = made.get("head"), made["target"]["fingerprint"]
        any_target = made["config"]["allow_other_target"]
        result.body["methods"]  # KeyError where it is another file
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{file} is no result of eval/speed.py, eval/table.py or eval/lossless.py: move it "
            "elsewhere"
        ) from None
    if measured is None:
        raise InputError(f"{file} does not say which head it measured: {again}")
    if measured["fingerprint"] != head.fingerprint():
        raise InputError(
            f"{file} was measured with another head (fingerprint {measured['fingerprint']}, this "
            f"one has {head.fingerprint()}): {again}"
        )
    trained_for = head.config.target_fingerprint
    if trained_for and target != trained_for and not any_target:
        raise InputError(f"{file} was measured on another target ({target}): {again}")


# ------------------------------------------------------------------------------- the target


def target_facts(
    config: Any,
    facts: dict[str, Any],
    base_model: str | None,
    license: str | None,
    online: bool,
) -> TargetFacts:
    """config: the head's; facts: provenance.json; the others: see `read_run`"""
    settings = facts.get("config", {}).get("target") or {}
    path, revision = settings.get("path"), settings.get("revision")
    local = path is not None and Path(path).is_dir()
    stated: dict[str, str] = {}
    found = None
    hub_id = base_model
    if local:
        stated, found = _license_in(Path(path) / "README.md"), "the card in its folder"
    if hub_id is None and path is not None and not local and _HUB_ID.fullmatch(path):
        # A relative path of a folder looks alike: it counts where its files are here or there.
        hub_id = path if _on_hub(path, "config.json", revision, online) else None
    if hub_id is not None and not stated:
        card = _on_hub(hub_id, "README.md", revision if hub_id == path else None, online)
        stated, found = (_license_in(Path(card)) if card else {}), "its card on the Hub"
    link = stated.get("license_link")
    if link and "://" not in link:  # a file beside the target
        del stated["license_link"]
        if hub_id is not None:
            stated["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    if license is not None:
        stated, found = {"license": license}, "the one who published the head"
    name = hub_id or config.target_name or (Path(path).name if path else "") or "unknown"
    return TargetFacts(name, hub_id, stated, found if stated else None)


def _on_hub(repo: str, file: str, revision: str | None, online: bool) -> str | None:
    """Local path of a repository's file: from the cache; online, from the Hub."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, file, revision=revision, local_files_only=not online)
    except Exception:  # gated, unknown, offline: nothing is known of it then
        return None


def _license_in(card: Path) -> dict[str, str]:
    """Of a model card's metadata; {} where it states none."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card).data.to_dict()
    except Exception:  # somebody else's card, with metadata that cannot be read
        return {}
    return {key: str(data[key]) for key in _LICENSE_KEYS if data.get("license") and data.get(key)}
