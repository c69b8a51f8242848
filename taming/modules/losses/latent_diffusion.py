"""The first-stage loss of latent diffusion, with the arguments that its configs give."""

from typing import Any

from taming.modules.losses import vqperceptual


class VQLPIPSWithDiscriminator(vqperceptual.VQLPIPSWithDiscriminator):
    """The VQGAN's loss, with two arguments that latent diffusion added.

    Args:
        n_classes: number of codes, without effect: validation always measures their perplexity.
        perceptual_loss: must be "lpips".
        args, kwargs: see `taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`.

    Raises:
        ValueError: another `perceptual_loss`.
    """

    def __init__(
        self, *args: Any, n_classes: int | None = None, perceptual_loss: str = "lpips", **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.n_classes = n_classes
        if perceptual_loss != "lpips":
            raise ValueError(f"perceptual_loss: {perceptual_loss!r} is unknown; choose 'lpips'")
