"""The patch discriminator: one logit per overlapping patch, rather than one per image.

B batch, C channels, H W pixels.
"""

from torch import Tensor, nn

from taming.modules.util import ActNorm


def weights_init(m: nn.Module) -> None:
    """Initialize a layer as DCGAN does, for `Module.apply`: convolutions N(0, 0.02), batch norms N(1, 0.02).

    Source: Radford, Metz and Chintala 2016, "Unsupervised Representation Learning with DCGANs", section 4.
    """
    if isinstance(m, nn.modules.conv._ConvNd):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class NLayerDiscriminator(nn.Module):
    """PatchGAN: strided convolutions, then a convolution to one logit per patch.

    With n_layers = 3, a logit sees 70 x 70 pixels. Source: Isola et al. 2017, "Image-to-Image Translation
    with Conditional Adversarial Networks", section 3.2.2 and appendix 6.1.2.

    Args:
        input_nc: image channels C.
        ndf: features of the first layer; they double with each layer, to 8 * ndf at most.
        n_layers: number of convolutions with stride 2.
        use_actnorm: ActNorm instead of BatchNorm.

    Raises:
        ValueError: `n_layers` is below 1.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"the discriminator needs at least one layer: disc_num_layers is {n_layers}")
        self.input_nc = input_nc
        self.n_layers = n_layers
        norm_layer = ActNorm if use_actnorm else nn.BatchNorm2d
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]

        layers: list[nn.Module] = [
            nn.Conv2d(input_nc, widths[0], kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for n in range(1, n_layers + 1):
            layers += [
                nn.Conv2d(
                    widths[n - 1],
                    widths[n],
                    kernel_size=4,
                    stride=2 if n < n_layers else 1,
                    padding=1,
                    bias=use_actnorm,  # batch norm subtracts the mean, and a bias with it
                ),
                norm_layer(widths[n]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to logits (B, 1, H / 2**n_layers - 2, W / 2**n_layers - 2).

        Raises:
            ValueError: not `input_nc` channels, or images too small for a single logit.
        """
        _, channels, height, width = input.shape
        if channels != self.input_nc:
            raise ValueError(
                f"the discriminator takes {self.input_nc} channels, got {channels}: set disc_in_channels in "
                "lossconfig"
            )
        smallest = 3 * 2**self.n_layers  # the last two convolutions each remove a row and a column
        if min(height, width) < smallest:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for a discriminator of {self.n_layers} "
                f"layers, which needs {smallest}: lower disc_num_layers in lossconfig"
            )
        return self.main(input)
