"""From what is painted on the page to what a model takes: label maps, masks, and images of a size.

H W pixels, L labels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from taming.colormap import label_colors
from taming.data.files.label_files import nearest_colors

Size = tuple[int, int]  # height, width

CANVAS = 512  # pixels of the longer side of what is painted on


def hex_color(color: np.ndarray) -> str:
    """Return a color (3,) as the page writes it, "#87ceeb"."""
    return "#" + bytes(color.tolist()).hex()


def paint_labels(ids: np.ndarray, n_labels: int) -> Image.Image:
    """Return label ids (H, W) in their colors."""
    return Image.fromarray(label_colors(n_labels)[ids])


def labels_of(painted: Image.Image, n_labels: int, size: Size) -> torch.Tensor:
    """Return the label ids (H, W), int64, of `size` of an image that was painted with `label_colors`.

    Each painted pixel counts as the label of the nearest color; each pixel of the result is the most common
    label of the painted pixels that it covers, so that the blended edges of a brush do not count.
    """
    ids = nearest_colors(np.asarray(painted.convert("RGB")), label_colors(n_labels))[0][None]
    if tuple(ids.shape[1:]) == size:
        return ids[0]
    used, compact = ids.unique(return_inverse=True)  # few, where a vocabulary may have hundreds
    shares = torch.stack([resized_shares((compact == i).float(), size) for i in range(len(used))])
    return used[shares.argmax(0)]


def resized_shares(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Return the share, 0 to 1, of each pixel of `size` that a mask (1, H, W) covers: (H', W'), float32."""
    return F.interpolate(mask[None], size, mode="area")[0, 0]


def brushed(layers: list[Image.Image | None], size: Size) -> torch.Tensor:
    """Return where any of the layers was painted on: bool (H, W) of `size`, True for a touched pixel."""
    touched = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        if layer is None:
            continue
        alpha = np.array(layer.convert("RGBA").getchannel("A"), dtype=np.float32)
        touched |= resized_shares(torch.from_numpy(alpha > 127).float()[None], size) > 0
    return touched


def fitted(image: Image.Image, size: Size) -> Image.Image:
    """Return an image of `size`: scaled until it covers the size, then cropped around its center."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    w, h = (max(1, round(side / scale)) for side in (width, height))
    left, top = max(0, (image.width - w) // 2), max(0, (image.height - h) // 2)
    box = left, top, min(image.width, left + w), min(image.height, top + h)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def canvas_size(size: Size) -> Size:
    """Return the size of the canvas for an image of `size`: `CANVAS` pixels along its longer side."""
    scale = CANVAS / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def check_shape(name: str, image: Image.Image, size: Size) -> None:
    """Raise ValueError if what was painted or chosen has other proportions than `size`."""
    height, width = size
    if abs(image.width * height - image.height * width) > max(image.size) * max(size) * 0.02:
        raise ValueError(
            f"{name} is {image.height}x{image.width} (height x width), which does not have the proportions "
            f"of {height}x{width}: change the size of the image, or choose or paint {name} again"
        )
