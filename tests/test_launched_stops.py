"""Commands that are asked to stop, alone and through the real launcher: a checkpoint, the way to go
on as the last line, and nobody left behind."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launching import ROOT, Launcher, free_port, quiet, training_argv

from redrafter.cli.args import reports_input_errors
from redrafter.training import checkpoint
from redrafter.training.faults import Interruption

STEPS = 4000
SCRIPT = "train/redrafter.py"


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A shell starts what is in the background with SIGINT ignored, and so would be what is tried
    here; nohup does the same to SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 24, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 24, "data.buffer_rows": 10, "optim.steps": STEPS,
    "optim.batch_positions": 32, "optim.depth": 3, "eval.prompts": 0, "save_steps": 5,
    "keep_checkpoints": 2, "log_steps": 2, "tracker": "null", "resume": "auto",
}  # fmt: skip


class Launched:
    """`accelerate launch train/redrafter.py` until it is stopped, in a terminal of its own or none.

    real, in a terminal: programs that start from nothing, as a user's do; else copies of this one,
    which spend no seconds on imports
    """

    def __init__(self, n: int, argv: list[str], log: Path, terminal: bool, real: bool):
        several = ["--multi_gpu", "--num_processes", str(n)] if n > 1 else ["--num_processes", "1"]
        words = ["--main_process_port", str(free_port()), *several, str(ROOT / SCRIPT), *argv]
        self.log, self.real, (self.terminal, inner) = log, real, pty.openpty()
        if real:
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words]
            with open(log, "w") as out:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _IN_TERMINAL, *command], cwd=ROOT, stdin=inner,
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                    env=quiet(ACCELERATE_USE_CPU="true"),
                )  # fmt: skip
        else:
            given = inner if terminal else None
            self.process = Launcher(words, given, log, ACCELERATE_USE_CPU="true")
            self.process.start()
        os.close(inner)

    def ready(self, checkpoints: Path, above: int) -> list[psutil.Process]:
        """The processes that train, once they have written a checkpoint above a step."""
        deadline = time.monotonic() + 200
        while not any(step > above for step in checkpoint.all_steps(checkpoints)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.02)
        trained = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in trained if not self.real or any(SCRIPT in word for word in p.cmdline())]

    def ended(self, trained: list[psutil.Process]) -> int:
        """The launcher's exit status, when all are gone."""
        status = self.process.wait(100)
        alive = psutil.wait_procs(trained, timeout=20)[1]
        assert not alive, f"left behind: {alive}"
        time.sleep(0.5)  # whoever speaks last has seen that the launcher is gone
        return status

    def said(self) -> str:
        return self.log.read_text()

    def close(self) -> None:
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self.terminal)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_is_stopped_says_so_in_one_line(name, status, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    @reports_input_errors
    def main(argv):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(10)

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == status
    assert capsys.readouterr().out.startswith(f"stopped by {name}: what is written is whole")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_noted_and_one_that_is_ignored_stays_so(name, monkeypatch, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Interruption() as noted:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a terminal and a launcher send it both
        assert noted.asked
    assert f"stopped by {name}: x is written" in str(noted.stopped(Path("x")))
    assert f"{name}: ends after this step" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    signal.signal(number, signal.SIG_IGN)  # nohup, or a script's background job
    try:
        with Interruption() as noted:
            os.kill(os.getpid(), number)
            assert not noted.asked
    finally:
        signal.signal(number, before)


def test_a_second_signal_later_ends_the_process(tmp_path):
    code = (
        "import os, signal, time\n"
        "from redrafter.training import faults\n"
        "faults._SAME_S = 0.05\n"
        "with faults.Interruption():\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=quiet(PYTHONPATH=str(ROOT)))
    assert done.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optm.lr", "3"], "unrecognized arguments: --optm.lr 3; did you mean --optim.lr?"),
        (["--tracker", "tensorbord"], "tracker: 'tensorbord' is unknown; did you mean"),
    ],
)
def test_an_error_is_the_last_line_under_the_launcher_of_one_process(argv, says, tmp_path):
    rest = ["--target.path=x", "--data.source.path=x", f"--output_dir={tmp_path / 'x'}"]
    words, log = ["--num_processes", "1", str(ROOT / SCRIPT), *argv, *rest], tmp_path / "said.txt"
    launched = Launcher(words, None, log, ACCELERATE_USE_CPU="true")
    launched.start()
    assert launched.wait(100) == -signal.SIGTERM, launched.said()
    assert "Traceback" not in launched.said(), launched.said()
    assert launched.said().splitlines()[-1].startswith(f"error: {says}"), launched.said()


#: the session's leader takes the terminal and becomes the launcher
_IN_TERMINAL = """\
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launched")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "how", "status"),
    [
        (1, "SIGTERM to the launcher", -signal.SIGTERM),
        (1, "SIGTERM to the process", -signal.SIGTERM),
        (1, "Ctrl-C", -signal.SIGTERM),
        (2, "SIGTERM to the launcher", 1),
        (2, "Ctrl-C", 1),
    ],
)
def test_a_run_that_is_asked_to_stop(n, how, status, tiny_target, folder):
    argv = training_argv(folder, tiny_target, SETTINGS)("out")
    checkpoints = folder / "out/checkpoints"
    before = max(checkpoint.all_steps(checkpoints), default=0)
    typed = how == "Ctrl-C"
    launched = Launched(n, argv, folder / "said.txt", terminal=typed, real=typed and n == 1)
    try:
        trained = launched.ready(checkpoints, before)
        if how == "Ctrl-C":
            os.write(launched.terminal, b"\x03")
        else:
            told = launched.process if "launcher" in how else trained[0]
            told.send_signal(signal.SIGTERM)
        assert launched.ended(trained) == status, launched.said()
    finally:
        launched.close()
    assert len(trained) == n
    step = checkpoint.all_steps(checkpoints)[-1]
    assert before < step < STEPS and checkpoint.fault(checkpoints / f"step-{step}") is None
    last = launched.said().rstrip().splitlines()[-1]
    assert last.startswith("stopped by SIG"), launched.said()
    assert last.endswith(
        f"step-{step} is written, the same command with --resume auto goes on"
    ), launched.said()
    if n == 1:
        assert "Traceback" not in launched.said(), launched.said()
