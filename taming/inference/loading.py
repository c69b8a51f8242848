"""Models for commands and the page, on the device of this process and in the precision asked for."""

from pathlib import Path

from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint, load_model
from taming.inference.decoding import PRECISIONS
from taming.inference.distributed import own_device
from taming.inference.provenance import model_metadata, options_metadata
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Tokenizer
from taming.sampling import SamplingOptions


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
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{file} is a {type(model).__name__}: give a run of stage 2, a transformer")
    options.check(
        codebook_size=model.codebook_size, window_width=model.latent_shape()[1],
        has_null=model.null_token is not None,
    )
    metadata = model_metadata(model, config)  # of the weights before they are rounded
    model.transformer.to(PRECISIONS[options.precision])
    return model, config, metadata | options_metadata(options) | {"checkpoint": file.name, "step": str(step)}


def load_tokenizer(
    path: str | Path, *, device: str | None = None
) -> tuple[Tokenizer, DictConfig, Path]:
    """Load a first stage, of its own or inside a transformer; return it, its config, and its file.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it holds no tokenizer.
    """
    file = find_checkpoint(path)
    model, config, _ = load_model(file, device=own_device(device))
    tokenizer = model.first_stage_model if isinstance(model, Net2NetTransformer) else model
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{file} is a {type(model).__name__}: give a VQGAN, or a transformer over one")
    return tokenizer, config, file
