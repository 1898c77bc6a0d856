"""`scripts/convert_head.py`: a head in another layout."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import ConvertConfig

_DESCRIPTION = """\
Write a draft head in another layout: Apple's (ml-recurrent-drafter), vLLM's Medusa, IBM's
mlp_speculator, or this library's. Weights are copied, so logits stay what they are. A layout takes
heads of its kind, and what it has no place for is refused: Apple's a pruned vocabulary, an input
norm, a GRU or the paper's first state (a scale of the embeddings is folded in), vLLM's a pruned
vocabulary. A head that draws on the target's lm_head (head.output target) needs --target.path.

  python scripts/convert_head.py --head runs/head --to apple --out runs/head-apple
  python scripts/convert_head.py --head runs/head --to redrafter --dtype bfloat16 --out runs/small \
      --target.path MODEL
  python scripts/convert_head.py --head runs/medusa --to vllm-medusa --out runs/medusa-vllm
  python scripts/convert_head.py --head APPLE --to redrafter --out runs/head --target.path MODEL

Reading needs no conversion: --head of every command takes Apple's folders too, IBM's and Arctic's
mlp_speculator heads, Medusa's (FasterDecoding's and vLLM's) and Hydra's.
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ConvertConfig, argv, "scripts/convert_head.py", _DESCRIPTION, alone=True)
    from redrafter.export.layouts import convert
    from redrafter.fetch import fetch
    from redrafter.targets.load import load_target

    target = None if config.target is None else load_target(config.target)
    head = convert(fetch(config.head, "head"), config.to, config.out, target, config.dtype)
    print(f"{config.out}: a head in the layout {config.to}")
    if config.to == "redrafter":
        whose = head.config.target_name or "no target (give --target.path to record one)"
        print(f"made for {whose}")
    return 0
