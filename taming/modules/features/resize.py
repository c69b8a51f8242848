"""Two ways to resize images before a network: as TensorFlow 1 did, and as Pillow does.

B batch, C channels, H W pixels, S side of the result in pixels. Both stretch the whole image; nothing is
cropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_bilinear_tf1(images: Tensor, side: int) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, S, S), float32, as `tf.image.resize_bilinear` of TensorFlow 1 did.

    Pixel i of the result lies at i * H / S of the image: there is no offset of half a pixel, and no filter
    against aliasing. Equal sizes return the values unchanged. FID is defined with this resize.
    """
    return _interpolate_tf1(_interpolate_tf1(images.float(), 3, side), 2, side)


def _interpolate_tf1(images: Tensor, dim: int, side: int) -> Tensor:
    """Interpolate linearly along one dimension, with TensorFlow's float32 arithmetic."""
    size = images.shape[dim]
    if size == side:
        return images
    scale = torch.tensor(size, dtype=torch.float32) / side
    position = torch.arange(side, dtype=torch.float32) * scale
    low = position.long()  # rounds down, since no position is negative
    high = (low + 1).clamp(max=size - 1)
    fraction = position - low
    fraction = fraction[:, None] if dim == 2 else fraction
    low, high, fraction = (index.to(images.device) for index in (low, high, fraction))
    left = images.index_select(dim, low)
    return left + (images.index_select(dim, high) - left) * fraction


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Resize 8-bit images (B, C, H, W) to (B, C, S, S), uint8, with Pillow's bicubic filter.

    The filter has a = -0.5 and widens against aliasing when the image shrinks; values are rounded to 8
    bits after each of the two directions. At most one value in 50 differs from Pillow's, by 1.
    """
    if images.shape[2:] == (side, side):
        return images
    if images.device.type == "cpu":
        # torch's kernel is 3 times as fast where the channels of a pixel are adjacent
        images = images.contiguous(memory_format=torch.channels_last)
        return F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    for size in ((images.shape[2], side), (side, side)):  # torch has no 8-bit kernel for other devices
        values = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        images = values.round_().clamp_(0, 255).to(torch.uint8)
    return images
