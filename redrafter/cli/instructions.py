"""`data/instructions.py`: prompts that a chat model writes itself."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import InstructionsConfig
from redrafter.processes import say

_DESCRIPTION = """\
First stage of the data without any: a chat model, given its template up to where a user's words
begin, writes what a user might ask (Magpie, arXiv 2406.08464).

  python data/instructions.py --target.path MODEL --n 2000 --output_dir runs/prompts
  python data/answers.py --target.path MODEL --prompts runs/prompts --output_dir runs/answers

  python data/check.py --store runs/prompts --target.path MODEL --show 5
      a look at some

Goes on where it stopped after an interruption, and `accelerate launch` shares the work out as it
does for data/answers.py. A small model's questions are not all sensible; its answers to them are
its own all the same, and those a draft head has to foresee.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(InstructionsConfig, argv, "data/instructions.py", _DESCRIPTION)
    from redrafter.data.build_rows import report
    from redrafter.data.instructions import build_instructions
    from redrafter.targets.load import load_target

    target = load_target(config.target)
    say(report(build_instructions(target, config, config.output_dir)))
    return 0
