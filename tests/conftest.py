"""Settings that must precede every import of torch and transformers, and shared fixtures."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped path fails at once, not after minutes of look-ups
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of commands that tests start; see threads.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores; nothing is measured

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

# What takes seconds to import is imported by who needs it: of pytest-xdist's processes the first
# reads this file as well, runs no test, and starts the others only then.
if TYPE_CHECKING:
    from redrafter.kernels import Kernels

gc.disable()  # until all tests are read, none of whose objects is garbage


def pytest_collection_finish() -> None:
    """Modules stay, so no collection looks at them again, and no process copied from this one
    copies its pages to count them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> None:
    """What commands keep for later runs (`redrafter.files.cache_folder`) is not the user's own."""
    import torch

    from redrafter.products import use_kernels

    os.environ["REDRAFTER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    # As loading a target does, so that no test's numbers depend on one before it.
    use_kernels(torch.device("cpu"))


def _state() -> dict[str, object]:
    """Of this process, what the numbers of a later test might depend on."""
    import torch

    from redrafter import kernels, products

    return {
        "the kernels that products use": products.kernels,
        "the kernels that are loaded": kernels.load(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(autouse=True)
def _leaves_no_state() -> Iterator[None]:
    """A test that changed something for all that follow is the one that fails."""
    before = _state()
    yield
    left = [name for name, value in _state().items() if value != before[name]]
    assert not left, f"the test leaves {' and '.join(left)} changed: restore what it sets"


@pytest.fixture
def made() -> "Kernels":
    """The kernels of this machine."""
    from redrafter import kernels

    found = kernels.load()
    if found is None:
        pytest.skip("no kernels could be made on this machine")
    return found


@pytest.fixture
def no_kernels(monkeypatch) -> None:
    """As on a machine without a compiler."""
    from redrafter import products

    monkeypatch.setattr(products, "load", lambda: None)
    monkeypatch.setattr(products, "kernels", None)


@pytest.fixture
def files_unseen(monkeypatch) -> None:
    """Commands do not look at first whether the files that they are given are there."""
    from redrafter.cli import args

    monkeypatch.setattr(args, "look", lambda config: None)


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """once(name, make): a folder that `make` fills, once per test run: the first worker of
    pytest-xdist that needs it makes it, the others wait. Not to be written to."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_target(once) -> Path:
    """Folder of a small trained Llama with tokenizer, chat template and prompt files."""

    from launching import run_copy

    def make(folder: Path) -> None:
        argv = ["--size", "test", "--output_dir", folder]
        status, said = run_copy("scripts/make_tiny_target.py", argv, folder.with_suffix(".log"))
        assert status == 0, said

    return once("tiny_target", make)


@pytest.fixture(scope="session")
def published_run(tiny_target, once) -> Path:
    """A training run that was measured: the folder that people publish. Not to be written to."""
    from published import make_run

    return once("published", lambda folder: make_run(tiny_target, folder / "run")) / "run"


@pytest.fixture
def run(published_run, tmp_path) -> Path:
    """A copy of `published_run`, without checkpoints and data, that a test may change."""
    out = tmp_path / "run"
    left_out = shutil.ignore_patterns("checkpoints", "data", "card")
    return Path(shutil.copytree(published_run, out, ignore=left_out))
