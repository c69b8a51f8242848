"""Load a tokenizer, of its own or inside a transformer."""

from pathlib import Path

from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint, load_model
from taming.inference.distributed import own_device
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Tokenizer


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
