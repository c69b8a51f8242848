"""Completion of images: pixels that are given stay as they are where nothing is generated.

B batch, H W pixels, h w latent grid, f pixels per code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
