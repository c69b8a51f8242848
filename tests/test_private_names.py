"""Names with an underscore that the package uses of others, above all of Lightning, are still there.

Lightning may rename them in any release, which is why pyproject.toml bounds its version. A new use has to be
entered here, and a new version that drops one is found by its name.
"""

import argparse
import ast
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn

PACKAGE = Path(__file__).parents[1] / "taming"


def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


# name -> what must have it
LIGHTNING = {
    "_accelerator_connector": lambda: trainer(),
    "_batches_that_stepped": lambda: trainer().fit_loop.epoch_loop,
    "_data_fetcher": lambda: trainer().fit_loop,
    "_should_check_val_fx": lambda: trainer().fit_loop.epoch_loop,
    "_trainer": lambda: pl.LightningModule(),
}
OTHERS = {
    "_BatchNorm": lambda: nn.modules.batchnorm,
    "_ConvNd": lambda: nn.modules.conv,
    "_actions": lambda: argparse.ArgumentParser(),
    "_foreach_lerp_": lambda: torch,
    "_forward_hooks": lambda: nn.Identity(),
    "_forward_pre_hooks": lambda: nn.Identity(),
    "_functorch": lambda: torch,
    "_get_full_key": lambda: OmegaConf.create({}),
    "_get_root": lambda: OmegaConf.create({}),
    "_metadata": lambda: nn.Identity().state_dict(),
    "_modules": lambda: nn.Identity(),
    "_overloadpacket": lambda: torch.ops.aten.add.Tensor,
    "_option_string_actions": lambda: argparse.ArgumentParser(),
    "_linear_pointwise": lambda: torch.ops.mkldnn,
    "_reorder_linear_weight": lambda: torch.ops.mkldnn,
}
# where the version decides, the package asks for it before it is used: see cpu_inference.can_pack
OPTIONAL = {"_linear_pointwise", "_reorder_linear_weight"}
PUBLIC = {"_asdict", "_fields"}  # of named tuples; the underscore keeps them apart from fields


def private_names(root: Path) -> dict[str, list[str]]:
    """Map names with one leading underscore that nothing below root defines to the places that use them."""
    used: dict[str, list[str]] = {}
    own = set()
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[:2] != "__":
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) in ("self", "cls"):
                    own.add(node.attr)
                else:
                    used.setdefault(node.attr, []).append(f"{file.relative_to(root)}:{node.lineno}")
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return {name: places for name, places in used.items() if name not in own | PUBLIC}


def test_all_are_listed():
    used, listed = private_names(PACKAGE), LIGHTNING.keys() | OTHERS.keys()
    assert {name: used[name] for name in used if name not in listed} == {}, "add these to the tables above"
    assert listed - used.keys() == set(), "these are no longer used"


def test_a_use_is_found(tmp_path):
    text = "class A:\n    def f(self, trainer):\n        self._own = trainer._loop._fetch(self._own)\n"
    (tmp_path / "a.py").write_text(text)
    assert private_names(tmp_path) == {"_loop": ["a.py:3"], "_fetch": ["a.py:3"]}


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning_has_it(name):
    owner = LIGHTNING[name]()
    where = ", ".join(private_names(PACKAGE)[name])
    assert hasattr(owner, name), (
        f"pytorch-lightning {pl.__version__} has no {type(owner).__name__}.{name}, which {where} needs"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_others_have_it(name):
    if name in OPTIONAL and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    assert hasattr(OTHERS[name](), name)


def test_the_state_of_the_loops():
    """Checkpoints hold it: ExactResume writes these entries, and the curves are cut by them."""
    state = trainer().fit_loop.state_dict()
    counts = {"ready", "started", "processed", "completed"}
    for key in ("epoch_loop.batch_progress", "epoch_progress", "epoch_loop.val_loop.batch_progress"):
        for scope in ("total", "current"):
            missing = counts - state[key][scope].keys()
            assert not missing, f"{key}.{scope} lacks {missing}"
