"""`train/disco.py`: fit a lookahead classifier to records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import DiscoTrainConfig

_DESCRIPTION = """\
Fit a DISCO classifier: how many levels to draft, step by step, from what the drafter says.

  python data/lookahead.py --target.path MODEL --head HEAD --drafter head:4x6 \\
    --prompts PROMPTS.jsonl --out runs/records
  python eval/costs.py --target.path MODEL --head HEAD --tree.depth 6 --out runs/costs.json
  accelerate launch train/disco.py --records runs/records --costs runs/costs.json --out HEAD/disco
  python eval/speed.py --methods plain,head:4x6,head:4x6:lookahead=disco --head HEAD ...

Says how well it predicts and what it should gain: tokens per second by the given costs, on records
that it was not trained on, beside every fixed length and the oracle. The training takes seconds: of
several processes the first one alone does it.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(DiscoTrainConfig, argv, "train/disco.py", _DESCRIPTION)
    import torch

    from redrafter.processes import join

    processes = join(cpu=not torch.accelerator.is_available())
    if processes.is_main_process:
        _train(config)
    processes.wait_for_everyone()
    return 0


def _train(config: DiscoTrainConfig) -> None:
    """By the main process alone: the others would need longer to start than this takes."""
    from accelerate import Accelerator

    from redrafter.data.store import Store
    from redrafter.evaluation.lookaheads.summary import reliability
    from redrafter.files import plain_values, provenance, write_json
    from redrafter.lookahead.disco import save_disco
    from redrafter.records.fit import train_disco

    store = Store(config.records)
    network, report, predicted = train_disco(store, config, Accelerator())
    report["reliability"] = reliability(*(x.numpy() for x in predicted))
    save_disco(config.out, network)
    facts = provenance(config=plain_values(config), records=store.digest)
    write_json(f"{config.out}/report.json", {**report, "provenance": facts})
    _draw(config.out, report)
    print(show(report))
    print(f"{config.out}: use it with lookahead=disco(path={config.out})")


def show(report: dict[str, Any]) -> str:
    from redrafter.evaluation.report import table

    rows = [
        [name, f"{p['tokens_per_second']:.1f}", f"{p['ratio']:.3f}", f"{p['tokens_per_step']:.2f}",
         f"{p['drafted_per_step']:.2f}"]
        for name, p in report["policies"].items()
    ]  # fmt: skip
    lines = [
        table(["policy", "tokens/s", "x best static", "tokens/step", "levels/step"], rows), "",
        f"tokens/s by the costs given, on {report['validation_prompts']} prompts that were not "
        "trained on; threshold, level and step are this classifier",
        "ROC-AUC of a level's acceptance, after level 1, 2, ...: "
        + ", ".join("-" if a is None else f"{a:.3f}" for a in report["roc_auc"]),
        f"expected calibration error {report['reliability']['ece']:.3f}",
    ]  # fmt: skip
    if report["policies"]["best static"]["levels"] == 0:
        lines.append("no fixed length pays here: without a lookahead, do not speculate")
    return "\n".join(lines)


def _draw(folder: str, report: dict[str, Any]) -> None:
    """The calibration curve, where matplotlib is installed."""
    from redrafter.evaluation.lookaheads.report import reliability_chart
    from redrafter.evaluation.pictures import save_pictures

    shown = {"validation": {"reliability": {"disco": report["reliability"]}}}
    save_pictures({Path(folder) / "reliability": lambda: reliability_chart(shown)})
