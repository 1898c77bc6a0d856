"""`speculation_profile.json`: how far a head's drafts are accepted, for whoever plans with it.

    schema_version  1
    head, target    their fingerprints
    profiles        one per measured file and method that drafts with the head:
        method, tree, temperature, batch_size
        num_speculative_tokens       K
        marginal_accept_rates[k]     of all drafts, those accepted to position k + 1
        conditional_accept_rates[k]  of those accepted to position k, as a fraction
        mean_accept_length           1 + accepted / drafts
        draft_acceptance_rate, acceptance_histogram   see `figures.engine_figures`
        measurement_conditions       dataset, num_samples, osl (most new tokens), device, dtype,
                                     file

Nothing stands there that no measured file of the head's own folder says. Names of the fields:
those that NVIDIA's Model-Optimizer proposes for a file of this name (one profile there).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redrafter.contracts import InputError
from redrafter.files import write_json
from redrafter.heads.base import DraftHead
from redrafter.hub.run import SPEEDS, Result, results_of

PROFILE = "speculation_profile.json"


def profile_of(speeds: Sequence[Result], head: Any) -> dict[str, Any] | None:
    """The content of the file; None where nothing was measured that counts as engines do.

    speeds: results of eval/speed.py or eval/table.py on this head
    """
    found = [
        _entry(result, name, figures)
        for result in speeds for name, figures in result.of_head().items()
        if figures.get("engine") and figures["engine"]["num_drafts"]
    ]  # fmt: skip
    if not found:
        return None
    return {
        "schema_version": 1, "head": head.fingerprint(), "target": head.config.target_fingerprint,
        "profiles": found,
    }  # fmt: skip


def _entry(result: Result, name: str, figures: dict[str, Any]) -> dict[str, Any]:
    engine, facts = figures["engine"], result.body["provenance"]
    marginal = engine["per_position_acceptance_rate"]
    above = [1.0, *marginal]
    return {
        "method": name,
        "tree": name.partition(":")[2] or result.config["tree"],
        "temperature": result.body["temperature"],
        "batch_size": result.body["batch_size"],
        "num_speculative_tokens": len(marginal),
        "marginal_accept_rates": marginal,
        "conditional_accept_rates": [
            rate / before if before else None
            for rate, before in zip(marginal, above, strict=False)
        ],
        "mean_accept_length": engine["mean_acceptance_length"],
        "draft_acceptance_rate": engine["draft_acceptance_rate"],
        "acceptance_histogram": engine["acceptance_histogram"],
        "measurement_conditions": {
            "dataset": result.prompts, "num_samples": result.body["n_prompts"],
            "osl": result.config["max_new_tokens"], "device": facts["device"],
            "dtype": facts["target"]["dtype"], "file": result.name,
        },
    }  # fmt: skip


def write_profile(folder: str | Path, head: Any) -> dict[str, Any] | None:
    """Write the profile beside a head, or remove one that no measured file stands for any more.

    Raises InputError where a measured file of the folder is another head's.
    """
    folder = Path(folder)
    made = profile_of(results_of(folder, head, SPEEDS), head)
    if made is None:
        (folder / PROFILE).unlink(missing_ok=True)
    else:
        write_json(folder / PROFILE, made)
    return made


def profile_after(out: str | None, folder: str | None, head: Any) -> None:
    """Once `out` is measured: where that lies in the head's folder, its profile is made anew.

    out: a file, or a folder of them; folder: as the head was named, here or on the Hub
    """
    if out is None or folder is None or not isinstance(head, DraftHead):
        return
    place = Path(folder).resolve()
    if not place.is_dir() or place not in Path(out).resolve().parents:
        return
    try:
        if write_profile(place, head) is not None:
            print(f"acceptance by position: {Path(folder) / PROFILE}")
    except InputError as error:  # what was measured now is written; an earlier file is at fault
        print(f"warning: no {PROFILE} was made: {error}")
