"""`eval/speed.py`: compares ways of decoding on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import SpeedConfig

_DESCRIPTION = """\
Tokens per step and speed of ways of decoding, on the same prompts, interleaved.

  python eval/speed.py --target.path MODEL --head HEAD --prompts PROMPTS.jsonl --n_prompts 40 \\
      --methods stock,plain,lookup,head,head:8x5 --out HEAD/speed.json
  python eval/speed.py --list      # every name that a method may have, with its options

--temperature 1 samples, greedy is the default; --max_new_tokens and --batch_size say how much is
decoded, --repeats how often. The rows are the last --n_prompts of the file: a training holds out
its last ones. A result in the head's folder goes into its card and its report.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON. Returns the exit status."""
    config = parse(
        SpeedConfig,
        argv,
        "eval/speed.py",
        _DESCRIPTION,
        names="describe_methods",
        alone=True,
    )
    from redrafter.evaluation.methods import check_resources, parse_methods
    from redrafter.evaluation.models import load_both
    from redrafter.evaluation.prompt_sets import check, measure, show
    from redrafter.evaluation.report import write_result
    from redrafter.hub.profile import profile_after

    check(config)
    names = parse_methods(config.methods)
    check_resources(names, config)
    target, head = load_both(config, measured=True)
    body = measure(config, names, target, head)
    print(show(body))
    write_result(config.out, config, target, body, head)
    profile_after(config.out, config.head, head)
    return 0
