"""Images of other sizes than in training, and images with a part that is given.

Pixels that are given stay as they are where nothing is generated. B batch, C channels, H W pixels, h w latent
grid, f pixels per code.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.data.files.images import read_image
from taming.data.files.label_files import read_mask
from taming.inference.provenance import digest
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import Size, condition_shapes


def check_size(model: Net2NetTransformer, size: Size, kept: Tensor | None, source: str) -> None:
    """Raise ValueError unless the model can generate images of that size, with codes that stay.

    Args:
        size: (H, W) in pixels.
        kept: the codes (h, w) that stay, or None.
        source: what says the size, for the message, which names the nearest size that works.
    """
    stage = model.first_stage_model
    smallest, f = stage.image_size, stage.factor
    nearest = tuple(max(least, round(side / f) * f) for side, least in zip(size, smallest, strict=True))
    if nearest != tuple(size):
        raise ValueError(
            f"{source}: {size[0]}x{size[1]} pixels (height x width) cannot be generated: both must be "
            f"multiples of f = {f}, at least {smallest[0]}x{smallest[1]}, as in training; the nearest is "
            f"{nearest[0]}x{nearest[1]}"
        )
    if kept is not None or tuple(size) != stage.image_size:
        model.check_window()


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


def kept_codes(model: Net2NetTransformer, size: Size, known: float, mask: Path | None) -> Tensor | None:
    """Return which codes of images of `size` stay, (h, w) bool, or None where all are sampled.

    Of two levels it is the coarser grid; the codes below it stay with it.

    Args:
        known: share of the rows, from the top, that stays.
        mask: image whose white says what is generated: each code that a white pixel touches; of any
            resolution, but the shape of the images.

    Raises:
        ValueError: a share outside [0, 1); a mask of another shape, or that leaves nothing to generate; both;
            codes that have no place in the image.
    """
    if not 0 <= known < 1:
        raise ValueError(f"--known {known} is outside [0, 1)")
    if (known or mask is not None) and not model.first_stage_model.spatial:
        model.check_window()
    h, w = model.coarse_shape(*size)
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


def count_codes(model: Net2NetTransformer, size: Size, kept: Tensor | None = None) -> int:
    """Return how many codes are sampled for an image of `size`, all grids together, if those `kept` stay."""
    count = model.first_stage_model.num_codes(*size)
    return count if kept is None else count // kept.numel() * int((~kept).sum())


def mask_metadata(mask: Path | None) -> dict[str, str]:
    """Identify a mask by its pixels.

    Raises:
        ValueError: it cannot be read.
    """
    pixels = None if mask is None else read_image(mask)
    return {"mask": "None" if pixels is None else digest(pixels.shape, pixels.tobytes())}


def keep_pixels(images: Tensor, originals: Tensor, kept: Tensor, f: int) -> Tensor:
    """Put the pixels of the originals where codes were kept, in place of what these codes decode to.

    A tokenizer changes every image a little. Generated codes keep their pixels; kept ones get those of the
    original, which fade into the decoded ones over the f / 2 pixels before a generated code, so that no seam
    is seen. What the original shows where codes were generated is not used.

    Args:
        images: decoded (B, C, H, W).
        originals: (B or 1, C, H, W), on the same device.
        kept: (h, w) bool, the codes that were kept.
        f: height and width of a code in pixels, H = h * f.
    """
    generated = (~kept).to(images).repeat_interleave(f, 0).repeat_interleave(f, 1)[None]  # (1, H, W)
    width = f // 2
    dilated = [F.max_pool2d(generated, 2 * d + 1, stride=1, padding=d) for d in range(width + 1)]
    weight = torch.stack(dilated).mean(0)  # of the decoded image: 1 where generated, 0 beyond the border
    return weight * images + (1.0 - weight) * originals
