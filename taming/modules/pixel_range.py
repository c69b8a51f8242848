"""Networks of other projects see pixels in another range than [-1, 1], which all images have here."""

from torch import Tensor, nn

PixelRange = tuple[float, float]  # lowest and highest value of a pixel
UNIT = (-1.0, 1.0)


class Rescale(nn.Module):
    """Map values linearly from one range to another; it has no weights.

    Args:
        source: lowest and highest value of the input.
        target: what these two become.
    """

    def __init__(self, source: PixelRange, target: PixelRange):
        super().__init__()
        self.scale = (target[1] - target[0]) / (source[1] - source[0])
        self.shift = target[0] - source[0] * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def from_images(pixel_range: PixelRange) -> nn.Module:
    """Return the map from images in [-1, 1] to the range that a network was trained on."""
    return nn.Identity() if tuple(pixel_range) == UNIT else Rescale(UNIT, pixel_range)


def to_images(pixel_range: PixelRange) -> nn.Module:
    """Return the map from what a network gives, in its range, to images in [-1, 1]."""
    return nn.Identity() if tuple(pixel_range) == UNIT else Rescale(pixel_range, UNIT)
