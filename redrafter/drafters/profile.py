"""What `eval/costs.py` measured, read back: the one place that knows the file.

Seconds are lower quartiles: what disturbs a measurement only adds to it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redrafter.contracts import InputError
from redrafter.files import digest_file, digest_json
from redrafter.targets.devices import device_name
from redrafter.targets.model import Target


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one drafter with one target on one device, at one context and batch.

    start_s: of a draft, what is no level: start, tree and observe
    level_s: of level 1, 2, ...
    verify: (n new tokens per row, seconds of the target's forward), ascending
    loop: (nodes verified, seconds of a step beside draft and forward), ascending; empty where it
        was not measured, and then counted as nothing
    plain: of a step of plain decoding; None where it was not measured
    """

    start_s: float
    level_s: tuple[float, ...]
    verify: tuple[tuple[int, float], ...]
    loop: tuple[tuple[int, float], ...] = ()
    plain: float | None = None

    def draft_s(self, levels: int) -> float:
        """Of a draft of so many levels; 0 for none. Raises InputError beyond those measured."""
        if levels > len(self.level_s):
            raise InputError(
                f"costs: {len(self.level_s)} levels were measured, not {levels}: measure a drafter "
                "of that depth with eval/costs.py"
            )
        return self.start_s + sum(self.level_s[:levels]) if levels else 0.0

    def verify_s(self, nodes: float) -> float:
        """Of a forward of so many new tokens; between two measured ones in proportion. Raises
        InputError outside of them."""
        known = [n for n, _ in self.verify]
        if not known[0] <= nodes <= known[-1]:
            raise InputError(
                f"costs: forwards of {known[0]} to {known[-1]} new tokens were measured, not of "
                f"{nodes:g}: measure with --new_tokens ...,{int(np.ceil(nodes))}"
            )
        return float(np.interp(nodes, *zip(*self.verify, strict=True)))

    def loop_s(self, nodes: float) -> float:
        """Of the rest of a step that verifies so many nodes; beyond those measured as at the
        nearest."""
        return float(np.interp(nodes, *zip(*self.loop, strict=True))) if self.loop else 0.0

    @property
    def plain_s(self) -> float:
        """Of one token by plain decoding; where only its forward was measured, that."""
        return self.verify_s(1) if self.plain is None else self.plain

    def step_s(self, levels: int, nodes: float) -> float:
        """Of a step that drafts `levels` and verifies `nodes`, the root counted."""
        return self.draft_s(levels) + self.verify_s(nodes) + self.loop_s(nodes)


def step_costs(
    costs: str | Path | dict[str, Any],
    drafter: str | None,
    target: Target | None,
    context: int | None = None,
    *,
    batch: int = 1,
    allow_other: bool = False,
) -> StepCosts:
    """What was measured of a drafter.

    costs: a file of eval/costs.py, or its content
    drafter: its name there; `head:4x3` is also the first levels of a measured `head:4x8`. None
        takes the only one
    target: to compare with the one that was measured, with its device and threads; None, or
        `allow_other`, takes the file as it is
    context: tokens in the cache; the nearest measured one is taken, the longest for None
    batch: rows per forward, measured exactly
    Raises InputError naming the file, what was measured, and the remedy.
    """
    name, table = read_costs(costs, None if allow_other else target)
    draft, levels = find_drafter(name, table, drafter, batch, context)
    level_s = [level["q1_s"] for level in draft["levels"]]
    forward = forward_seconds(name, table, batch, draft["context"])
    here = {
        e["name"]: (e["n"], e["step"]["q1_s"])
        for e in table.get("loop", ())
        if (e["batch"], e["context"]) == (batch, draft["context"])
    }
    start_s, loop = max(0.0, draft["draft"]["q1_s"] - sum(level_s)), {}
    if draft["name"] in here and draft.get("rest"):
        # Quartiles of the parts are less than the quartile of the whole by what disturbs it: that
        # goes with the nodes, and so with the levels, rather than with every draft.
        start_s = draft["rest"]["q1_s"]
    drafts_s = {"none": 0.0, draft["name"]: start_s + sum(level_s)}
    for name, draft_s in drafts_s.items():
        if name in here:
            n, step_s = here[name]
            loop[n] = max(0.0, step_s - draft_s - forward[n])
    return StepCosts(
        start_s,
        tuple(level_s[:levels]),
        tuple(sorted(forward.items())),
        tuple(sorted(loop.items())),
        here["plain"][1] if "plain" in here else None,
    )


def read_costs(
    costs: str | Path | dict[str, Any], target: Target | None = None
) -> tuple[str, dict[str, Any]]:
    """(its name for messages, the content) of a file of eval/costs.py, or of its content.

    target: None does not ask where it was measured
    Raises InputError naming the file where it is no such table, or of something else.
    """
    name, table = "costs", costs
    if not isinstance(costs, dict):
        name = f"costs: {costs}"
        try:
            table = json.loads(Path(costs).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"costs: {costs} cannot be read ({error})") from None
    for key in ("target", "drafters"):
        entries(name, table, key)
    if target is not None:
        check_origin(name, table.get("provenance", {}), target)
    return name, table


def entries(name: str, table: Any, key: str) -> list[dict[str, Any]]:
    """Of a table that was read. Raises InputError where it is none."""
    if not isinstance(table, dict) or not isinstance(table.get(key), list):
        raise InputError(f"{name} holds no cost table: write one with eval/costs.py --out FILE")
    return table[key]


def forward_seconds(name: str, table: dict, batch: int, context: int | None) -> dict[int, float]:
    """{n: seconds of a target forward of n new tokens}. context: measured exactly; None is the
    longest. Raises InputError saying what was measured."""
    here = [e for e in entries(name, table, "target") if e["batch"] == batch]
    contexts = sorted({e["context"] for e in here})
    context = contexts[-1] if context is None and contexts else context
    seconds = {e["n"]: e["cost"]["q1_s"] for e in here if e["context"] == context}
    if not seconds:
        found = sorted({(e["batch"], e["context"]) for e in table["target"]})
        raise InputError(
            f"{name}: nothing was measured for batch {batch} and context {context}; there are "
            f"(batch, context) {found}. Measure with --batch_sizes {batch} --contexts ..."
        )
    # What disturbs a measurement only adds to it: no n costs more than a larger one.
    return {n: min(s for m, s in seconds.items() if m >= n) for n in seconds}


def find_drafter(
    name: str, table: dict, drafter: str | None, batch: int, context: int | None
) -> tuple[dict[str, Any], int | None]:
    """The entry of a drafter at the nearest context (the longest for None), and how many of its
    levels are meant (None: all). Raises InputError saying what was measured."""
    known = entries(name, table, "drafters")
    here = [e for e in known if e["batch"] == batch and drafter in (None, e["name"])]
    levels = None
    if not here and drafter is not None:
        kind, levels = _levels_of(drafter)
        deeper = [
            e
            for e in known
            if e["batch"] == batch and levels and _levels_of(e["name"])[0] == kind
            and len(e["levels"]) >= levels
        ]  # fmt: skip
        least = min((len(e["levels"]) for e in deeper), default=0)
        here = [e for e in deeper if len(e["levels"]) == least]
    if len(names := {e["name"] for e in here}) != 1:
        there, batches = (sorted({e[key] for e in known}) for key in ("name", "batch"))
        raise InputError(
            f"{name}: with batch {batch}, {len(names)} measured drafters fit {drafter!r}, one is "
            f"needed; there are {there}, batches {batches}. Measure with --head or --drafters, and "
            "name one of several"
        )
    contexts = sorted(e["context"] for e in here)
    nearest = contexts[-1] if context is None else min(contexts, key=lambda c: abs(c - context))
    return next(e for e in here if e["context"] == nearest), levels


def _levels_of(drafter: str) -> tuple[str, int | None]:
    """What a drafter is but for its depth, and the depth; `head:4x8:levels` -> (`head:4`, 8).

    Only of those whose first K levels are the draft of depth K.
    """
    size = re.fullmatch(r"((?:head|model):\d+)x(\d+)(:shape=levels|:levels)?", drafter)
    return (size[1], int(size[2])) if size else (drafter, None)


def check_origin(name: str, facts: dict[str, Any], target: Target) -> None:
    """Costs of another target, device, number of threads or dtype say nothing here."""
    there = facts.get("target", {})
    measured = {"target": there.get("fingerprint"), "device": facts.get("device")}
    here = {"target": target.fingerprint(), "device": device_name(target.device)}
    if target.device.type == "cpu":
        here["threads"], measured["threads"] = torch.get_num_threads(), facts.get("threads")
    here["dtype"] = str(target.dtype).removeprefix("torch.")
    measured["dtype"] = there.get("dtype", here["dtype"])
    for key, value in here.items():
        if measured[key] != value:
            raise InputError(
                f"{name} was measured with {key} {measured[key]} (target {there.get('name')}), "
                f"here it is {value} ({target.name}): measure here with eval/costs.py, or set "
                "allow_other"
            )


# ------------------------------------------------------------------- profiles beside weights
# A profile is a cost table in the folder of the head or draft model that it is of, one per device,
# with `of`, the digest of the weights.

_FOLDER = "profiles"


def profile_of(folder: str | Path, target: Target) -> Path:
    """The profile of the present device, for `step_costs` and `NodeBudget.from_costs`.

    folder: of a head or draft model
    Raises InputError naming the profiles that there are where this device has none, and for one of
    other weights or of another target.
    """
    path = profile_path(folder, target)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.json")) or ["none"]
        raise InputError(
            f"{folder} has no profile of this device ({path.stem}); there are: {', '.join(there)}. "
            "Measure with eval/costs.py --profile true"
        )
    name, table = read_costs(path, target)
    if table.get("of") != weights_digest(folder):
        raise InputError(
            f"{name} was measured with other weights than those that lie in {folder} now: measure "
            "again with eval/costs.py --profile true"
        )
    return path


def profile_path(folder: str | Path, target: Target) -> Path:
    """FOLDER/profiles/DEVICE.json: the hardware, its threads on a CPU, and the dtype."""
    device = re.sub(r"\((?:r|tm)\)", " ", device_name(target.device).lower())
    parts = [device, str(target.dtype).removeprefix("torch.")]
    if target.device.type == "cpu":
        threads = torch.get_num_threads()
        parts.insert(1, f"{threads} thread{'s' * (threads > 1)}")
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(parts)).strip("-")
    return Path(folder) / _FOLDER / f"{slug}.json"


def weights_digest(folder: str | Path) -> str:
    """sha256 over the names and digests of a folder's safetensors, 16 hex digits."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors: it is no folder of a head or a model")
    return digest_json({file.name: digest_file(file) for file in files})[:16]
