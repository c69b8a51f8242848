"""Imports go down only, and never in a circle.

    main, scripts, cli, web -> training, inference, eval -> models -> modules -> the ground
                                                          -> data -> the ground

The source is read, not imported, so that imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# part of the package -> parts that it may import, besides itself
GROUND = {
    "config", "config_limits", "parameters", "images", "colormap", "util", "lr_scheduler", "threads",
}
BELOW_MODELS = {"modules", "sampling", "metrics", "checkpoint", *GROUND}
BELOW_COMMANDS = {"models", "data", *BELOW_MODELS}
LAYERS = {
    "": {"models", "sampling", "checkpoint", "images", "config"},  # the package, lazily
    "__main__": {"cli"},
    "util": set(),
    "images": {"util"},
    "colormap": {"images"},
    "lr_scheduler": {"parameters"},
    "parameters": set(),
    "config_limits": set(),
    "threads": set(),
    "config": {"config_limits", "parameters", "util"},
    "checkpoint": {"config", "util"},
    "metrics": set(),
    "sampling": {"util"},
    # LPIPS reads a file
    "modules": {"sampling", "metrics", "checkpoint", "parameters", "images", "colormap", "util"},
    "data": {"config", "config_limits", "parameters", "images", "colormap", "util"},
    "models": BELOW_MODELS,
    "inference": BELOW_COMMANDS,
    "eval": {"inference", *BELOW_COMMANDS},
    "training": {"eval", *BELOW_COMMANDS},
    "web": {"inference", "eval", *BELOW_COMMANDS},
    "cli": {"web", "training", "inference", "eval", *BELOW_COMMANDS},
}
# packages that a part must not know
FOREIGN = {
    "modules": {"pytorch_lightning", "lightning", "omegaconf", "yaml"},
    "sampling": {"pytorch_lightning", "lightning", "omegaconf", "yaml"},
    "images": {"pytorch_lightning", "lightning", "omegaconf"},
    "config": {"pytorch_lightning", "lightning", "torch"},
    "parameters": {"pytorch_lightning", "lightning", "omegaconf", "torch"},
}
ABOVE = {"main", "scripts", "benchmarks", "tests"}  # nothing in the package may import these
NOT_AN_IMPORT_OF_OURS = {"taming"}  # `import taming` alone: the version

Import = tuple[int, str]  # line, dotted name


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """List what a file imports, relative imports resolved, wherever in the file the statement stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                origin = ".".join([*parts[: len(parts) - node.level + 1], *([origin] if origin else [])])
            # `from taming import models` names a module, `from taming.models import vqgan` perhaps one
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Phrase each import of a module that goes up, or to a package that its part must not know."""
    part = module.split(".")[1] if "." in module else ""
    wrong = []
    for line, name in imports_of(source, module, is_package):
        top, _, below = name.partition(".")
        target = below.split(".")[0]
        if top in ABOVE:
            reason = f"nothing in the package may import {top}"
        elif top in FOREIGN.get(part, ()):
            reason = f"{part} must not know {top}"
        elif top != "taming" or target in (part, "__version__", "") or name in NOT_AN_IMPORT_OF_OURS:
            continue
        elif part not in LAYERS:
            reason = f"{part or 'the package itself'} has no layer: add it to LAYERS"
        elif target not in LAYERS[part]:
            reason = f"{part} may import {', '.join(sorted(LAYERS[part])) or 'nothing of the package'}"
        else:
            continue
        wrong.append(f"line {line}: imports {name}; {reason}")
    return wrong


def package_files() -> list[Path]:
    return sorted((ROOT / "taming").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    wrong = violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    assert not wrong, f"{path.relative_to(ROOT)}\n" + "\n".join(wrong)


def test_no_file_imports_itself_through_others():
    """What a package's own files import of it would run before the package is there."""
    names = {module_name(path): path for path in package_files()}

    def target_of(name: str) -> str | None:
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name or None

    below = {}
    for name, path in names.items():
        found = imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        below[name] = {target for _, one in found if (target := target_of(one)) not in (None, "taming", name)}
    while below:
        lowest = {name for name, imports in below.items() if not imports & set(below)}
        assert lowest, f"a loop among {sorted(below)}"
        below = {name: imports for name, imports in below.items() if name not in lowest}


def test_every_part_has_a_layer():
    parts = {module_name(path).split(".")[1] for path in package_files() if "." in module_name(path)}
    assert parts <= set(LAYERS), f"add to LAYERS: {parts - set(LAYERS)}"
    assert {"config", "checkpoint", "models", "modules", "data", "sampling", "training"} <= parts


def test_the_layers_themselves_have_no_cycle():
    below: dict[str, set[str]] = {part: set(allowed) for part, allowed in LAYERS.items()}
    while below:
        lowest = {part for part, allowed in below.items() if not allowed & set(below)}
        assert lowest, f"a cycle among {sorted(below)}"
        below = {part: allowed for part, allowed in below.items() if part not in lowest}


@pytest.mark.parametrize("module, source, message", [
    ("taming.modules.util", "import pytorch_lightning as pl", "imports pytorch_lightning; modules must not"),
    ("taming.modules.util", "def f():\n    import omegaconf", "line 2: imports omegaconf"),
    ("taming.modules.util", "from taming.config import load_config", "modules may import checkpoint, "),
    ("taming.modules.a.b", "from ...models import vqgan", "imports taming.models.vqgan"),
    ("taming.modules.a.b", "from ... import models", "imports taming.models"),
    ("taming.sampling.decode", "import taming.modules.transformer.mingpt", "sampling may import util"),
    ("taming.data.custom", "from taming.models.vqgan import VQModel", "data may import colormap, config"),
    ("taming.models.vqgan", "from main import instantiate_from_config", "the package may import main"),
    ("taming.models.vqgan", "1\nimport_module('scripts.x')", "imports scripts"),
    ("taming.models.vqgan", "from taming.training.callbacks import Image", "imports taming.training"),
    ("taming.config", "import taming.checkpoint", "config may import config_limits, parameters, util"),
    ("taming.unheard", "from taming.util import download", "has no layer"),
])
def test_a_wrong_import_is_reported(module, source, message):
    assert message in "\n".join(violations(source, module))


@pytest.mark.parametrize("module, source", [
    ("taming.modules.transformer.mingpt", "from taming.sampling import sample_tokens"),
    ("taming.modules.a.b", "from .c import d\nfrom ..util import e"),
    ("taming.models.vqgan", "import pytorch_lightning as pl\nfrom taming.config import load_config"),
    ("taming.training.command", "from taming import __version__\nfrom taming.training import arguments"),
    ("taming.eval.fid", "import torch\nfrom taming.models.vqgan import VQModel"),
])
def test_a_right_import_is_not(module, source):
    assert violations(source, module) == []
