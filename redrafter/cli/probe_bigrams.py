"""`data/probe.py`: ask the target what follows every single token, for the n-gram drafter."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import ProbeConfig
from redrafter.processes import say

_DESCRIPTION = """\
Ask the target what follows every single token of its vocabulary: a draft table that needs neither
training nor text, made once per target. The same command goes on after an interruption, and
`accelerate launch --multi_gpu --num_processes 8 data/probe.py ...` shares the work out.

  python data/probe.py --target.path MODEL --out runs/probed.safetensors
  python eval/speed.py --methods plain,bigram:4x4 --bigrams runs/probed.safetensors ...
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ProbeConfig, argv, "data/probe.py", _DESCRIPTION, plan="data_jobs:plan_probe")
    from redrafter.drafters.bigram import load_bigrams
    from redrafter.evaluation.models import load_both
    from redrafter.tables.probed import probe_bigrams

    target, _ = load_both(config)
    probe_bigrams(
        target, config.out, width=config.width, bos=config.bos, unigram=config.unigram,
        batch_size=config.batch_size, part_tokens=config.part_tokens, progress=True,
    )  # fmt: skip
    table, about = load_bigrams(config.out, target.vocab_size)
    unknown = target.vocab_size - table.n_seen
    say(
        f"{config.out}: {config.width} successors of each of {target.vocab_size} tokens, probed "
        f"{'with' if about['bos'] else 'without'} BOS"
        + f"; none of {unknown}, after which the target's scores are not finite"
        * bool(unknown)
    )
    return 0
