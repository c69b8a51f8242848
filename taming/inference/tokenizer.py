"""Load a first stage, of its own or inside a transformer."""

from pathlib import Path

from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint, load_model
from taming.inference.distributed import own_device
from taming.models.autoencoder import Autoencoder
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Tokenizer


def load_first_stage(
    path: str | Path, *, device: str | None = None
) -> tuple[Tokenizer | Autoencoder, DictConfig, Path]:
    """Load a first stage, of its own or inside a transformer; return it, its config, and its file.

    It is a tokenizer, or an autoencoder without codes.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it holds no first stage.
    """
    file = find_checkpoint(path)
    model, config, _ = load_model(file, device=own_device(device))
    first_stage = model.first_stage_model if isinstance(model, Net2NetTransformer) else model
    if not isinstance(first_stage, Tokenizer | Autoencoder):
        raise ValueError(f"{file} is a {type(model).__name__}: give a VQGAN, or a transformer over one")
    return first_stage, config, file
