"""Writing things so that they are either whole or absent, and saying where they came from."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

# A fingerprint samples at most this many values of each weight, so it is quick at any size.
_SAMPLED_VALUES = 4096
#: in the names of files being written: the processes of other machines have the same numbers
_MACHINE = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
#: no single file takes longer to write
_ABANDONED_S = 24 * 3600.0
_PACKAGES = ("redrafter", "torch", "transformers", "accelerate", "safetensors", "tokenizers")
#: names another cache folder than ~/.cache/redrafter
CACHE = "REDRAFTER_CACHE"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: what any new file's mode is; safetensors makes its files readable by their owner alone
_MODE = 0o666 & ~_umask()


def settle(path: Path) -> None:
    """A written file reaches the disk and has the mode of any other: call it before a rename."""
    os.chmod(path, _MODE)
    _sync(path)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace a file in one step, as `write_text` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_packed(path: str | Path) -> str | None:
    """Text of a file, or of its gzipped form PATH.gz, as large results are committed; None where
    there is neither."""
    path = Path(path)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    packed = path.with_name(f"{path.name}.gz")
    return gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else None


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file in one step.

    about: its metadata; of several entries safetensors does not keep the order from run to run
    """
    from safetensors.torch import save_file  # torch: too heavy for what else needs this module

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: safetensors, too, writes aside and renames, and a kill in between
    # leaves a file whose name nobody knows.
    part = _part(path)
    part.mkdir(exist_ok=True)
    try:
        save_file(tensors, part / path.name, metadata=about)
        settle(part / path.name)
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(path: Path) -> Path:
    """Where this process writes what becomes `path`; see `remove_leftovers`."""
    return path.with_name(f".{path.name}.{os.getpid()}@{_MACHINE}.part")


def cache_folder() -> Path:
    """Where things are kept that can be made again; it may not exist yet."""
    if named := os.environ.get(CACHE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redrafter"


def write_config(path: str | Path, config: Any) -> None:
    """A configuration dataclass as YAML that `--config` reads back."""
    content = plain_values(config)
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def plain_values(value: Any) -> Any:
    """Dataclasses to dictionaries and tuples to lists, all the way down (what JSON knows)."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    return value


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` if the body succeeds, and vanishes if not.

    A folder already at `path` is replaced. After a kill at any moment `path` is whole or absent;
    what is left of the temporary folder is removed by `remove_leftovers`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                settle(file)
        _sync(part)
        if path.exists():
            shutil.rmtree(path)
        os.rename(part, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def remove_leftovers(folder: str | Path) -> None:
    """Remove what interrupted writes left in a folder, but not what another process is writing
    there right now: one of this machine that runs, or, on another machine that shares the folder,
    any that wrote within a day."""
    for part in Path(folder).glob(".*.part"):
        writer, _, machine = part.name.split(".")[-2].partition("@")
        if machine not in ("", _MACHINE):
            if _age_s(part) < _ABANDONED_S:
                continue
        elif writer.isdigit() and int(writer) != os.getpid() and _is_running(int(writer)):
            continue
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    """Since it was last written to, 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere the signal 0 is not a question
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: str | Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_weights(
    named: Iterable[tuple[str, Tensor]],
    *texts: str,
    whole: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
) -> str:
    """sha256 over shapes, a sample of every tensor (in bfloat16, so that the same checkpoint loaded
    in float32 agrees) and any texts. 16 hex digits.

    whole: gives a tensor's values where they lie elsewhere
    """
    import torch

    digest = hashlib.sha256()
    for name, p in sorted(named):
        with whole(p) as values:
            flat = values.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
            digest.update(f"{name}{tuple(values.shape)}".encode())
            digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def digest_json(content: Any) -> str:
    """sha256 of anything JSON can hold, whatever the order of its keys. 64 hex digits."""
    text = json.dumps(plain_values(content), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout this code runs from, "-dirty" appended; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True, text=True, timeout=20, check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0] + ("-dirty" if run[1] else "")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def provenance(**facts: Any) -> dict[str, Any]:
    """What must lie beside every checkpoint and result; `facts` are added to it."""
    torch = sys.modules.get("torch")  # what does not compute has no threads
    return {
        "argv": sys.argv,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch and torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }
