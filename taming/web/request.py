"""What a visitor asks for, and whether a model can generate it, said before anything is computed."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from taming.inference.conditions import check_drawable
from taming.models.cond_transformer import Net2NetTransformer
from taming.web.painting import Size

MAX_PICTURES = 16
MAX_SEED = 2**53  # what a browser can hold exactly


@dataclass
class Request:
    """What is to be drawn.

    Attributes:
        run: name of the run.
        size: (H, W) in pixels.
        conditions: the value of each condition by its key, see `taming.web.conditions`; None to leave it out.
        original: picture of which a part is to be drawn anew.
        mask: layers of the brush over it; what they touch is drawn.
        pictures: how many.
        temperature, top_k, top_p, min_p, guidance, stride: see `Net2NetTransformer.generate`.
        seed: picture number i of a seed is the same in any batch.
    """

    run: str
    size: Size
    conditions: dict[str, Any] = field(default_factory=dict)
    original: Image.Image | None = None
    mask: list[Image.Image | None] = field(default_factory=list)
    pictures: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance: float = 1.0
    stride: int = 1
    seed: int = 0


def check_request(model: Net2NetTransformer, request: Request, max_pixels: int) -> None:
    """Raise ValueError, with what would do, for a setting that is out of range for the model."""
    check_size(model, request, max_pixels)
    vocabulary = model.codebook_size or model.transformer.config.vocab_size
    for name, low, high in (("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
        value = getattr(request, name)
        if value is not None and not (low < value <= high or (name == "min_p" and value == 0)):
            raise ValueError(f"{name.replace('_', '-')} is {value:g}: give a share above 0, up to 1")
    if not request.temperature > 0:
        raise ValueError(f"the temperature is {request.temperature:g}: it must be above 0; 1 changes nothing")
    if request.top_k is not None and not 1 <= request.top_k <= vocabulary:
        raise ValueError(f"top-k is {request.top_k}: there are {vocabulary} codes, give 1 to {vocabulary}")
    if request.guidance != 1.0 and model.null_token is None:
        raise ValueError(
            f"guidance is {request.guidance:g}, but this model has no token for no condition: set it to 1, "
            "or train a model with cond_dropout and null_token"
        )
    if not 0 <= request.seed <= MAX_SEED:
        raise ValueError(f"the seed is {request.seed}: give a whole number from 0 to {MAX_SEED}")
    window = model.latent_shape()[1]
    if not 1 <= request.stride <= window:
        raise ValueError(f"the stride is {request.stride}: give 1 to {window}, the width of the window")


def check_size(model: Net2NetTransformer, request: Request, max_pixels: int) -> None:
    """Raise ValueError, with the nearest size that works, for a size the model cannot draw."""
    (height, width), count = request.size, request.pictures
    check_drawable(model, request.size, None, "size")
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"{count} pictures: give 1 to {MAX_PICTURES}")
    if height * width * count > max_pixels:
        raise ValueError(
            f"{count} x {height}x{width} are {height * width * count / 1e6:.2f} million pixels; at most "
            f"{max_pixels / 1e6:g} million are drawn at once here (--max-pixels)"
        )
