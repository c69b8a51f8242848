"""The first-stage loss of latent diffusion, under the arguments that its configs give."""

from taming.modules.losses import vqperceptual


class VQLPIPSWithDiscriminator(vqperceptual.VQLPIPSWithDiscriminator):
    """The VQGAN's loss, with two arguments that latent diffusion added.

    Args:
        n_classes: number of codes; it asked for their perplexity, which validation always measures here.
        perceptual_loss: "lpips" is what there is.
        disc_start, ...: see `taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`.

    Raises:
        ValueError: another `perceptual_loss`.
    """

    def __init__(self, *args, n_classes: int | None = None, perceptual_loss: str = "lpips", **kwargs):
        super().__init__(*args, **kwargs)
        self.n_classes = n_classes
        if perceptual_loss != "lpips":
            raise ValueError(f"perceptual_loss: {perceptual_loss!r} is not here; choose 'lpips'")
