"""Load a model that generates images, in the precision asked for, and decode what it samples.

B batch, C channels, H W pixels, h w latent grid.
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from taming.checkpoint import find_checkpoint, load_model
from taming.inference.distributed import own_device
from taming.inference.provenance import model_metadata, options_metadata
from taming.models.autoencoder import Autoencoder
from taming.models.base import LatentGenerator
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Codes, Tokenizer
from taming.modules.priors.base import Prior
from taming.sampling import SamplingOptions

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def load_transformer(
    path: str | Path, options: SamplingOptions, *, device: str | None = None
) -> tuple[Net2NetTransformer, DictConfig, dict[str, str]]:
    """Load a transformer to sample from; return it, its config, and metadata for its images.

    Reduced precision is that of the transformer's weights: its steps are bound by reading them, and autocast
    would read all of float32. The stages that turn images into codes stay in float32, since bfloat16 changes
    codes.

    Args:
        path: run directory, checkpoint or exported folder.
        options: what the model must be able to do.
        device: its name; by default each process's own.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it holds no transformer, or one that cannot do what the options ask for.
    """
    file = find_checkpoint(path)
    model, config, step = load_model(file, device=own_device(device))
    return _prepared(model, config, step, file, options)


def load_generator(
    path: str | Path, options: SamplingOptions, *, device: str | None = None
) -> tuple[Net2NetTransformer | LatentGenerator, DictConfig, dict[str, str]]:
    """Load a transformer as `load_transformer` does, or a model that turns noise into images: a VAE, a GAN.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it holds a model that only gives back images; options of sampling that it does not have.
    """
    file = find_checkpoint(path)
    model, config, step = load_model(file, device=own_device(device))
    if not isinstance(model, LatentGenerator):  # an ImageModel as well
        return _prepared(model, config, step, file, options)
    given, usual = options_metadata(options), options_metadata(SamplingOptions())
    if changed := [name for name in given if name != "seed" and given[name] != usual[name]]:
        raise ValueError(
            f"{changed[0]} is for transformers: {type(model).__name__} makes each image of noise at once, "
            "and has a seed alone"
        )
    network: Any = model.eval()  # type: ignore[attr-defined]  # a module
    metadata = model_metadata(network, config) | {"seed": given["seed"]}
    return network, config, metadata | {"checkpoint": file.name, "step": str(step)}


def _prepared(
    model: Any, config: DictConfig, step: int, file: Path, options: SamplingOptions
) -> tuple[Net2NetTransformer, DictConfig, dict[str, str]]:
    """Check that a model is a transformer that can do what is asked for; bring it to the precision."""
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{file} is a {type(model).__name__}: {why_no_images(model)}")
    model.check_options(options)
    metadata = model_metadata(model, config)  # of the weights before they are rounded
    model.transformer.to(PRECISIONS[options.precision])
    return model, config, metadata | options_metadata(options) | {"checkpoint": file.name, "step": str(step)}


def why_no_images(model: Any) -> str:
    """Say what to give in place of a model that cannot generate images by itself."""
    if isinstance(model, Prior):
        return (
            "a prior alone, whose codes need their tokenizer: write both to a folder with "
            "`taming convert PRIOR FOLDER --first-stage TOKENIZER`, and give that"
        )
    if isinstance(model, Autoencoder) and not isinstance(model, Tokenizer | LatentGenerator):
        return "it has no prior over its latents, and only gives back images; see `taming reconstruct`"
    return "give a run of stage 2, a transformer"


@torch.no_grad()
def decode(model: Net2NetTransformer, codes: Codes) -> Tensor:
    """Decode codes (B, h, w), or a list of grids, to images (B, C, H, W) in [-1, 1], float32, on the CPU.

    In bfloat16 if the transformer is: on a CPU, decoding would take most of the time otherwise. Never in
    float16, since the activations of a decoder may exceed its range.
    """
    dtype = next(model.transformer.parameters()).dtype
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        images = model.first_stage_model.decode_codes(codes)
    return images.float().clamp(-1.0, 1.0).cpu()
