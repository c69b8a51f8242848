"""Put configs/ into the package when a wheel is built; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/` to `taming/configs/`; an editable installation finds the folder where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "taming", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
