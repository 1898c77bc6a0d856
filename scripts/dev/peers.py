"""How fast are others? Engines of other people and our own loops in one run; see scripts/peers.sh.

    python scripts/dev/peers.py prompts --model MODEL --file ROWS.jsonl --n 6 --out prompts.json
    python scripts/dev/peers.py run --model MODEL --head HEAD --draft DRAFT \\
        --prompts prompts.json --engines redrafter,transformers --out peers.json.gz
    python scripts/dev/peers.py table peers.json.gz

Each engine runs in a process of its own (peers_worker.py), and all take turns, prompt by prompt in
rotating order, so that what else the machine does hits all alike; one computes at a time. Before
that, every method decodes one prompt that is not counted. A peer that fails is left out from then
on, and the table says why; the result is written after every prompt.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from peers_figures import show
from transformers import AutoTokenizer

from redrafter.cli.args import reports_input_errors
from redrafter.contracts import InputError
from redrafter.data.prompts import load_prompts
from redrafter.files import provenance, read_packed, write_bytes, write_json
from redrafter.targets.devices import device_name

WORKER = str(Path(__file__).resolve().parent / "peers_worker.py")
#: peer -> method, in processes of one engine each; a method of vLLM fills a process
GROUPS: dict[str, list[dict[str, str]]] = {
    "redrafter": [{
        "redrafter plain": "plain", "redrafter suffix:3x1": "suffix:3x1",
        "redrafter head:1x1": "head:1x1", "redrafter model:1x2": "model:1x2",
        "redrafter head + suffix": "mix(head:1x2,suffix:3x1):nodes=3",
    }],
    "transformers": [{
        "transformers stock": "stock", "transformers prompt lookup": "lookup",
        "transformers assistant": "assistant",
    }],
    "flashspec": [{
        "FlashSpec n-gram": "ngram", "FlashSpec draft model": "draft",
        "FlashSpec default": "auto",
    }],
    "vllm": [
        {"vLLM plain": "plain"}, {"vLLM ngram": "ngram:4"},
        {"vLLM with our head": "head:2"},
    ],
}  # fmt: skip
_START_S, _ANSWER_S = 1200.0, 600.0  # a first start of vLLM compiles the model
_ROOM = 8  # tokens drafted past the last one


class PeerFailed(Exception):
    """Why a peer gave no answer."""


@dataclass(frozen=True)
class Group:
    """Peers that share a process. methods: peer -> method; command: ends in the worker's own
    arguments; env: the whole environment; log: file for what the libraries say"""

    engine: str
    methods: Mapping[str, str]
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    start_s: float = _START_S
    answer_s: float = _ANSWER_S


class Worker:
    """A running group. Must be ready before it is asked, see `ready`."""

    def __init__(self, group: Group):
        self.group = group
        group.log.parent.mkdir(parents=True, exist_ok=True)
        with open(group.log, "ab") as log:
            self._process = subprocess.Popen(
                group.command, env=dict(group.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log,
            )  # fmt: skip

    def ready(self) -> dict[str, Any]:
        """Waits until it has loaded; its versions, and its methods that failed, with reasons."""
        return self._answer(self.group.start_s)

    def decode(self, peer: str, ids: Sequence[int]) -> dict[str, Any]:
        """`tokens`, `seconds`, `cpu_seconds`. Raises PeerFailed."""
        asked = json.dumps({"method": self.group.methods[peer], "ids": list(ids)}) + "\n"
        try:
            self._process.stdin.write(asked.encode())
            self._process.stdin.flush()
        except OSError:
            raise PeerFailed(self._ended()) from None
        answer = self._answer(self.group.answer_s)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """Its input ends, and with it the process; one that hangs is killed."""
        with suppress(OSError):  # where it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        answers = self._process.stdout
        if not select.select([answers], [], [], seconds)[0]:
            self._process.kill()
            raise PeerFailed(f"no answer within {seconds:g} s")
        line = answers.readline()
        if not line:
            raise PeerFailed(self._ended())
        return json.loads(line)

    def _ended(self) -> str:
        status = self._process.wait()
        said = self.group.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"its process ended with status {status}: {last[:400]}"


def new_record(engine: str) -> dict[str, Any]:
    """Of one peer in one run. tokens: by prompt; seconds, cpu_seconds: by round, then by prompt"""
    return {"engine": engine, "tokens": [], "seconds": [], "cpu_seconds": [], "error": None}


def measure(
    groups: Sequence[Group],
    prompts: Sequence[Sequence[int]],
    rounds: int,
    records: dict[str, dict[str, Any]],
    save: Callable[[], None],
) -> dict[str, dict[str, str]]:
    """Fills `records`, a new one of every peer, and returns the engines' versions.

    save: called after every prompt
    """
    records |= {peer: new_record(g.engine) for g in groups for peer in g.methods}
    workers = [worker for group in groups if (worker := _started(group, records)) is not None]
    try:
        versions = _await(workers, records)
        turns = [(peer, worker) for worker in workers for peer in worker.group.methods]
        for peer, worker in turns:
            _turn(peer, worker, prompts[0], records[peer])
        for number in range(rounds):
            for i, ids in enumerate(prompts):
                first = (number * len(prompts) + i) % len(turns)
                for peer, worker in turns[first:] + turns[:first]:
                    _turn(peer, worker, ids, records[peer], (number, i))
                save()
                print(f"round {number + 1}, prompt {i + 1} of {len(prompts)}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    return versions


def _started(group: Group, records: dict[str, dict[str, Any]]) -> Worker | None:
    try:
        return Worker(group)
    except OSError as error:
        for peer in group.methods:
            _fail(peer, records[peer], str(error))
        return None


def _await(
    workers: Sequence[Worker], records: dict[str, dict[str, Any]]
) -> dict[str, dict[str, str]]:
    versions: dict[str, dict[str, str]] = {}
    for worker in workers:
        try:
            ready = worker.ready()
        except PeerFailed as error:
            ready = {"failed": dict.fromkeys(worker.group.methods.values(), str(error))}
        versions.setdefault(worker.group.engine, ready.get("versions", {}))
        for peer, method in worker.group.methods.items():
            if method in ready["failed"]:
                _fail(peer, records[peer], ready["failed"][method])
    return versions


def _turn(
    peer: str,
    worker: Worker,
    ids: Sequence[int],
    record: dict[str, Any],
    place: tuple[int, int] | None = None,
) -> None:
    """One prompt by one peer. place: (round, prompt) where it counts"""
    if record["error"] is not None:
        return
    try:
        answer = worker.decode(peer, ids)
    except PeerFailed as error:
        _fail(peer, record, str(error))
        return
    if place is None:
        return
    number, i = place
    for key in ("seconds", "cpu_seconds"):
        if i == 0:
            record[key].append([])
        record[key][number].append(answer[key])
    if number == 0:
        record["tokens"].append(answer["tokens"])
    elif answer["tokens"] != record["tokens"][i]:
        _fail(peer, record, f"other tokens for prompt {i + 1} in round {number + 1} than before")


def _fail(peer: str, record: dict[str, Any], why: str) -> None:
    record["error"] = why
    print(f"{peer} is left out: {why}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ commands


def prompts(args: argparse.Namespace) -> None:
    """The last rows of a file, as the model's chat template renders them, as ids."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = load_prompts(args.file, tokenizer, "auto", n=args.n, part="last")
    write_json(args.out, {"file": Path(args.file).name, "rows": [p.row for p in found],
                          "prompts": [list(p.ids) for p in found]})  # fmt: skip


def groups_of(args: argparse.Namespace, threads: int, longest: int) -> list[Group]:
    """The processes of the wanted engines. longest: tokens of a prompt"""
    unknown = set(args.engines.split(",")) - set(GROUPS)
    if unknown:
        raise InputError(f"engines: {sorted(unknown)} unknown; choose from {', '.join(GROUPS)}")
    found = []
    for engine in args.engines.split(","):
        for number, methods in enumerate(GROUPS[engine]):
            settings = {
                "model": args.model, "head": args.head, "draft": args.draft,
                "new_tokens": args.new_tokens, "methods": list(methods.values()),
                "max_tokens": longest + args.new_tokens + _ROOM, "eager": args.eager,
            }  # fmt: skip
            python = args.vllm_python if engine == "vllm" else sys.executable
            found.append(Group(
                engine, methods, [python, WORKER, engine, json.dumps(settings)],
                environment(engine, python, threads, args.flashspec),
                Path(args.work) / f"{engine}-{number}-{threads}.log",
            ))  # fmt: skip
    return found


def environment(engine: str, python: str, threads: int, flashspec: str | None) -> dict[str, str]:
    """Of an engine's process: so many threads, and all else as its user would find it, except that
    threads which wait give up their core: beside other work a spinning engine took ten times as
    long with two threads as with one, which says nothing about it."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
           "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    # numba, by which vLLM's ngram drafts, sets the number of OpenMP's threads for all to its own.
    env["NUMBA_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_WAIT_POLICY", "passive")
    root = str(Path(__file__).resolve().parent.parent.parent)
    paths = [root, *([flashspec] if flashspec and engine == "flashspec" else [])]
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if engine == "vllm":
        env["PATH"] = f"{Path(python).parent}{os.pathsep}{env['PATH']}"  # it calls ninja and such
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Bound to cores, its threads would share one with whatever else the system put there.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        env.setdefault("VLLM_NO_USAGE_STATS", "1")
        # What 0.32 keeps of a compilation it cannot load again on a CPU, and compiles anew at
        # every start ("no attribute 'finalize_loading'"); torch's own cache below it can.
        env.setdefault("VLLM_USE_AOT_COMPILE", "0")
    return env


def run(args: argparse.Namespace) -> None:
    """All engines at each number of threads; writes the result and prints its tables."""
    asked = json.loads(Path(args.prompts).read_text(encoding="utf-8"))
    about = provenance()
    body: dict[str, Any] = {
        "asked": {
            "model": Path(args.model).name, "head": Path(args.head).name,
            "file": asked["file"], "rows": asked["rows"], "n_prompts": len(asked["prompts"]),
            "new_tokens": args.new_tokens, "rounds": args.rounds, "eager": args.eager,
        },
        "device": device_name(torch.device("cpu")), "versions": {}, "runs": {},
        **{key: about[key] for key in ("git_commit", "machine", "written")},
    }  # fmt: skip

    def save() -> None:
        content = (json.dumps(body, ensure_ascii=False) + "\n").encode()
        packed = args.out.endswith(".gz")
        write_bytes(args.out, gzip.compress(content, mtime=0) if packed else content)

    longest = max(map(len, asked["prompts"]))
    for threads in args.threads.split(","):
        print(f"{threads} thread(s): starting the engines", flush=True)
        groups = groups_of(args, int(threads), longest)
        records = body["runs"].setdefault(threads, {})
        found = measure(groups, asked["prompts"], args.rounds, records, save)
        body["versions"] |= {engine: of for engine, of in found.items() if of}
        save()
    print(show(body))


def table(args: argparse.Namespace) -> None:
    """The tables of a result."""
    text = read_packed(args.result.removesuffix(".gz"))
    if text is None:
        raise InputError(f"{args.result} does not exist; `peers.py run --out` writes it")
    print(show(json.loads(text)))


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prompts", help=prompts.__doc__)
    one.set_defaults(do=prompts)
    for name in ("model", "file", "out"):
        one.add_argument(f"--{name}", required=True)
    one.add_argument("--n", type=int, default=6)
    two = commands.add_parser("run", help=run.__doc__)
    two.set_defaults(do=run)
    for name in ("model", "head", "draft", "prompts", "out"):
        two.add_argument(f"--{name}", required=True)
    two.add_argument("--engines", default=",".join(GROUPS), help="some of these")
    two.add_argument("--new_tokens", type=int, default=48)
    two.add_argument("--rounds", type=int, default=1)
    two.add_argument("--threads", default="1,2", help="numbers of threads, one run each")
    two.add_argument("--vllm_python", default=sys.executable, help="of an environment with vLLM")
    two.add_argument("--flashspec", help="a folder with FlashSpec, if this environment has none")
    two.add_argument("--eager", action="store_true", help="vLLM is not to compile the model")
    two.add_argument("--work", default="peers-work", help="for the engines' logs")
    three = commands.add_parser("table", help=table.__doc__)
    three.set_defaults(do=table)
    three.add_argument("result")
    args = parser.parse_args(argv)
    args.do(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
