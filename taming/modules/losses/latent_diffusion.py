"""The first-stage loss of latent diffusion, under the arguments that its configs give."""

from taming.modules.losses import vqperceptual


class VQLPIPSWithDiscriminator(vqperceptual.VQLPIPSWithDiscriminator):
    """The VQGAN's loss, with the three arguments that latent diffusion added.

    Args:
        n_classes: number of codes; it asked for their perplexity, which validation always measures here.
        perceptual_loss, pixel_loss: "lpips" and "l1" are what there is.
        disc_start, ...: see `taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`.

    Raises:
        ValueError: another `perceptual_loss` or `pixel_loss`.
    """

    def __init__(
        self, *args, n_classes: int | None = None, perceptual_loss: str = "lpips", pixel_loss: str = "l1",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.n_classes = n_classes
        for name, value, known in (
            ("perceptual_loss", perceptual_loss, "lpips"), ("pixel_loss", pixel_loss, "l1"),
        ):
            if value != known:
                raise ValueError(f"{name}: {value!r} is not here; choose {known!r}")
