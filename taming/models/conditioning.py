"""What a transformer's stages must agree on: built, frozen, and checked before anything is trained."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from taming.config import instantiate_from_config
from taming.modules.util import SOSProvider

logger = logging.getLogger(__name__)

UNCONDITIONAL, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
Size = tuple[int, int]  # height, width


def build_first_stage(config: dict) -> nn.Module:
    """The VQGAN whose codes are modelled, frozen."""
    return _build(config, "first_stage_config")


def build_cond_stage(config: Any, first_stage: nn.Module, sos_token: int) -> nn.Module:
    """One condition stage, or several where `config` is a list, frozen."""
    if config == UNCONDITIONAL:
        return SOSProvider(sos_token)
    if config == FIRST_STAGE:
        return first_stage
    if is_list(config):
        return nn.ModuleList([build_cond_stage(each, first_stage, sos_token) for each in config])
    return _build(config, "cond_stage_config")


def is_list(value: Any) -> bool:
    """Whether it is a list, of YAML or of Python, and no string."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _build(config: dict, name: str) -> nn.Module:
    """A stage; its checkpoint, where it names one, must be there."""
    path = (config.get("params") or {}).get("ckpt_path")
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(
            f"{name}.params.ckpt_path: {path} does not exist. Train that stage first, or name its "
            "checkpoint or run directory"
        )
    return instantiate_from_config(config).eval().requires_grad_(False)


def condition_sizes(
    cond_size: Any, downsampled: int, resolution: int | None, count: int
) -> list[Size | None]:
    """Height and width in pixels of each of `count` conditions beside an image of the training size."""
    usual = downsampled if downsampled > -1 else resolution
    given = list(cond_size) if count > 1 and is_list(cond_size) else [cond_size] * count
    if len(given) != count:
        raise ValueError(f"cond_size names {len(given)} sizes, but there are {count} conditions")
    sizes = []
    for size in given:
        size = usual if size is None else size
        sizes.append(tuple(size) if is_list(size) else (size, size) if size is not None else None)
    return sizes


def check_sizes(
    config: Any, first: nn.Module, stages: Sequence[nn.Module], sizes: Sequence[Size | None]
) -> None:
    """Both numbers and the fix, where vocabulary or block size cannot hold what the stages give.

    Args:
        config: of the transformer; has `vocab_size` and `block_size`.
        first, stages: the first stage and the condition stages.
        sizes: see `condition_sizes`.
    """
    for stage, what in ((first, "first stage"), *((stage, "condition") for stage in stages)):
        tokens = getattr(stage, "n_tokens", None)
        if tokens is not None and tokens > config.vocab_size:
            raise ValueError(
                f"vocab_size: {config.vocab_size} of the transformer is smaller than the {what}'s {tokens} "
                f"tokens: set transformer_config.params.vocab_size to at least {tokens}"
            )
    resolution = getattr(first, "resolution", None)
    if resolution is None:
        return
    grid = first.token_count(resolution, resolution)
    pairs = zip(stages, sizes, strict=True)
    counts = [stage.token_count(*size) for stage, size in pairs if hasattr(stage, "token_count")]
    needed = sum(counts) + grid - 1
    if counts and config.block_size < needed:
        raise ValueError(
            f"block_size: {config.block_size} of the transformer is too short for {sum(counts)} condition "
            f"tokens and {grid} image codes at {resolution} pixels: set "
            f"transformer_config.params.block_size to at least {needed} (condition + codes - 1)"
        )


def condition_shapes(model: Any, size: Size | None) -> list[Size]:
    """Height and width in pixels that each condition, if it is a picture, must have beside one of `size`."""
    side = model.first_stage_model.resolution
    height, width = size or (side, side)
    return [(height * own[0] // side, width * own[1] // side) for own in model.cond_sizes]


def check_conditions(model: Any, x: Tensor, c: Sequence[Tensor]) -> None:
    """Raise where a condition of a batch has another size than the transformer was laid out for, or no token.

    Args:
        model: the `Net2NetTransformer`.
        x: images (B, C, H, W).
        c: a condition for each of its stages: pictures (B, C, H, W), tokens (B, M) or classes (B,).
    """
    vocabulary = model.transformer.config.vocab_size
    known = model.downsample_cond_size == -1 and _laid_out(model)
    shapes = condition_shapes(model, x.shape[2:]) if known else [None] * len(model.cond_keys)
    for key, value, stage, shape in zip(model.cond_keys, c, model.cond_stages, shapes, strict=True):
        if shape is not None and value.ndim == 4 and tuple(value.shape[2:]) != shape:
            found, wanted = ("x".join(map(str, size)) for size in (value.shape[2:], shape))
            raise ValueError(
                f"the condition {key} has {found} pixels (height x width), but the transformer was laid out "
                f"for {wanted} beside such images: give it that size, or change cond_size and block_size"
            )
        if value.ndim == 2 and not hasattr(stage, "n_tokens") and not value.is_floating_point():
            lowest, highest = (int(bound) for bound in value.aminmax())
            if lowest < 0 or highest >= vocabulary:
                raise ValueError(
                    f"the condition {key} has tokens from {lowest} to {highest}, but the transformer's "
                    f"vocab_size: {vocabulary} allows 0 to {vocabulary - 1}: change what makes "
                    "the tokens, or vocab_size"
                )


def _laid_out(model: Any) -> bool:
    """Whether the block size is that of the conditions' sizes: then others would lie at wrong places."""
    first, stages = model.first_stage_model, model.cond_stages
    if getattr(first, "resolution", None) is None or not all(hasattr(s, "token_count") for s in stages):
        return False
    counts = [stage.token_count(*size) for stage, size in zip(stages, model.cond_sizes, strict=True)]
    needed = sum(counts) + first.token_count(first.resolution, first.resolution) - 1
    return model.transformer.config.block_size in (needed, needed + 1)  # published ones have one more


def check_null_token(
    token: int | None, dropout: float | Sequence[float], vocabulary: int, stages: Sequence[nn.Module]
) -> None:
    """Errors of what was asked for, a warning where a condition could hold the null token."""
    rates = list(dropout) if is_list(dropout) else [dropout] * len(stages)
    if len(rates) != len(stages):
        raise ValueError(f"cond_dropout names {len(rates)} numbers, but there are {len(stages)} conditions")
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"cond_dropout: {rate} is no probability, 0 to 1")
    if any(rate > 0 and isinstance(stage, SOSProvider) for rate, stage in zip(rates, stages, strict=True)):
        raise ValueError(f"cond_dropout: {dropout}, but the model has no condition to drop")
    if token is None:
        if any(rates):
            raise ValueError(f"cond_dropout: {dropout} needs null_token, a token not in use")
        return
    if not 0 <= token < vocabulary:
        raise ValueError(
            f"null_token: {token} is outside the transformer's vocab_size: {vocabulary}: set "
            f"transformer_config.params.vocab_size to at least {token + 1}, or take another token"
        )
    for stage in stages:
        used = getattr(stage, "n_tokens", None)
        if used is not None and token < used:
            logger.warning("null_token: %d is one of the condition's %d tokens as well", token, used)


def null_shape(stage: nn.Module, trained: Size, side: int, size: Size, token: int | None) -> tuple[int, ...]:
    """Shape of the null tokens that stand for a condition which is left out, (h, w) or (M,), per image.

    Args:
        stage: its condition stage.
        trained: its height and width in pixels, beside an image of the training size, `side`.
        size: (H, W) of the image that is drawn.
        token: the model's null token.

    Raises:
        ValueError: a model without one, or a stage whose tokens cannot be counted.
    """
    name = type(stage).__name__
    if token is None:
        raise ValueError(
            f"a condition ({name}) is missing, and the model has no token for none: train it with "
            "cond_dropout and null_token"
        )
    if not hasattr(stage, "token_count"):
        raise ValueError(f"a condition is missing, but how many tokens {name} has is up to the data: give it")
    height, width = (n * own // side for n, own in zip(size, trained, strict=True))
    factor = getattr(stage, "factor", None)
    return (stage.token_count(height, width),) if factor is None else (height // factor, width // factor)
