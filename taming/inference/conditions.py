"""Conditions from what users give, and codes of an image that stay as they are.

B batch, L labels, H W pixels, h w latent grid.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.data.files.label_files import read_mask
from taming.inference.decoding import check_size
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import condition_shapes
from taming.modules.conditioners.base import Conditioner, Size


def class_numbers(text: str | None, model: Net2NetTransformer, option: str = "--classes") -> list[int] | None:
    """Read class numbers that are to be taken in turn; all of the model where none are named, or None."""
    stage = stage_of_kind(model, "class")
    if text is None:
        return None if stage is None or stage.vocab_size is None else list(range(stage.vocab_size))
    if stage is None:
        raise ValueError(f"{option} {text}: the model is not conditioned on classes; leave it out")
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{option} {text}: give class numbers with commas between them, 3,7,12")
    return [int(part) for part in text.split(",")]


def stage_of_kind(model: Net2NetTransformer, kind: str) -> Conditioner | None:
    """Return the first condition stage of a kind, or None."""
    return next((stage for stage in model.cond_stages if stage.kind == kind), None)


def conditions_of(
    model: Net2NetTransformer, count: int, size: Size | None = None, given: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Return conditions of `count` images of `size`, as `Net2NetTransformer.generate` takes them.

    Coordinates and start tokens go without saying. What is not given is left out as null tokens.

    Args:
        size: (H, W) in pixels; the training size when None.
        given: by the `kind` of a condition, what its `from_user` takes, for all images; or a list of one for
            each image.

    Raises:
        ValueError: a condition that is not given and that the model cannot do without; none that is given; a
            class or label that the model does not have.
    """
    given = given or {}
    values: list[Tensor | None] = []
    stages = zip(model.cond_keys, model.cond_stages, condition_shapes(model, size), strict=True)
    for key, stage, expected in stages:
        value = stage.default(expected)
        if value is None and (user := given.get(stage.kind)) is not None:
            each = user if isinstance(user, list) else [user]
            try:
                value = torch.cat([stage.from_user(one, expected) for one in each])
            except ValueError as error:
                raise ValueError(f"the condition {key}: {error}") from None
        if value is not None:
            value = value.to(model.device).expand(count, *value.shape[1:])
        values.append(value)
    missing = [key for key, value in zip(model.cond_keys, values, strict=True) if value is None]
    if missing and (model.null_token is None or len(missing) == len(values)):
        remedies = dict.fromkeys(stage.remedy for stage in model.cond_stages)
        raise ValueError(
            f"the model is conditioned on {', '.join(model.cond_keys)}, and {', '.join(missing)} is missing: "
            f"{'; '.join(remedies)}"
        )
    return model.encode_conditions(values, size)


def check_conditions(model: Net2NetTransformer, values: list[Tensor], size: Size | None) -> None:
    """Raise where a condition that is an image, (B, C, H, W), has another size than belongs beside the image.

    At the training size it may show a part alone, the upper half for instance.
    """
    if model.downsample_cond_size > -1:
        return  # it is brought to that size, whatever it has
    trained = model.latent_shape(*(size or ())) == model.latent_shape()
    shapes = condition_shapes(model, size)
    for key, value, shape in zip(model.cond_keys, values, shapes, strict=True):
        if value.ndim != 4 or tuple(value.shape[2:]) == shape:
            continue
        if not trained or any(n > most for n, most in zip(value.shape[2:], shape, strict=True)):
            found, wanted = (f"{height}x{width}" for height, width in (value.shape[2:], shape))
            raise ValueError(
                f"the condition {key} has {found} pixels (height x width), but must have {wanted} beside "
                f"images of {'x'.join(map(str, size)) if size else 'the training size'}: resize it"
            )


# ---- completion


def kept_codes(model: Net2NetTransformer, size: Size, known: float, mask: Path | None) -> Tensor | None:
    """Return which codes of images of `size` stay, (h, w) bool, or None where all are sampled.

    Args:
        known: share of the rows, from the top, that stays.
        mask: image whose white says what is generated anew, each code that a white pixel touches; of any
            resolution, but the shape of the images.

    Raises:
        ValueError: a share outside [0, 1); a mask of another shape, or that leaves nothing to generate; both.
    """
    if not 0 <= known < 1:
        raise ValueError(f"--known {known} is outside [0, 1)")
    h, w = model.latent_shape(*size)
    if mask is None:
        kept = torch.zeros(h, w, dtype=torch.bool)
        kept[: int(known * h)] = True
        return kept if kept.any() else None
    if known:
        raise ValueError(f"--known {known} and --mask {mask}: give one of them")
    white = read_mask(mask)  # (H, W)
    if white.shape[0] * size[1] != white.shape[1] * size[0]:
        raise ValueError(
            f"--mask {mask} has {white.shape[0]}x{white.shape[1]} pixels (height x width), but the images "
            f"{size[0]}x{size[1]}: give one of that shape"
        )
    return F.adaptive_max_pool2d(white[None].float(), (h, w))[0] == 0


def check_drawable(model: Net2NetTransformer, size: Size, kept: Tensor | None, source: str) -> None:
    """Raise unless the model can generate images of that size, with codes that stay."""
    check_size(model, size, source)
    if kept is not None or tuple(size) != model.first_stage_model.image_size:
        model.check_window()
