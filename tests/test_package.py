"""`import taming`: its names, which are imported when they are used."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import taming

ROOT = Path(__file__).parents[1]


def test_every_name_is_there_and_listed():
    assert {name for name in taming.__all__ if getattr(taming, name, None) is None} == set()
    assert set(taming.__all__) == set(taming._MODULES) and set(taming.__all__) <= set(dir(taming))
    from taming.models.vqgan import VQModel

    assert taming.VQModel is VQModel


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="module 'taming' has no attribute 'VQmodel'"):
        _ = taming.VQmodel


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, taming; assert not {'torch', 'omegaconf', 'taming.config'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- dependencies


def numbers(version):
    """Return a version as numbers, without zeros at its end: 6.0 is 6."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def test_the_lowest_versions_are_the_bounds_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    bounds = {}
    for requirement in [*project["dependencies"], *extras["demo"], *extras["hub"]]:
        name, bound = re.match(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", requirement).groups()
        assert bound, f"{requirement} needs a lower bound"
        bounds.setdefault(name, set()).add(numbers(bound))
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: {numbers(version)} for name, version in lowest.items()} == bounds


def test_every_package_that_is_imported_is_declared():
    """What modules import at their top is a dependency; the names of packages are those of their modules."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", one).group().replace("-", "_") for one in project["dependencies"]}
    declared |= {"yaml", "PIL"}  # pyyaml, pillow
    found = {}
    for path in sorted((ROOT / "taming").rglob("*.py")):
        for module in re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(module, path)
    foreign = {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "taming"}}
    assert foreign.keys() >= {"torch", "omegaconf"}
    assert foreign.keys() - declared == set(), foreign
