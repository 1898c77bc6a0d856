"""What a model card says of how a head was made: the recipe and the receipt of its data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from redrafter.config import LOSSES
from redrafter.evaluation.report import markdown_table
from redrafter.hub.release import without_folders
from redrafter.hub.run import Run

_ROWS = 12  # of a training's history in a card; the picture has all
_CAPTIONS = {
    "training": "Tokens per step of held-out prompts while training",
    "speedup": "Speed after the prefill over the best plain loop, with 95 % intervals; the red "
    "tick is what the measured costs allow with these tokens per step",
    "acceptance": "Share of the steps whose first k drafted levels were all accepted",
}


def training(run: Run, pictures: Mapping[str, str]) -> str:
    facts, settings = run.facts, run.settings
    if not settings:
        return "How it was trained was not recorded (no `provenance.json` beside the head)."
    optim, data = settings["optim"], settings["data"]
    parts = [f"```bash\n{launch_line(facts)}\n```"]
    parts.append(
        f"{optim['steps']} steps of {optim['batch_positions']} positions, drafts of "
        f"{optim['depth']} tokens, learning rate {optim['lr']:g}, labels `{data['labels']}`, "
        f"{_losses(settings['loss'])}, seed "
        f"{settings['seed']}; the published head is that of step {facts.get('step')}"
        + (", the one with the most tokens per step on held-out prompts" * bool(facts.get("best")))
        + ". Every setting stands in [config.yaml](config.yaml). Folders of the machine are left "
        "out of it and of every receipt."
    )
    if settings["head"].get("init_from"):
        start = without_folders(settings["head"]["init_from"])
        parts.append(f"It went on from the head `{start}`.")
    parts.append(pictures_of(pictures, ["training"]))
    if facts.get("history"):
        names = list(facts["history"][0]["tokens_per_step"])
        rows = [
            [h["step"], *(f"{h['tokens_per_step'][name]:.2f}" for name in names)]
            for h in facts["history"]
        ]
        kept = {*range(0, len(rows), -(-len(rows) // _ROWS)), len(rows) - 1}
        kept |= {i for i, row in enumerate(rows) if row[0] == facts.get("step")}
        shown = [rows[i] for i in sorted(kept)]
        parts.append(
            "Tokens per step on held-out prompts while training "
            f"({settings['eval']['prompts']} prompts):\n\n"
            + markdown_table(["step", *names], shown)
        )  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _losses(loss: Mapping[str, Any]) -> str:
    """Their weights, at the beginning and at the end."""

    def said(weights: Mapping[str, float]) -> str:
        return " + ".join(f"{weights[name]:g} {name}" for name in LOSSES if weights.get(name))

    end = f" moving to `{said(loss['towards'])}`" if loss.get("towards") else ""
    return f"loss `{said(loss)}`{end}"


def launch_line(facts: Mapping[str, Any]) -> str:
    """The command that trained the head, as it was typed but for folders; where that is not known,
    the one that repeats it from the resolved configuration."""
    program, *words = (without_folders(word) for word in facts["argv"])
    n, name = facts.get("processes", 1), PurePath(program).name
    launch = ["accelerate", "launch", *(["--num_processes", str(n)] if n > 1 else [])]
    if name == "train_redrafter.py":  # by `redrafter train`
        own = ["--launch.num_processes", str(n)] * (n > 1)
        return shlex.join(["redrafter", "train", *own, *words])
    if name == "redrafter.py":
        return shlex.join([*launch, "train/redrafter.py", *words])
    if name.startswith("redrafter "):  # the console script, which keeps its subcommand's name
        return shlex.join(["redrafter", *words])
    return shlex.join([*launch, "train/redrafter.py", "--config", "config.yaml"])


def sources(run: Run) -> list[dict[str, Any]]:
    parts = run.facts.get("data") or []
    return [s for part in parts for s in part["stages"] if s["kind"] == "source"]


def data(run: Run) -> str:
    digest, parts = run.facts.get("data_digest"), run.facts.get("data")
    if not parts:
        known = f" The digest of all that its batches depend on is `{digest}`." if digest else ""
        return "What it was trained on was not recorded." + known
    text = []
    if not sources(run):
        text.append("Where the text came from was not recorded; what was made of it was.")
    total = sum(part["weight"] for part in parts)
    for part in parts:
        share = f"{part['weight'] / total:.0%} of every epoch:\n\n" if len(parts) > 1 else ""
        rows = [_stage(stage) for stage in part["stages"]]
        columns = ["stage", "what", "rows", "tokens", "learned from", "left out", "sha256"]
        text.append(share + markdown_table(columns, rows))
    text.append(
        f"Digest of all that the batches depend on: `{digest}`. `answers` are the target's own, to "
        "the prompts above them; `states` are its hidden states there."
    )
    held = run.settings.get("eval", {}).get("source")
    if held:
        name = PurePath(held["path"]).name
        text.append(f"Held-out prompts while training: `{name}`.")
    return "\n\n".join(text)


def _stage(stage: Mapping[str, Any]) -> list[Any]:
    digest = f"`{stage['digest'][:16]}`"
    if stage["kind"] == "source":
        name = stage["name"]
        shown = f"[{name}](https://huggingface.co/datasets/{name})" if stage["on_hub"] else (
            f"`{name}`")  # fmt: skip
        kept = [f"split {stage['split']}"] if stage.get("split") else []
        kept += [f"revision {stage['revision']}"] if stage.get("revision") else []
        kept += [f"the first {stage['n_rows']} rows"] if stage.get("n_rows") else []
        kept += [f"without the last {stage['holdout_rows']}"] if stage.get("holdout_rows") else []
        return ["source", ", ".join([shown, *kept]), "", "", "", "", digest]
    told = {
        "temperatures": lambda v: "T = " + " and ".join(f"{t:g}" for t in v),
        "samples_per_prompt": lambda v: f"{v} sample(s) each",
        "max_new_tokens": lambda v: f"up to {v} tokens",
        "dtype": str,
    }
    what = ", ".join(show(stage[key]) for key, show in told.items() if key in stage)
    left_out = stage["skipped"] + stage["failed"]
    return [stage["kind"], what, f"{stage['rows']:,}", f"{stage['tokens']:,}",
            f"{stage['supervised']:,}", left_out, digest]  # fmt: skip


def pictures_of(pictures: Mapping[str, str], wanted: Sequence[str]) -> str:
    return "\n\n".join(
        f"![{_CAPTIONS[name]}]({pictures[name]})\n\n*{_CAPTIONS[name]}.*"
        for name in wanted if name in pictures
    )  # fmt: skip
