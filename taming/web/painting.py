"""Between what is painted on the page and what a model reads: label maps, masks, and pictures of a size.

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
    """A colour (3,) as the page writes it, "#87ceeb"."""
    return "#" + bytes(color.tolist()).hex()


def paint_labels(ids: np.ndarray, n_labels: int) -> Image.Image:
    """Label ids (H, W) in their colours."""
    return Image.fromarray(label_colors(n_labels)[ids])


def labels_of(painted: Image.Image, n_labels: int, size: Size) -> torch.Tensor:
    """The label ids (H, W), int64, at another size, of what was painted with `label_colors`.

    Each painted pixel counts as the label of the nearest colour; each pixel of the result is the commonest
    label of the painted pixels that it covers, so that the blended rims of a brush do not count.
    """
    ids = nearest_colors(np.asarray(painted.convert("RGB")), label_colors(n_labels))[0][None]
    if tuple(ids.shape[1:]) == size:
        return ids[0]
    used, compact = ids.unique(return_inverse=True)  # few, where a vocabulary may have hundreds
    shares = torch.stack([resized_shares((compact == i).float(), size) for i in range(len(used))])
    return used[shares.argmax(0)]


def resized_shares(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Which share of each pixel of a size a mask (1, H, W) covers, (H', W'), float32."""
    return F.interpolate(mask[None], size, mode="area")[0, 0]


def brushed(layers: list[Image.Image | None], size: Size) -> torch.Tensor:
    """Where any of the layers was painted on, bool (H, W) of that size; a touched pixel counts whole."""
    touched = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        if layer is None:
            continue
        alpha = np.array(layer.convert("RGBA").getchannel("A"), dtype=np.float32)
        touched |= resized_shares(torch.from_numpy(alpha > 127).float()[None], size) > 0
    return touched


def fitted(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at that size: enlarged or shrunk until it covers it, and cut about its centre."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    w, h = (max(1, round(side / scale)) for side in (width, height))
    left, top = (picture.width - w) // 2, (picture.height - h) // 2
    left, top = max(0, left), max(0, top)
    box = left, top, min(picture.width, left + w), min(picture.height, top + h)
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


def canvas_size(size: Size) -> Size:
    """How large a picture of that size is painted on: `CANVAS` pixels along its longer side."""
    scale = CANVAS / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def check_shape(name: str, picture: Image.Image, size: Size) -> None:
    """Raise ValueError if what was painted or chosen has other proportions than the picture asked for."""
    height, width = size
    if abs(picture.width * height - picture.height * width) > max(picture.size) * max(size) * 0.02:
        raise ValueError(
            f"{name} is {picture.height}x{picture.width} (height x width), which has not the proportions of "
            f"{height}x{width}: change the size of the picture, or choose or paint {name} anew"
        )
