#!/usr/bin/env bash
# SIGTERM to accelerate launch of one process ends the launcher alone: the training goes on.
#
# Versions:  accelerate 1.15.0, torch 2.13.0
# Expected:  a scheduler's SIGTERM to the process it started (docker stop, systemd, a timeout)
#            reaches the training, or at least ends it, as it does with several processes.
# Happens:   one process is started as a plain child and waited for, without a handler: the
#            launcher dies (-15), the child is adopted by init, never hears of a signal, and
#            works to its end. Two processes are torchrun's, which passes SIGTERM on.
# Matters:   the job counts as stopped while it still holds the GPU and writes checkpoints; the
#            next one starts beside it, into the same folder.
# Seen:      1 processes: launcher ends with -15; 1 of 1 work on to their end
#            2 processes: launcher ends with 1; 0 of 2 work on to their end
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 accelerate==1.15.0
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HOME="$work/home"
cd "$work"
cat >job.py <<'PYTHON'
import os
import sys
import time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
(folder / f"started-{rank}").touch()
deadline = time.monotonic() + 300
while time.monotonic() < deadline and not (folder / "launcher-is-gone").exists():
    time.sleep(0.1)
time.sleep(2)
(folder / f"done-{rank}").touch()
PYTHON
"$VENV/bin/python" - <<'PYTHON'
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def stop(n, *options):
    """(exit status of a launcher that got a SIGTERM, how many of its n processes worked on)."""
    folder = Path(f"run-{n}")
    folder.mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options,
         "--num_processes", str(n), "--main_process_port", port, "job.py", str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list(folder.glob("started-*"))) < n:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.terminate()
    status = launcher.wait()
    (folder / "launcher-is-gone").touch()
    time.sleep(10)
    worked = len(list(folder.glob("done-*")))
    print(f"{n} processes: launcher ends with {status}; {worked} of {n} work on to their end")
    return status, worked


assert stop(1) == (-15, 1), "the process is ended with its launcher now"
assert stop(2, "--multi_gpu")[1] == 0
PYTHON
