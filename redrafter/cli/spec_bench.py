"""`eval/spec_bench.py`: the protocol of Spec-Bench, for any benchmark of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import SpecBenchConfig

_DESCRIPTION = """\
Spec-Bench's protocol: chats with each method's own history, speedups by task, answer files that
Spec-Bench reads. A run that was stopped goes on.

  python eval/spec_bench.py --target.path MODEL --head HEAD --questions QUESTIONS.jsonl \\
      --methods stock,plain,head --out runs/spec-bench
  python eval/spec_bench.py --list     # every name that a method may have, with its options

--n_questions takes a few, --max_new_tokens ends a turn, --compat adds Spec-Bench's old counting.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Answers what is not answered yet; writes OUT/journal.jsonl as it goes, then
    OUT/answers/run-R/METHOD.jsonl, OUT/spec-bench.json, table.md and config.yaml. Returns the exit
    status."""
    config = parse(
        SpecBenchConfig,
        argv,
        "eval/spec_bench.py",
        _DESCRIPTION,
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.report import write_result
    from redrafter.evaluation.spec_bench.experiment import measure, methods_of
    from redrafter.evaluation.spec_bench.table import markdown
    from redrafter.files import write_config, write_text

    names = methods_of(config)
    target, head = load_both(config)
    out, body = Path(config.out), measure(config, names, target, head)
    write_config(out / "config.yaml", config)
    write_result(str(out / "spec-bench.json"), config, target, body)
    whole = json.loads((out / "spec-bench.json").read_text(encoding="utf-8"))
    write_text(out / "table.md", markdown(whole) + "\n")
    print((out / "table.md").read_text(encoding="utf-8"))
    return 0
