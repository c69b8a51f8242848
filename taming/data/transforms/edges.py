"""Canny edges: blur, gradient, thinning across the edge, and two thresholds joined by hysteresis.

After J. Canny, "A Computational Approach to Edge Detection", 1986; with the conventions of scikit-image,
which the 2021 code used: a Sobel gradient that is not normalised, thinning by interpolation, no edge on
the outermost pixels. H W pixels, N pixels of candidate edges.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2125, 0.7154, 0.0721)  # CIE Y of red, green, blue (Rec. 709)


def gray(image: np.ndarray) -> np.ndarray:
    """Return the luminance (H, W) of colours (H, W, 3), in their range, float32."""
    return image.astype(np.float32, copy=False) @ np.array(LUMA, dtype=np.float32)


def canny(image: np.ndarray, sigma: float = 2.0, low: float = 0.1, high: float = 0.2) -> np.ndarray:
    """Return the edges (H, W), bool, of a gray image (H, W), float; the thresholds are for a range [-1, 1].

    Args:
        image: gray values.
        sigma: standard deviation of the blur, in pixels.
        low: gradient of the weakest edges, which are kept if they touch a strong one, also diagonally.
        high: gradient of strong edges. A step from -1 to 1, unblurred, has 8.

    Raises:
        ValueError: another shape, a blur that is not positive, or thresholds in the wrong order.
    """
    if image.ndim != 2:
        raise ValueError(f"canny needs a gray image (H, W), got the shape {image.shape}: use gray() first")
    if sigma <= 0 or not 0 <= low <= high:
        raise ValueError(f"canny needs sigma > 0 and 0 <= low <= high, got {sigma}, {low} and {high}")
    x = torch.from_numpy(np.array(image, dtype=np.float32))[None, None]  # (1, 1, H, W)
    down, right = _gradient(_blur(x, sigma))
    thin = _thin(down, right)  # (H, W)
    return _hysteresis((thin >= low).numpy() & (thin > 0).numpy(), (thin >= high).numpy())


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian, cut off at four standard deviations and renormalised at the borders."""
    radius = int(4 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for shape, padding in (((1, 1, -1, 1), (radius, 0)), ((1, 1, 1, -1), (0, radius))):
        weight = kernel.view(shape)
        x = F.conv2d(x, weight, padding=padding) / F.conv2d(torch.ones_like(x), weight, padding=padding)
    return x


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Sobel's derivatives (H, W) downwards and to the right, eight times the slope per pixel."""
    column = torch.tensor([1.0, 2.0, 1.0])
    down = torch.outer(torch.tensor([-1.0, 0.0, 1.0]), column)
    both = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), torch.stack([down, down.T])[:, None])
    return both[0, 0], both[0, 1]


def _thin(down: Tensor, right: Tensor) -> Tensor:
    """Return the magnitude of the gradient (H, W) where it is a maximum along its direction, else 0.

    The two neighbours along the direction are interpolated between pixels.
    """
    magnitude = torch.hypot(down, right)
    height, width = magnitude.shape
    padded = F.pad(magnitude, (1, 1, 1, 1))

    def at(dy: int, dx: int) -> Tensor:  # the magnitude at a neighbour of each pixel
        return padded[1 + dy:1 + dy + height, 1 + dx:1 + dx + width]

    steep = down.abs() >= right.abs()  # more down than right
    share = torch.where(steep, right.abs() / down.abs(), down.abs() / right.abs()).nan_to_num()
    falling = (down >= 0) == (right >= 0)  # the direction runs from top left to bottom right

    def neighbour(sign: int) -> Tensor:
        straight = torch.where(steep, at(sign, 0), at(0, sign))
        oblique = torch.where(falling, at(sign, sign), torch.where(steep, at(sign, -sign), at(-sign, sign)))
        return share * oblique + (1 - share) * straight

    largest = (magnitude >= neighbour(1)) & (magnitude >= neighbour(-1))
    largest[[0, -1]] = largest[:, [0, -1]] = False
    return magnitude * largest


def _hysteresis(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """Return the 8-connected regions of `weak` (H, W) that hold a pixel of `strong`."""
    rows, columns = np.nonzero(weak)
    number = np.full((weak.shape[0] + 2, weak.shape[1] + 2), -1)
    number[rows + 1, columns + 1] = np.arange(len(rows))
    steps = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2)]
    around = np.stack([number[rows + dy, columns + dx] for dy, dx in steps], axis=1)  # (N, 9)
    around = np.where(around < 0, np.arange(len(rows))[:, None], around)  # no neighbour: itself
    root = np.arange(len(rows))  # a lower number of the same region; in the end the lowest one
    while True:
        least = root[around].min(axis=1)
        new = root.copy()
        np.minimum.at(new, root, least)
        new = new[new]
        if np.array_equal(new, root):
            break
        root = new
    kept = np.zeros(len(rows), dtype=bool)
    kept[root[strong[rows, columns]]] = True
    edges = np.zeros_like(weak)
    edges[rows, columns] = kept[root]
    return edges
