"""What pyproject.toml cannot say: a wheel has the recipes of configs/ too, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the clone has them
            return
        place = Path(self.build_lib) / "redrafter" / "shipped_configs"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(ROOT / "configs", place)


setup(cmdclass={"build_py": BuildWithConfigs})
