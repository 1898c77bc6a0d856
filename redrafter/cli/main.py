"""The console script: `redrafter SUBCOMMAND ...` runs the same `main` as the launcher of that name.

For installations without the clone; vllm_serve is for these alone. Subcommands are imported only
when asked for, so that `redrafter --help` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module

#: module of `redrafter.cli`, which is also the subcommand: what it does, in one line
SUBCOMMANDS = {
    "chat": "talk to a model with a draft head or any drafter (scripts/chat.py)",
    "prepare": "read text as rows of tokens (data/prepare.py)",
    "instructions": "let a chat model write prompts itself (data/instructions.py)",
    "answers": "let the model answer prompts (data/answers.py)",
    "states": "store its hidden states of rows (data/states.py)",
    "import_speculators": "states that speculators wrote, as a store (data/import_speculators.py)",
    "export_speculators": "a store of states for speculators (data/export_speculators.py)",
    "check_store": "check that a store is what was written (data/check.py)",
    "count_bigrams": "count a draft table from a store (data/bigrams.py)",
    "probe_bigrams": "ask the model for a draft table, token by token (data/probe.py)",
    "train_redrafter": "train a recurrent draft head for a frozen model (train/redrafter.py)",
    "lookahead_records": "record what a drafter says of its guesses (data/lookahead.py)",
    "train_disco": "train a lookahead for any drafter (train/disco.py)",
    "doctor": "say whether drafting pays here, with which tree, and why (eval/doctor.py)",
    "lossless": "prove that drafting changes no token (eval/lossless.py)",
    "verify": "compute again what was stored with a head, and say what differs (eval/verify.py)",
    "report": "one page of all that is known of a head (curves, speed, coloured texts)",
    "speed": "compare ways of decoding on the same prompts (eval/speed.py)",
    "spec_bench": "Spec-Bench's protocol and its answer files (eval/spec_bench.py)",
    "table": "one table and its pictures over prompt sets and temperatures (eval/table.py)",
    "acceptance": "what is accepted beside what could be, rule by rule (eval/acceptance.py)",
    "regret": "selectors beside their arms on a stream of prompts (eval/regret.py)",
    "lookahead": "when to stop drafting, beside every static length (eval/lookahead.py)",
    "static": "predict which fixed size of drafts pays best on this device (eval/static.py)",
    "convert_head": "write a head in Apple's layout, or Apple's in ours (scripts/convert_head.py)",
    "costs": "measure what forwards of 1..N tokens cost on this device (eval/costs.py)",
    "vllm_serve": "serve a model with a head by vLLM, in vLLM's environment",
    "push": "publish a head with its card on the Hub (scripts/push_to_hub.py)",
}


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: redrafter SUBCOMMAND [options]",
            "",
            *lines,
            "",
            "redrafter SUBCOMMAND --help explains its options.",
        ]
    )


def main(argv: list[str] | None = None) -> int | None:
    """Returns the exit status: what the subcommand returned, 2 for one that does not exist."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    name = args[0].replace("-", "_")
    if name not in SUBCOMMANDS:
        print(f"redrafter: no subcommand {args[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # argparse names the program after sys.argv[0]: the usage line should say what was typed.
    program = sys.argv[0]
    sys.argv[0] = f"{program} {name}"
    try:
        return import_module(f"redrafter.cli.{name}").main(args[1:])
    finally:
        sys.argv[0] = program


if __name__ == "__main__":
    sys.exit(main())
