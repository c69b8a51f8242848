"""Conditions of pictures from classes, label maps and coordinates, and codes that stay as they are.

B batch, L labels, H W pixels, h w latent grid.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.data.files.label_files import read_mask
from taming.inference.decoding import check_size
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import condition_shapes
from taming.modules.misc.coord import CoordStage, whole_picture
from taming.modules.util import Labelator, SOSProvider

Size = tuple[int, int]  # height, width


def class_numbers(text: str | None, model: Net2NetTransformer, option: str = "--classes") -> list[int] | None:
    """Class numbers that are to be taken in turn; all of the model where none are named, or None."""
    stage = next((stage for stage in model.cond_stages if isinstance(stage, Labelator)), None)
    if text is None:
        return None if stage is None else list(range(stage.n_classes))
    if stage is None:
        raise ValueError(f"{option} {text}: the model is not conditioned on classes; leave it out")
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{option} {text}: give class numbers with commas between them, 3,7,12")
    return [int(part) for part in text.split(",")]


def conditions_of(
    model: Net2NetTransformer, count: int, size: Size | None = None, classes: list[int] | None = None,
    segmentation: Tensor | None = None,
) -> list[Tensor]:
    """Conditions of `count` pictures of `size`, as `Net2NetTransformer.draw_codes` takes them.

    Coordinates and start tokens go without saying. What is not given is left out as null tokens.

    Args:
        size: (H, W) in pixels; the training size when None.
        classes: one for each picture.
        segmentation: label ids (H, W), of all pictures.

    Raises:
        ValueError: a condition that is not given, or not to be had here, and the model has no null token for
            it; none that is given; a class or label that the model has not.
    """
    values: list[Tensor | None] = []
    for stage, expected in zip(model.cond_stages, condition_shapes(model, size), strict=True):
        value = None
        if isinstance(stage, SOSProvider):
            value = torch.zeros(count, 1)
        elif isinstance(stage, CoordStage):
            value = whole_picture(*expected).expand(count, -1, -1, -1)
        elif isinstance(stage, Labelator) and classes is not None:
            value = torch.tensor(classes)
        elif takes_labels(stage) and segmentation is not None:
            value = stage.one_hot(segmentation[None].to(model.device)).expand(count, -1, -1, -1)
        values.append(None if value is None else value.to(model.device))
    missing = [key for key, value in zip(model.cond_keys, values, strict=True) if value is None]
    if missing and (model.null_token is None or len(missing) == len(values)):
        ways = [_how_to_give(stage) for stage in model.cond_stages]
        raise ValueError(
            f"the model is conditioned on {', '.join(model.cond_keys)}, and {', '.join(missing)} is missing: "
            f"{'; '.join(dict.fromkeys(ways))}"
        )
    check_conditions(model, values, size)
    return model.encode_conditions(values, size)


def _how_to_give(stage: nn.Module) -> str:
    if isinstance(stage, Labelator):
        return "give a class"
    if takes_labels(stage):
        return "give a label map, make_panorama.py --segmentation FILE"
    return "scripts/make_samples.py takes conditions from a data set"


def takes_labels(stage: nn.Module) -> bool:
    """Whether a condition stage encodes label maps."""
    return hasattr(stage, "n_labels") and hasattr(stage, "one_hot")


def check_conditions(model: Net2NetTransformer, values: list[Tensor | None], size: Size | None) -> None:
    """Raise where a condition that is a picture, (B, C, H, W), has another size than that of the picture.

    At the training size it may show a part alone, the upper half for instance.
    """
    if model.downsample_cond_size > -1:
        return  # it is brought to that size, whatever it has
    trained = model.latent_shape(*(size or ())) == model.latent_shape()
    shapes = condition_shapes(model, size)
    for key, value, shape in zip(model.cond_keys, values, shapes, strict=True):
        if value is None or value.ndim != 4 or tuple(value.shape[2:]) == shape:
            continue
        if not trained or any(n > most for n, most in zip(value.shape[2:], shape, strict=True)):
            found, wanted = (f"{height}x{width}" for height, width in (value.shape[2:], shape))
            raise ValueError(
                f"the condition {key} has {found} pixels (height x width), but must have {wanted} for "
                f"pictures of {'x'.join(map(str, size)) if size else 'the training size'}: resize it"
            )


# ---- completion


def kept_codes(model: Net2NetTransformer, size: Size, known: float, mask: Path | None) -> Tensor | None:
    """Which codes of pictures of `size` stay, (h, w) bool, or None where all are drawn.

    Args:
        known: share of the rows, from the top, that stays.
        mask: picture whose white says what is drawn anew, each code that a white pixel touches; of any
            resolution, but the shape of the pictures.

    Raises:
        ValueError: a share outside [0, 1); a mask of another shape, or that leaves nothing to draw; both.
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
            f"--mask {mask} has {white.shape[0]}x{white.shape[1]} pixels (height x width), but the pictures "
            f"{size[0]}x{size[1]}: give one of that shape"
        )
    return F.adaptive_max_pool2d(white[None].float(), (h, w))[0] == 0


def check_drawable(model: Net2NetTransformer, size: Size, kept: Tensor | None, source: str) -> None:
    """Raise unless the model can draw pictures of that size, with codes that stay."""
    check_size(model, size, source)
    order, side = type(model.permuter).__name__, model.first_stage_model.resolution
    if order != "Identity" and (kept is not None or tuple(size) != (side, side)):
        raise ValueError(
            f"the model draws codes in the order of {order}: it can keep none of them, nor draw larger "
            f"pictures; draw whole ones of {side}x{side} pixels"
        )
