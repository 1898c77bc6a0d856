"""The command that kills the data pipeline, with fewer kills; and that it would see a fault."""

import pytest
from launching import ROOT, run_copy

SCRIPT = ROOT / "scripts" / "dev" / "kill_pipeline.py"

# Receipts written before their shards: a kill between the two leaves what looks finished.
_EARLY_RECEIPTS = """
import runpy, sys
from redrafter.data import store as module
from redrafter.files import write_json
write = module.Job.write
def early(self, index, columns, *more):
    path = self.folder / f"{module.shard_name(index)}.json"
    write_json(path, {"rows": 0, "tokens": 0, "file": None, "bytes": 0, "sha256": None,
                      "rejected": []})
    write(self, index, columns, *more)
module.Job.write = early
sys.argv[0] = sys.argv[1]
del sys.argv[1]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, target, kills, tmp_path, *argv):
    given = [*argv, "--target", target, "--source", target / "prompts_train.jsonl",
             "--rows", 16, "--kills", kills]  # fmt: skip
    return run_copy(script, given, tmp_path / "said.txt", TMPDIR=str(tmp_path))


@pytest.mark.slow
def test_no_kill_leaves_a_trace(tiny_target, tmp_path):
    status, said = run(SCRIPT, tiny_target, 12, tmp_path)
    assert status == 0, said
    assert "12 kills over" in said and "no difference" in said


@pytest.mark.slow
def test_a_receipt_that_comes_too_early_is_caught(tiny_target, tmp_path):
    (tmp_path / "fault.py").write_text(_EARLY_RECEIPTS)
    status, said = run(tmp_path / "fault.py", tiny_target, 40, tmp_path, SCRIPT)
    assert status == 1, said
    assert "FAULT" in said
