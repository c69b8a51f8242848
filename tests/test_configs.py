"""Every shipped configuration: it builds at full size on the meta device, and a small twin of it learns."""

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from taming.config import get_obj_from_str, instantiate_from_config, load_config, missing_keys
from taming.models.transgan import TransGAN
from taming.modules.priors.base import Prior
from taming.training.stages import STAGES

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "tables")  # of comparisons
each_config = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
BUILT_IN = [path for path in FILES if path.parent.name == "demo" or "landscapes" in path.stem]  # need no data
CUSTOM = "custom"  # these need the user's own folders
FREE = (".folder", ".n_classes", ".classes_from", ".data_path")


def complete(path: Path, *overrides: str) -> OmegaConf:
    """The config of a model, with its stages as `fill_stages` would find them in their checkpoints."""
    config = load_config(path, overrides)
    if path.name == "custom_class_transformer.yaml":
        config.model.params.cond_stage_config.params.n_classes = 7
    for owner, key in stages_of(config.model):
        stage = owner[key]
        if not isinstance(stage, str) and "target" not in stage:
            name = stage.params.ckpt_path.removeprefix("logs/*_").removesuffix("*").replace("demo_", "demo/")
            found, = [file for file in FILES if file.with_suffix("").match(name)]
            owner[key] = load_config(found).model
            owner[key].params.lossconfig = {"target": "taming.modules.losses.DummyLoss"}
    return config


def stages_of(model: OmegaConf) -> list[tuple]:
    """Where each stage of a transformer stands: what holds it, and the key or index there."""
    found = []
    for key in STAGES:
        stage = model.params.get(key)
        if OmegaConf.is_list(stage):
            found += [(stage, i) for i in range(len(stage))]
        elif stage is not None:
            found.append((model.params, key))
    return found


def keys_of(params: OmegaConf) -> set[str]:
    """The entries of the batch that a model reads."""
    given = params.get("cond_stage_key", "image")
    return {params.get("image_key", "image"), *([given] if isinstance(given, str) else given)}


def shrink(model: OmegaConf) -> None:
    """Few channels, layers and pixels, in place; the code, the losses and the kinds of input stay."""
    params = model.params
    for owner, key in stages_of(model):
        if OmegaConf.is_dict(owner[key]):
            shrink(owner[key])
    if "generator" in params:  # a GAN
        resolution, stages = params.generator.resolution // 2, len(params.generator.depths)
        dim = params.generator.heads * 4 ** (stages - 1)
        params.generator.update(resolution=resolution, dim=dim, depths=[1] * stages, latent_dim=8)
        params.discriminator.update(resolution=resolution, dim=8, depth=1)
    elif "num_down" in params.get("ddconfig", {}):  # a VQ-VAE
        params.ddconfig.update(ch=32, res_ch=16, num_res_blocks=1, resolution=params.ddconfig.resolution // 4)
    elif "latent_dim" in params.get("ddconfig", {}):  # a variational autoencoder
        params.ddconfig.update(ch=8, latent_dim=4, resolution=params.ddconfig.resolution // 4)
    elif "n_hid" in params.get("ddconfig", {}):  # a dVAE
        params.ddconfig.update(n_hid=8, n_init=8, resolution=params.ddconfig.resolution // 4)
        params.n_embed = 16
    elif "num_tokens" in params.get("ddconfig", {}):  # a sequence of tokens
        resolution, patch_size = params.ddconfig.resolution // 2, params.ddconfig.patch_size // 2
        params.ddconfig.update(
            resolution=resolution, patch_size=patch_size, num_tokens=5, width=16, num_layers=1, heads=2
        )
    elif "ddconfig" in params:
        side = params.ddconfig.resolution // 2 ** (len(params.ddconfig.ch_mult) - 1) // 4  # a quarter
        factor = 2 ** (len(params.ddconfig.ch_mult) - 1)
        params.ddconfig.update(ch=32, num_res_blocks=1, z_channels=32, resolution=side * factor)
        params.ddconfig.attn_resolutions = [side] if params.ddconfig.attn_resolutions else []
        params.embed_dim = 32
        params.ddconfig.ch_mult = [1] * len(params.ddconfig.ch_mult)
        if "quantizer_config" in params:
            params.quantizer_config.params.dim = 32
    loss = params.get("lossconfig", {}).get("params", {})
    if "disc_start" in loss:
        loss.update(disc_start=0, perceptual_weight=0.0)
        small = {"ndf": 8, "n_layers": 2}
        if "disc_config" in loss:
            loss.disc_config.params.update(small)
        else:
            loss.update({"disc_ndf": 8, "disc_num_layers": 2})
    if "transformer_config" in params:
        shrink_prior(params.transformer_config)


def shrink_prior(config: OmegaConf) -> None:
    """Few channels and layers, in place, of a prior or of its parts."""
    small = dict(n_layer=1, n_head=2, n_embd=16)
    if config.target.endswith(".PixelSNAIL"):
        small = dict(n_block=1, n_res_block=1, n_head=2, channel=16, res_channel=8)
    if config.target.endswith(".HierarchicalPrior"):
        small = {"bottom_window": [8, 8]} if "bottom_window" in config.params else {}
        shrink_prior(config.params.top)
        shrink_prior(config.params.bottom)
    config.params.update(small)


def batch_for(model: pl.LightningModule, config: OmegaConf, size: int = 2) -> dict:
    """Random values under the keys that the model reads, of the shapes that the data sets give."""
    params = config.params
    stage = getattr(model, "first_stage_model", model)
    side = stage.resolution
    batch = {"image": torch.rand(size, side, side, 3) * 2 - 1}
    for key in keys_of(params) - {"image"}:
        if key == "depth":
            batch[key] = torch.rand(size, side, side, 1) * 2 - 1
        elif key == "coord":
            batch[key] = torch.rand(size, side, side, 1)
        elif key == "edges":
            batch[key] = torch.randint(2, (size, side, side, 1)).float() * 2 - 1
        elif key in ("pose", "lr", "lr_image", "upper_half"):
            height, width = {"lr_image": (2, 2), "upper_half": (2, 1)}.get(key, (1, 1))
            batch[key] = torch.rand(size, side // height, side // width, 3) * 2 - 1
        elif key == "segmentation":
            *_, owner = getattr(model, "cond_stages", [model])
            labels = owner.n_labels
            ids = torch.randint(labels, (size, side, side))
            batch[key] = torch.nn.functional.one_hot(ids, labels).float()
        elif key == "class_label":
            stages = params.cond_stage_config
            stage = stages[0] if OmegaConf.is_list(stages) else stages
            batch[key] = torch.randint(stage.params.n_classes, (size,))
        else:  # the tokens of a layout or a pose
            batch[key] = torch.randint(params.transformer_config.params.vocab_size, (size, 24))
    return batch


def made_of(model: pl.LightningModule, x: torch.Tensor) -> torch.Tensor:
    """Reconstructions of images, or as many samples of a GAN."""
    return model.sample(len(x)) if isinstance(model, TransGAN) else model(x)[0]


@each_config
def test_builds_at_full_size(path):
    config = complete(path)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    assert sum(p.numel() for p in model.parameters()) > 500_000
    assert all(p.is_meta for p in model.parameters())
    is_gan = "generator" in config.model.params  # no loss orders its checkpoints
    assert model.monitor in ((None,) if is_gan else ("val/rec_loss", "val/loss", "val/total_loss"))


@each_config
def test_a_small_twin_learns(path):
    config = complete(path)
    shrink(config.model)
    model = instantiate_from_config(config.model)
    model.learning_rate = 1e-3
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    data = DataLoader([batch_for(model, config.model) for _ in range(2)], batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, max_epochs=1,
    )
    trainer.fit(model, data, data)
    assert math.isfinite(trainer.callback_metrics[model.monitor or "val/loss"])
    changed = [name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))]
    assert len(changed) > 0.9 * len(before)  # a code that no latent chose stays


@each_config
def test_the_data_sets_accept_their_arguments(path):
    """Without the data they raise; but never because of a class or argument that does not exist."""
    config = load_config(path)
    for key in missing_keys(config.data):
        OmegaConf.update(config.data, key, "nowhere")
    for split in ("train", "validation"):
        section = config.data.params[split]
        get_obj_from_str(section["target"])
        if path in BUILT_IN:
            held = instantiate_from_config(section)[0]
            assert keys_of(config.model.params) <= {"image", *held}
            continue
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            instantiate_from_config(section)
        assert "argument" not in str(caught.value) and "unknown" not in str(caught.value), caught.value


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda p: p.stem)
def test_real_items_fit_the_model(path):
    config = complete(path)
    dataset = instantiate_from_config(config.data.params.validation)
    batch = dataset.collate_fn([dataset[i] for i in range(2)])
    torch.manual_seed(0)
    model = instantiate_from_config(config.model).eval()
    with torch.no_grad():
        if "transformer_config" in config.model.params:
            x, c = model.get_xc(batch)
            codes = model.first_stage_model.num_codes(*model.first_stage_model.image_size)
            by_code = type(model.transformer).code_logits is not Prior.code_logits
            if by_code and getattr(model.transformer, "code_head", None) is None:  # logits of each code
                logits, target = model(x, c)
                assert logits.shape == (2, codes, config.model.params.transformer_config.params.vocab_size)
                assert target.shape == (2, codes)
            _, tokens = model.encode_to_c(c)
            assert tokens.shape[1] + codes - 1 == model.transformer.block_size  # no more than is needed
            assert model.nll(x, c).shape == (2,)
        else:
            x = model.get_input(batch, model.image_key)
            assert made_of(model, x).shape == x.shape and x.shape[2:] == (config.size, config.size)


@pytest.mark.parametrize("size", [None, 128, [64, 128]], ids=str)
@each_config
def test_one_key_sets_the_size_of_data_and_model(path, size):
    """The training crop is what the first stage was laid out for: the block size is computed from it."""
    words = [] if size is None else [f"size={size}"]
    config = load_config(path, words)
    wanted = config.size
    assert config.model.params.get("ddconfig", {"resolution": wanted})["resolution"] == wanted
    for split in ("train", "validation"):
        data = config.data.params[split].params
        data = data.get("config", data)
        sizes = [data[key] for key in ("crop_size", "size", "target_image_size") if key in data]
        assert sizes[0] == wanted
    for network in ("generator", "discriminator"):
        assert config.model.params.get(network, {"resolution": wanted})["resolution"] == wanted


@pytest.mark.parametrize("size", [32, [32, 64]], ids=str)
@pytest.mark.parametrize("path", BUILT_IN, ids=lambda p: p.stem)
def test_real_items_of_another_size_fit_the_model(path, size):
    config = complete(path, f"size={size}")
    dataset = instantiate_from_config(config.data.params.validation)
    batch = dataset.collate_fn([dataset[i] for i in range(2)])
    model = instantiate_from_config(config.model).eval()
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        if "transformer_config" not in config.model.params:
            assert made_of(model, model.get_input(batch, model.image_key)).shape[2:] == (height, width)
            return
        x, c = model.get_xc(batch)
        codes, first = model.encode_to_z(x)[1], model.first_stage_model
        coarsest = (height // first.factor) * (width // first.factor)
        assert codes.shape[1] == coarsest * (1 if first.levels == 1 else 1 + 4)  # the finer grid has four
        assert model.nll(x, c).isfinite().all()


@each_config
def test_what_is_missing_is_marked(path):
    """Nothing but folders and class numbers is left to the user, and it is marked as missing, not made up."""
    missing = missing_keys(load_config(path))
    assert all(key.endswith(FREE) for key in missing)
    assert bool(missing) == path.name.startswith(CUSTOM)
