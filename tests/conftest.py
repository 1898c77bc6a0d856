"""Settings that must precede every import of torch and transformers, and shared fixtures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped path fails at once, not after minutes of look-ups
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of commands that tests start; see threads.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores; nothing is measured

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> None:
    """What commands keep for later runs (`redrafter.files.cache_folder`) is not the user's own."""
    os.environ["REDRAFTER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory, worker_id) -> Path:
    """Folder of a small trained Llama with tokenizer, chat template and prompt files.

    Made once per test run: the workers of pytest-xdist share it, the first one trains it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    folder = shared / "tiny_target"
    script = ROOT / "scripts" / "make_tiny_target.py"
    command = [sys.executable, str(script), "--size", "test", "--output_dir", str(folder)]
    with FileLock(f"{folder}.lock"):  # a second run of the script finds the result and returns
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def published_run(tiny_target, tmp_path_factory) -> Path:
    """A training run that was measured: the folder that people publish. Not to be written to."""
    from published import make_run

    out = tmp_path_factory.mktemp("made") / "run"
    make_run(tiny_target, out)
    return out


@pytest.fixture
def run(published_run, tmp_path) -> Path:
    """A copy of `published_run`, without checkpoints and data, that a test may change."""
    out = tmp_path / "run"
    left_out = shutil.ignore_patterns("checkpoints", "data", "card")
    return Path(shutil.copytree(published_run, out, ignore=left_out))
