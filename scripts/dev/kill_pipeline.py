"""Kill the data pipeline at random moments, many times, and compare what it leaves with an
undisturbed run.

    python scripts/dev/kill_pipeline.py --target MODEL --source PROMPTS.jsonl --log kills.log

Each attempt is a child process that runs all stages (prompts, answers, states with greedy
continuations) in one folder; the parent sends it SIGKILL after a random time. Attempts go on in
that folder until one gets to the end. Then every file must hold the bytes that an undisturbed run
wrote, and no shard that was finished before a kill may have been written again. After that a new
folder is begun, until the number of kills is reached. Exit status 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from redrafter.config import AnswersConfig, SourceConfig, StatesConfig
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows
from redrafter.data.states import build_states
from redrafter.files import digest_file
from redrafter.targets.load import load_target


def pipeline(target, source: SourceConfig, folder: Path) -> None:
    """All stages, in shards so small that a kill meets many boundaries."""
    prompts = build_rows(source, target.tokenizer, "prompts", folder / "prompts", progress=False)
    how = AnswersConfig(max_new_tokens=24, batch_size=4, shard_prompts=4)
    answers = build_answers(target, prompts, how, folder / "answers", progress=False)
    how = StatesConfig(shard_bytes=30_000, forward_tokens=256)
    build_states(target, answers, how, folder / "states", continuation=2, progress=False)


def content(folder: Path) -> dict[str, str]:
    """Digest of every file, by its name."""
    return {
        str(p.relative_to(folder)): digest_file(p) for p in sorted(folder.rglob("*")) if p.is_file()
    }


def finished(folder: Path) -> dict[Path, int]:
    """Shards that have a receipt, and when they were written."""
    shards = (p.with_suffix(".safetensors") for p in folder.rglob("shard-*.json"))
    return {p: p.stat().st_mtime_ns for p in shards if p.exists()}


def written_again(number: int, before: dict[Path, int], now: dict[Path, int]) -> list[str]:
    """What is wrong with folder `number`, if shards that were finished are not what they were."""
    again = [p.name for p, when in before.items() if now.get(p) != when]
    return [f"folder {number}: finished shards were written again: {again[:3]}"] if again else []


def compared(number: int, folder: Path, wanted: dict[str, str]) -> tuple[str, list[str]]:
    """(How the files of folder `number` compare with the undisturbed run's, what is wrong)."""
    found = content(folder)
    differing = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
    if not differing:
        return f"{len(found)} files, all equal to the undisturbed run", []
    wrong = f"folder {number}: {len(differing)} files differ: {differing[:5]}"
    return f"{len(found)} files, DIFFERENT", [wrong]


def attempt(target, source: SourceConfig, folder: Path, kill_after_s: float) -> bool:
    """One child process; True if it ended before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            pipeline(target, source, folder)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
    deadline = time.monotonic() + kill_after_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"the pipeline failed by itself in {folder}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status)  # it may have ended in the last moment


def parser_of(description: str, kills: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder of a small model")
    parser.add_argument("--source", required=True, help=".jsonl of prompts")
    parser.add_argument("--format", default="auto", help="what its rows hold")
    parser.add_argument("--rows", type=int, default=24, help="rows of it to use")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--log", help="file to write the log to, besides printing it")
    return parser


def logger(path: str | None) -> Callable[[str], None]:
    """Prints, and writes to a file where there is one."""
    log = open(path, "w", encoding="utf-8") if path else None  # noqa: SIM115

    def say(text: str) -> None:
        print(text, flush=True)
        if log is not None:
            print(text, file=log, flush=True)

    return say


def main() -> int:
    given = parser_of(__doc__, kills=100).parse_args()
    torch.set_num_threads(1)  # forked children inherit no other threads
    say = logger(given.log)
    target = load_target(given.target)
    source = SourceConfig(given.source, format=given.format, n_rows=given.rows)
    base = Path(tempfile.mkdtemp(prefix="kill-pipeline-"))
    clock = time.monotonic()
    pipeline(target, source, base / "undisturbed")
    whole_s = time.monotonic() - clock
    wanted = content(base / "undisturbed")
    say(f"undisturbed: {len(wanted)} files in {whole_s:.2f} s; seed {given.seed}, "
        f"{given.kills} kills to come")  # fmt: skip
    chance, kills, folders, bad = random.Random(given.seed), 0, 0, []
    while kills < given.kills and not bad:
        folders += 1
        folder = base / f"disturbed-{folders}"
        before: dict[Path, int] = {}
        killed_here, over = 0, False
        while not over:
            # Once there are enough kills, the last folder is let run to its end.
            last = kills >= given.kills
            after_s = 1e9 if last else chance.uniform(0, whole_s / 3)
            over = attempt(target, source, folder, after_s)
            now = finished(folder)
            bad += written_again(folders, before, now)
            before = now
            if not over:
                kills, killed_here = kills + 1, killed_here + 1
                say(f"kill {kills:4d} after {after_s:6.3f} s: folder {folders}, "
                    f"{len(now)} shards finished")  # fmt: skip
        told, wrong = compared(folders, folder, wanted)
        bad += wrong
        say(f"folder {folders}: {killed_here} kills, {told}")
        shutil.rmtree(folder)
    for text in bad:
        say(f"FAULT: {text}")
    verdict = "no difference" if not bad else "FAILED"
    say(f"{kills} kills over {folders} folders: {verdict}")
    shutil.rmtree(base)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
