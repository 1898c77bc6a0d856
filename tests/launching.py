"""Commands on several processes of this machine, for the tests of what they do together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def training_argv(folder: Path, target: Path, settings: dict) -> Callable[..., list[str]]:
    """make(out, key=value ...): arguments of train/redrafter.py, on a tiny target's own prompts."""

    def make(out: str, **changes: object) -> list[str]:
        given = {
            "target.path": target, "data.source.path": target / "prompts_train.jsonl",
            "output_dir": folder / out, "data.folder": folder / "data", **settings, **changes,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in given.items()]

    return make


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def quiet(**more: str) -> dict[str, str]:
    """This environment without what an earlier launch in this process may have left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FORK_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def launch(options: Sequence[str], script: str, argv: Sequence[str], **env: str) -> str:
    """`accelerate launch` of a launcher, to its end. Returns its output; fails where it fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        "--main_process_port", str(free_port()), *options, str(ROOT / script), *argv,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=quiet(**env), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def ranks(n: int, script: str, argv: Sequence[str], logs: Path) -> list[subprocess.Popen]:
    """A launcher's n processes as torchrun would start them, without anyone who looks after them.

    What process i says goes to logs/rank-i.txt.
    """
    logs.mkdir(parents=True, exist_ok=True)
    shared = {
        "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    started = []
    for rank in range(n):
        with open(logs / f"rank-{rank}.txt", "w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / script), *argv], cwd=ROOT,
                    env=quiet(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
                    stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return started
