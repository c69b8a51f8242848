"""What a visitor asks for, checked before anything is computed."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from taming.inference.completion import check_size
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import SamplingOptions
from taming.web.painting import Size

MAX_IMAGES = 16
MAX_SEED = 2**53  # what a browser can hold exactly


@dataclass
class Request:
    """What is to be generated.

    Attributes:
        run: name of the run.
        size: (H, W) in pixels.
        conditions: the value of each condition by its key, see `taming.web.conditions`; None to leave it out.
        original: image with a part that is to be generated again.
        mask: layers of the brush over it; what they touch is generated.
        count: number of images.
        options: see `SamplingOptions`; image number i of a seed is the same in any batch.
    """

    run: str
    size: Size
    conditions: dict[str, Any] = field(default_factory=dict)
    original: Image.Image | None = None
    mask: list[Image.Image | None] = field(default_factory=list)
    count: int = 1
    options: SamplingOptions = SamplingOptions(seed=0)


def check_request(model: Net2NetTransformer, request: Request, max_pixels: int) -> None:
    """Raise ValueError, with what is allowed, for an option that is out of range for the model."""
    check_amount(model, request, max_pixels)
    model.check_options(request.options)
    if not 0 <= (request.options.seed or 0) <= MAX_SEED:
        raise ValueError(f"seed is {request.options.seed}: give a whole number from 0 to {MAX_SEED}")


def check_amount(model: Net2NetTransformer, request: Request, max_pixels: int) -> None:
    """Raise ValueError, with the nearest size that works, for a size that the model cannot generate."""
    (height, width), count = request.size, request.count
    check_size(model, request.size, None, "size")
    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"{count} images: give 1 to {MAX_IMAGES}")
    if height * width * count > max_pixels:
        raise ValueError(
            f"{count} x {height}x{width} are {height * width * count / 1e6:.2f} million pixels; at most "
            f"{max_pixels / 1e6:g} million are generated at once here (--max-pixels)"
        )
