"""Kill one of several processes of the data pipeline at random moments, many times, and compare
what they leave with an undisturbed run by one process.

    python scripts/dev/kill_processes.py --target MODEL --source PROMPTS.jsonl --log kills.log
    python scripts/dev/kill_processes.py ... --start fork --processes 1,2,3

The stages and checks are those of kill_pipeline.py: equal bytes at the end, no finished shard
written again. Each attempt is a launch of several processes (of the numbers given, one at random),
of which one gets SIGKILL, up to 0.3 s after up to 8 more shards were finished (on a busy machine
seconds alone say little). The others must then end by themselves: under
`accelerate launch`, which ends them; or, with `--start fork`, without any launcher, by noticing.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from kill_pipeline import compared, content, finished, logger, parser_of, pipeline, written_again

from redrafter.config import SourceConfig
from redrafter.processes import everyone, join
from redrafter.targets.load import load_target

ROOT = Path(__file__).resolve().parent.parent.parent
#: for all processes to start in, and to end in: a busy machine is slow, a hang lasts for ever
_LIMIT_S = 600.0


class Forked:
    """Processes without a launcher: copies of this one, which has the target in memory."""

    def __init__(self, given: argparse.Namespace):
        self.target, self.source = load_target(given.target), source_of(given)

    def start(self, n: int, folder: Path, scratch: Path) -> list[int]:
        """The processes' ids, by rank. scratch: an empty folder of this attempt"""
        return [os.fork() or self._run(rank, n, folder, scratch) for rank in range(n)]

    def _run(self, rank: int, n: int, folder: Path, scratch: Path) -> int:
        code = 3
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            if n > 1:
                store = torch.distributed.FileStore(str(scratch / "meeting"), n)
                torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=n)
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
                join()
            (scratch / f"ready-{rank}").touch()
            pipeline(self.target, self.source, folder)
            code = 0
        except BaseException as error:
            print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def wait(self, ids: list[int]) -> bool:
        """Whether all end in time and without an error."""
        left, fine = set(ids), True
        deadline = time.monotonic() + _LIMIT_S
        while left and time.monotonic() < deadline:
            for process in list(left):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    left.remove(process)
                    fine &= status == 0
            time.sleep(0.01)
        for process in left:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        if left:
            raise SystemExit(f"FAULT: {len(left)} processes did not end")
        return fine


class Launched:
    """Processes of `accelerate launch`, as a user starts them."""

    def __init__(self, given: argparse.Namespace):
        self.given = given

    def start(self, n: int, folder: Path, scratch: Path) -> list[int]:
        """See `Forked`."""
        self.scratch = scratch
        many = ["--multi_gpu", "--num_processes", str(n)] if n > 1 else []
        given = self.given
        command = [
            sys.executable, "-m", "accelerate.commands.launch", *many,
            "--main_process_port", str(free_port()), __file__, "--target", given.target,
            "--source", given.source, "--format", given.format, "--rows", str(given.rows),
            "--worker", str(folder), "--scratch", str(scratch),
        ]  # fmt: skip
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        with open(scratch / "log", "w", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT)
        deadline = time.monotonic() + _LIMIT_S
        while not all((scratch / f"ready-{rank}").exists() for rank in range(n)):
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                self.launcher.kill()
                raise SystemExit("FAULT: no start:\n" + (scratch / "log").read_text()[-2000:])
            time.sleep(0.01)
        return [int((scratch / f"ready-{rank}").read_text()) for rank in range(n)]

    def wait(self, ids: list[int]) -> bool:
        """See `Forked`."""
        try:
            fine = self.launcher.wait(_LIMIT_S) == 0
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            raise SystemExit("FAULT: the launch did not end") from None
        if any(is_running(process) for process in ids):
            raise SystemExit("FAULT: the launch left processes behind")
        return fine


def worker(given: argparse.Namespace) -> int:
    """What a launched process does."""
    target = load_target(given.target)
    rank = join().process_index
    ready = Path(given.scratch) / f".ready-{rank}"
    ready.write_text(str(os.getpid()))
    everyone(None)
    ready.rename(ready.with_name(f"ready-{rank}"))
    pipeline(target, source_of(given), Path(given.worker))
    return 0


def source_of(given: argparse.Namespace) -> SourceConfig:
    return SourceConfig(given.source, format=given.format, n_rows=given.rows)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def n_finished(folder: Path) -> int:
    """As `finished`, but while files come and go there."""
    return len(list(folder.glob("*/shard-*.json")))


def is_complete(folder: Path) -> bool:
    return (folder / "states" / "manifest.json").exists()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True)
class Kill:
    """Of one process: after so many more shards, and so many seconds."""

    rank: int
    shards: int
    after_s: float


def attempt(
    how: Forked | Launched, n: int, folder: Path, scratch: Path, kill: Kill | None
) -> tuple[bool, bool]:
    """(whether they all got to their end, whether one was killed)."""
    scratch.mkdir()
    wanted = n_finished(folder) + (kill.shards if kill else 0)
    ids = how.start(n, folder, scratch)
    killed = False
    if kill is not None:
        deadline = time.monotonic() + _LIMIT_S
        ready = [scratch / f"ready-{rank}" for rank in range(n)]
        while not all(path.exists() for path in ready) or n_finished(folder) < wanted:
            # All that was left may have been fewer shards.
            if is_complete(folder) or time.monotonic() > deadline:
                break
            time.sleep(0.002)
        time.sleep(kill.after_s)
        if not is_complete(folder):  # else it would be killed while it takes its leave
            os.kill(ids[kill.rank], signal.SIGKILL)
            killed = True
    fine = how.wait(ids)
    if not fine and not killed:
        log = scratch / "log"
        raise SystemExit("FAULT: failed unkilled\n" + (log.read_text() if log.exists() else ""))
    shutil.rmtree(scratch)
    return fine, killed and not fine


def disturb(how, given, base: Path, wanted: dict[str, str], say) -> list[str]:
    """Kill until there are enough; what is wrong with what is left."""
    chance, kills, folders = random.Random(given.seed), 0, 0
    sizes = [int(n) for n in given.processes.split(",")]
    bad: list[str] = []
    while kills < given.kills and not bad:
        folders += 1
        folder, over, before = base / f"disturbed-{folders}", False, {}
        while not over:
            n = chance.choice(sizes)
            kill = None
            if kills < given.kills:
                kill = Kill(chance.randrange(n), chance.randrange(9), chance.uniform(0, 0.3))
            over, killed = attempt(how, n, folder, base / "scratch", kill)
            now = finished(folder)
            bad += written_again(folders, before, now)
            before = now
            if killed:
                kills += 1
                say(f"kill {kills:3d} of process {kill.rank} of {n}, {kill.after_s:.3f} s after "
                    f"{kill.shards} more: folder {folders}, {len(now)} shards")  # fmt: skip
        told, wrong = compared(folders, folder, wanted)
        bad += wrong
        say(f"folder {folders}, finished by {n}: {told}")
        shutil.rmtree(folder)
    say(f"{kills} kills over {folders} folders: {'FAILED' if bad else 'no difference'}")
    return bad


def main() -> int:
    parser = parser_of(__doc__, kills=20)
    parser.add_argument("--processes", default="2", help="numbers of them, with commas")
    parser.add_argument("--start", choices=["accelerate", "fork"], default="accelerate")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)  # forked children inherit no other threads
    if given.worker:
        return worker(given)
    say = logger(given.log)
    base = Path(tempfile.mkdtemp(prefix="kill-processes-"))
    target, clock = load_target(given.target), time.monotonic()
    pipeline(target, source_of(given), base / "undisturbed")
    whole_s = time.monotonic() - clock
    wanted = content(base / "undisturbed")
    say(f"undisturbed, one process: {len(wanted)} files in {whole_s:.2f} s; seed {given.seed}, "
        f"{given.kills} kills to come, {given.processes} processes, {given.start}")  # fmt: skip
    how = {"accelerate": Launched, "fork": Forked}[given.start](given)
    bad = disturb(how, given, base, wanted, say)
    for text in bad:
        say(f"FAULT: {text}")
    shutil.rmtree(base)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
