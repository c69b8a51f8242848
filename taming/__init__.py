"""Two-stage image synthesis: a tokenizer, and a prior over its codes (Esser, Rombach and Ommer 2021).

The names in `__all__` are imported when they are first used, so that `import taming` itself takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0"

_HOMES = {
    "taming.checkpoint": ("load_model", "save_exported"),
    "taming.config": ("allow_targets", "find_config", "instantiate_from_config", "load_config"),
    "taming.images": ("save_png",),
    "taming.models.cond_transformer": ("Net2NetTransformer",),
    "taming.models.vqgan": ("GumbelVQ", "VQModel"),
    "taming.sampling": ("SamplingOptions", "image_generators", "sample_tokens", "sample_window"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:  # the same for type checkers, which do not call __getattr__
    from taming.checkpoint import load_model, save_exported
    from taming.config import allow_targets, find_config, instantiate_from_config, load_config
    from taming.images import save_png
    from taming.models.cond_transformer import Net2NetTransformer
    from taming.models.vqgan import GumbelVQ, VQModel
    from taming.sampling import SamplingOptions, image_generators, sample_tokens, sample_window

__all__ = [
    "GumbelVQ", "Net2NetTransformer", "SamplingOptions", "VQModel", "allow_targets", "find_config",
    "image_generators", "instantiate_from_config", "load_config", "load_model", "sample_tokens",
    "sample_window", "save_exported", "save_png",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'taming' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
