"""Every shipped configuration builds at full size, on the meta device: no memory, no files, no network."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from taming.config import instantiate_from_config, load_config
from taming.train import STAGES

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def first_stage(path: Path) -> dict:
    """What `train.fill_stages` would find in the checkpoint that a configuration's pattern names."""
    name = "vqgan.yaml" if path.parent.name == "demo" else "custom_vqgan.yaml"
    stage = load_config(path.with_name(name)).model
    stage.params.lossconfig = {"target": "taming.modules.losses.DummyLoss"}
    return stage


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_builds_at_full_size(path):
    of_classes = "class" in path.name
    config = load_config(path, ["model.params.cond_stage_config.params.n_classes=7"] if of_classes else [])
    for key in STAGES:
        if isinstance(config.model.params.get(key), str) or key not in config.model.params:
            continue
        if "target" not in config.model.params[key]:
            config.model.params[key] = first_stage(path)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    assert sum(p.numel() for p in model.parameters()) > 500_000
    assert all(p.is_meta for p in model.parameters())
    assert model.monitor in ("val/rec_loss", "val/loss")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_sizes_of_data_and_model_agree(path):
    """The training crop is what the first stage was laid out for: the block size was computed from it."""
    config = load_config(path)
    stage = config.model if "ddconfig" in config.model.params else first_stage(path)
    for split in ("train", "validation"):
        params = config.data.params[split].params
        assert params.get("crop_size", params.size) == stage.params.ddconfig.resolution


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_what_is_missing_is_marked(path):
    """Nothing but folders and class numbers is left to the user, and it is marked as missing, not made up."""
    missing = OmegaConf.missing_keys(load_config(path))
    assert all(key.endswith((".folder", ".n_classes", ".classes_from")) for key in missing)
    assert bool(missing) == (path.parent.name != "demo")
