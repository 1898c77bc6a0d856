"""`eval/doctor.py`: whether drafting pays here, with which tree, and why."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import DoctorConfig

_DESCRIPTION = """\
Whether drafting pays for a model on this device, in a few minutes: what forwards of 1..32 tokens
cost, t(n); how often a step of decoding waits for the device (host reads) and what it launches;
what is accepted of drafts on a few texts; and from these, for every size of draft, the speed over
plain decoding that is to be expected. The last line says it in a sentence.

  redrafter doctor --target.path MODEL
  redrafter doctor --target.path MODEL --head runs/head --prompts PROMPTS.jsonl --out doctor.json

What it says is a prediction: eval/speed.py measures it, eval/static.py does the same at length, and
scripts/gpu_check.py adds exactness, training and stock generate.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Examines, prints, writes JSON. Returns the exit status."""
    config = parse(DoctorConfig, argv, "eval/doctor.py", _DESCRIPTION, alone=True)
    from redrafter.evaluation.doctor import check, diagnose, show
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.report import write_result

    widths = check(config)
    target, head = load_both(config, measured=True)
    body = diagnose(config, widths, target, head)
    write_result(config.out, config, target, body, head)
    print(show(body))
    return 0
