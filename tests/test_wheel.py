"""The package really installs: modules, command and configurations, with the source tree out of sight."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

# Imports every module below the folder given, and prints name and file of each.
IMPORT_ALL = """
import importlib, sys
from pathlib import Path
site = Path(sys.argv[1])
for path in sorted(site.joinpath("taming").rglob("*.py")):
    parts = path.relative_to(site).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if name == "taming.__main__":
        continue  # runs the command
    print(name, importlib.import_module(name).__file__)
"""

# Finds a configuration through the editable installation in the folder given, not through that of this tree.
FIND_EDITABLE = """
import site, sys
sys.path[:] = [path for path in sys.path if path != sys.argv[2]]
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
site.addsitedir(sys.argv[1])
import taming
print(taming.find_config("demo/vqgan"))
"""


def run(*command, cwd, **environment):
    """Run a command without what could bring the source tree into sight, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build wheel and source archive from a copy of what is to be shipped, with the setuptools at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, dist = folder / "tree", folder / "dist"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "golden")
    for name in ("taming", "scripts", "tests", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "main.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist)]
    run(*build, str(tree), cwd=folder)
    return dist


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"taming"}
    files = [path for path in (ROOT / "taming").rglob("*") if path.suffix in (".py", ".typed")]
    files = {path.relative_to(ROOT) for path in files}
    files |= {"taming" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    shipped = {name for name in names if name.startswith("taming/")}
    assert shipped == {path.as_posix() for path in files} and "taming/configs/demo/vqgan.yaml" in shipped


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in (ROOT / "taming").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_metadata_says_what_is_needed(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    core = [line for line in required if "extra ==" not in line]
    assert "License-Expression: MIT" in lines and "Requires-Python: >=3.11" in lines
    assert "pytorch-lightning<2.7,>=2.6.6" in core and "torch>=2.10" in core
    assert not [line for line in required if line.startswith("lightning")]
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"demo", "data", "hub", "metrics-offline", "dev"}
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    run(sys.executable, "-m", "pip", *words, cwd=folder)
    return folder


def test_every_module_imports_from_the_installed_wheel(site, tmp_path):
    # -P: no current folder on sys.path. PYTHONPATH comes before an editable installation of this tree.
    printed = run(sys.executable, "-P", "-c", IMPORT_ALL, str(site), cwd=tmp_path, PYTHONPATH=str(site))
    files = dict(line.split(" ", 1) for line in printed.splitlines() if line.startswith("taming"))
    expected = [path for path in (ROOT / "taming").rglob("*.py")]
    assert len(files) == len(expected) - 1 > 20 and "taming.models.vqgan" in files
    assert [name for name, file in files.items() if not Path(file).is_relative_to(site)] == []


def test_the_source_archive_builds_the_same_version(built, wheel):
    version = wheel.name.split("-")[1]
    assert (built / f"taming-{version}.tar.gz").exists()
    assert f'__version__ = "{version}"' in (ROOT / "taming" / "__init__.py").read_text()


@pytest.mark.parametrize("words", [("bin/taming",), ("-m", "taming")])
def test_the_command_and_the_configurations_are_installed(words, site, tmp_path):
    program = [str(site / words[0])] if len(words) == 1 else [sys.executable, "-P", *words]
    printed = run(*program, "configs", cwd=tmp_path, PYTHONPATH=str(site))
    assert len(printed.splitlines()) == len([*(ROOT / "configs").rglob("*.yaml")])
    printed = run(*program, "configs", "demo/vqgan", cwd=tmp_path, PYTHONPATH=str(site))
    assert printed == (ROOT / "configs" / "demo" / "vqgan.yaml").read_text(encoding="utf-8")
    code = "import taming; print(taming.find_config('demo/panorama.png'))"
    found = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).strip()
    assert Path(found) == site / "taming" / "configs" / "demo" / "panorama.png"


def test_an_editable_installation_finds_the_configurations_of_the_tree(built, tmp_path):
    tree, prefix = built.parent / "tree", tmp_path / "prefix"
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--prefix", str(prefix)]
    run(sys.executable, "-m", "pip", *words, "--editable", str(tree), cwd=tmp_path)
    site = next(prefix.rglob("site-packages"))
    found = run(sys.executable, "-P", "-c", FIND_EDITABLE, str(site), str(ROOT), cwd=tmp_path).strip()
    assert Path(found) == tree / "configs" / "demo" / "vqgan.yaml"
