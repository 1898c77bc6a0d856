"""Commands on several processes of this machine, for the tests of what they do together."""

from __future__ import annotations

import argparse
import fcntl
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from redrafter.export.custom_generate import vendored_files

ROOT = Path(__file__).resolve().parent.parent
_ON_CPUS = {"ACCELERATE_USE_CPU": "true"}
#: what DeepSpeed imports when it makes an engine: torch's compiler, for seconds
_OF_DEEPSPEED = "deepspeed.runtime.zero.muon.original_muon"


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


class Copy(ForkProcess):
    """A script run by a copy of this process, which has imported already what a start of its own
    would spend most of its time on. What it says goes to a file."""

    def __init__(
        self, script: str | Path, argv: Sequence[str], env: dict[str, str], log: Path | None
    ):
        super().__init__(daemon=True)  # a test that fails leaves nothing running
        self.script, self.argv, self.env, self.log = str(ROOT / script), argv, env, log

    def run(self) -> None:
        if self.log is not None:
            with open(self.log, "w") as out:
                for stream in (1, 2):
                    os.dup2(out.fileno(), stream)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(ROOT)
        tempfile.tempdir = None  # is looked up anew
        sys.argv = [self.script, *self.argv]
        sys.path.insert(0, os.path.dirname(self.script))
        AcceleratorState._reset_state(reset_partial_state=True)  # this process's own, which is one
        runpy.run_path(self.script, run_name="__main__")

    def said(self) -> str:
        return self.log.read_text()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout_s: float) -> int:
        self.join(timeout_s)
        if self.exitcode is None:
            self.kill()
            raise AssertionError(f"{self.script} went on and on: {self.said()[-2000:]}")
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Started(Copy):
    """Stands for the `subprocess.Popen` of a script by a launcher that is a copy itself."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], **options: object):
        script = next(i for i, word in enumerate(args) if word.endswith(".py"))
        super().__init__(args[script], args[script + 1 :], dict(env), None)
        self.session = options.get("start_new_session", False)
        self.start()

    def run(self) -> None:
        if self.session:
            os.setsid()
        super().run()

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.script, timeout)
        return self.exitcode

    @property
    def returncode(self) -> int | None:
        return self.exitcode


class Launcher(Copy):
    """`accelerate launch`, the leader of a session, with a terminal or (as a scheduler's job) none.
    The launchers' code is the real one, torchrun's too; what they start are copies, which see its
    command line above them."""

    def __init__(self, words: Sequence[str], terminal: int | None, log: Path, **env: str):
        cli = import_module("accelerate.commands.accelerate_cli")  # seconds, which the copy saves
        super().__init__(cli.__file__, ["launch", *words], quiet(**env), log)
        self.daemon = False  # whoever is one starts no processes
        self.terminal = terminal

    def run(self) -> None:
        os.setsid()
        if self.terminal is not None:
            fcntl.ioctl(self.terminal, termios.TIOCSCTTY, 0)
            os.dup2(self.terminal, 0)
            sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115  # not the test runner's
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        me, above = os.getpid(), psutil.Process.cmdline

        def cmdline(process: psutil.Process) -> list[str]:
            return (
                [sys.executable, self.script, *self.argv] if process.pid == me else above(process)
            )

        psutil.Process.cmdline = cmdline
        accelerate_launch.subprocess = SimpleNamespace(
            Popen=Started, CalledProcessError=subprocess.CalledProcessError
        )
        subprocess_handler.Popen = Started
        super().run()


def run_copy(script: str | Path, argv: Sequence[object], log: Path, **env: str) -> tuple[int, str]:
    """(exit status, what it said) of a script, to its end."""
    started = Copy(script, [str(word) for word in argv], quiet(**env), log)
    started.start()
    return started.wait(600), started.said()


def ranks(
    n: int,
    script: str | Path,
    argv: Sequence[str],
    logs: Path,
    told: Mapping[str, str] = _ON_CPUS,
    port: int | None = None,
) -> list[Copy]:
    """A launcher's n processes as torchrun would start them, without anyone who looks after them.
    What each of them would import or make from the library's text is there before.

    told: what accelerate tells its processes; what process i says goes to logs/rank-i.txt
    """
    logs.mkdir(parents=True, exist_ok=True)
    vendored_files("recurrent")
    if "ACCELERATE_USE_DEEPSPEED" in told:
        import_module(_OF_DEEPSPEED)
    shared = {
        "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()),
    }  # fmt: skip
    started = []
    for rank in range(n):
        env = quiet(**told, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(Copy(script, argv, env, logs / f"rank-{rank}.txt"))
        started[-1].start()
    return started


def launch(options: Sequence[str], script: str, argv: Sequence[str], **env: str) -> str:
    """`accelerate launch` of a launcher, to its end. Returns its output; fails where it fails.

    accelerate itself reads the options and says what each process is told. Only the processes that
    torchrun would start are copies of this one.
    """
    said: list[str] = []

    def torchrun(given: argparse.Namespace) -> None:
        told = {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
        with tempfile.TemporaryDirectory() as logs:
            started = ranks(
                int(given.nproc_per_node), script, argv, Path(logs), told, int(given.master_port)
            )
            try:  # one that fails ends the others
                while running := [p for p in started if p.exitcode is None]:
                    assert wait([p.sentinel for p in running], 300), "they go on and on"
                    if any(p.exitcode for p in started):
                        break
            finally:
                for process in started:
                    process.kill()
                    process.join()
                said.extend(p.said() for p in started)
            assert not any(p.exitcode for p in started), "".join(said)[-8000:]

    words = ["--main_process_port", str(free_port()), *options, str(ROOT / script), *argv]
    with mock.patch.dict(os.environ, quiet(**env), clear=True):
        with mock.patch("torch.distributed.run.run", torchrun):
            launch_command(launch_command_parser().parse_args(words))
    return "".join(said)
