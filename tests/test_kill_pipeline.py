"""The command that kills the data pipeline, with fewer kills; and that it would see a fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "dev" / "kill_pipeline.py"

# Receipts written before their shards: a kill between the two leaves what looks finished.
_EARLY_RECEIPTS = """
import runpy, sys
from redrafter.data import store as module
from redrafter.files import write_json
write = module.Job.write
def early(self, index, columns, rejected=()):
    path = self.folder / f"{module.shard_name(index)}.json"
    write_json(path, {"rows": 0, "tokens": 0, "file": None, "bytes": 0, "sha256": None,
                      "rejected": []})
    write(self, index, columns, rejected)
module.Job.write = early
sys.argv[0] = sys.argv[1]
del sys.argv[1]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(command, target, kills):
    return subprocess.run(
        [sys.executable, *command, "--target", str(target),
         "--source", str(target / "prompts_train.jsonl"), "--rows", "16", "--kills", str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_no_kill_leaves_a_trace(tiny_target):
    done = run([str(SCRIPT)], tiny_target, 12)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills over" in done.stdout and "no difference" in done.stdout


@pytest.mark.slow
def test_a_receipt_that_comes_too_early_is_caught(tiny_target, tmp_path):
    (tmp_path / "fault.py").write_text(_EARLY_RECEIPTS)
    done = run([str(tmp_path / "fault.py"), str(SCRIPT)], tiny_target, 40)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT" in done.stdout
