"""The console script: `redrafter SUBCOMMAND ...` runs the same `main` as the launcher of that name.

For installations without the clone; vllm_serve is for these alone. Subcommands are imported only
when asked for, so that `redrafter --help` answers at once.
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from pathlib import Path

from redrafter import __version__
from redrafter.cli.naming import asks

#: task -> module of `redrafter.cli`, which is also the subcommand: what it does, in one line
TASKS = {
    "use a head": {
        "examples": "programs to begin from, and a head that ships: list, show, copy",
        "make_smollm2": "make SmolLM2-135M-Instruct, to try it on (scripts/make_smollm2.py)",
        "chat": "talk to a model with a draft head or any drafter (scripts/chat.py)",
        "doctor": "say whether drafting pays here, with which tree, and why (eval/doctor.py)",
    },
    "train one": {
        "train": "train a draft head for a frozen model (train/redrafter.py)",
        "configs": "the recipes that come with the library: list, show, copy",
        "train_disco": "train a lookahead for any drafter (train/disco.py)",
    },
    "prove and measure": {
        "lossless": "prove that drafting changes no token (eval/lossless.py)",
        "verify": "compute again what was stored with a head; say what differs (eval/verify.py)",
        "speed": "compare ways of decoding on the same prompts (eval/speed.py)",
        "report": "one page of all that is known of a head (curves, speed, coloured texts)",
        "table": "one table and its pictures over prompt sets and temperatures (eval/table.py)",
        "spec_bench": "Spec-Bench's protocol and its answer files (eval/spec_bench.py)",
        "costs": "measure what forwards of 1..N tokens cost on this device (eval/costs.py)",
        "acceptance": "what is accepted beside what could be, rule by rule (eval/acceptance.py)",
        "static": "predict which fixed size of drafts pays best here (eval/static.py)",
        "regret": "selectors beside their arms on a stream of prompts (eval/regret.py)",
        "stream": "a stream of prompts, whose head may learn and is watched (eval/stream.py)",
        "lookahead": "when to stop drafting, beside every static length (eval/lookahead.py)",
        "compare_heads": "kinds, sizes and losses of heads, trained alike (eval/compare_heads.py)",
    },
    "publish and serve": {
        "push": "publish a head with its card on the Hub (scripts/push_to_hub.py)",
        "convert_head": "write a head in another layout, or another's in ours "
        "(scripts/convert_head.py)",
        "vllm_serve": "serve a model with a head by vLLM, in vLLM's environment",
    },
    "make data, stage by stage": {
        "prepare": "read text as rows of tokens (data/prepare.py)",
        "instructions": "let a chat model write prompts itself (data/instructions.py)",
        "answers": "let the model answer prompts (data/answers.py)",
        "states": "store its hidden states of rows (data/states.py)",
        "check_store": "check that a store is what was written; show rows (data/check.py)",
        "import_speculators": "states that speculators wrote, as a store "
        "(data/import_speculators.py)",
        "export_speculators": "a store of states for speculators (data/export_speculators.py)",
        "count_bigrams": "count a draft table from a store (data/bigrams.py)",
        "probe_bigrams": "ask the model for a draft table, token by token (data/probe.py)",
        "lookahead_records": "record what a drafter says of its guesses (data/lookahead.py)",
    },
}
SUBCOMMANDS = {name: text for task in TASKS.values() for name, text in task.items()}
#: what else is taken, as lines of old notes have it -> the subcommand
_ALSO = {"train_redrafter": "train"}
_END = """\
redrafter SUBCOMMAND --help explains its options. In brackets: the file of a clone that does the
same, `python eval/speed.py ...`. What works in several processes takes accelerate launch's options
as --launch.X: redrafter answers --launch.multi_gpu --launch.num_processes 2 ..."""


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = ["usage: redrafter SUBCOMMAND [options]"]
    for task, commands in TASKS.items():
        lines += ["", f"{task}:"]
        lines += [f"  {shown(name):<{width}}  {text}" for name, text in commands.items()]
    return "\n".join([*lines, "", _END])


def shown(name: str) -> str:
    """A subcommand as it is typed; with `_` it is taken, too."""
    return name.replace("_", "-")


def unknown(word: str) -> str:
    """One line for a subcommand that does not exist, with those that may have been meant: of a
    name like it, or named after it (`check` for check-store, or a clone's data/check.py)."""
    name = Path(word).stem.replace("_", "-")
    named = [n for n, text in SUBCOMMANDS.items() if f"/{name}.py)" in text or name in n.split("_")]
    near = named or difflib.get_close_matches(name, map(shown, SUBCOMMANDS), n=1)
    meant = f"; did you mean redrafter {' or '.join(map(shown, near))}?" if near else ""
    return f"error: there is no subcommand {word!r}{meant} (redrafter --help lists all of them)"


def main(argv: list[str] | None = None) -> int | None:
    """Returns the exit status: what the subcommand returned, 2 for one that does not exist."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"redrafter {__version__}")
        return 0
    name = args[0].replace("-", "_")
    name = _ALSO.get(name, name)
    if name not in SUBCOMMANDS:
        print(unknown(args[0]), file=sys.stderr)
        return 2
    try:
        subcommand = import_module(f"redrafter.cli.{name}")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == __package__.partition(".")[0]:
            raise
        # As in vLLM's environment, where redrafter lies without its dependencies.
        print(
            f"redrafter {args[0]}: error: the package {error.name} is not installed in this "
            "environment; run the command in one into which redrafter was installed with its "
            "dependencies (pip install -e . in a clone). Beside vLLM, without them, there is "
            "vllm-serve alone",
            file=sys.stderr,
        )
        return 2
    # argparse names the program after sys.argv[0]: the usage line should say what was typed.
    program = sys.argv[0]
    sys.argv[0] = f"{program} {shown(name)}"
    try:
        if name != "train" and asks(args[1:]):
            return import_module("redrafter.cli.train").launch([name, *args[1:]])
        return subcommand.main(args[1:])
    finally:
        sys.argv[0] = program


if __name__ == "__main__":
    sys.exit(main())
