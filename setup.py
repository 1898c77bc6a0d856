"""What pyproject.toml cannot say: a wheel has configs/ and examples/ too, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithShipped(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the clone has them
            return
        for name in ("configs", "examples"):
            place = Path(self.build_lib) / "redrafter" / f"shipped_{name}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShipped})
