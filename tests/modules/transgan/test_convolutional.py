"""The convolutional networks beside TransGAN's: sizes, no batch statistics, two derivatives, errors."""

import pytest
import torch

from taming.modules.losses.adversarial import gradient_penalty
from taming.modules.transgan.convolutional import ConvDiscriminator, ConvGenerator


@pytest.mark.parametrize("resolution", [16, [16, 24]])
def test_images_of_noise_and_logits_of_images(resolution):
    torch.manual_seed(0)
    sides = (16, 16) if resolution == 16 else (16, 24)
    generator, judge = ConvGenerator(resolution, 64, latent_dim=6), ConvDiscriminator(resolution, 4)
    assert generator.image_size == judge.image_size == sides
    z = torch.randn(3, 6)
    x = generator(z)
    assert x.shape == (3, 3, *sides) and x.std() > 0.01
    assert judge(x).shape == (3, 1)
    torch.testing.assert_close(generator(z[:1]), x[:1])  # an image does not depend on its batch
    torch.testing.assert_close(judge(x[1:2]), judge(x)[1:2])


def test_the_gradient_penalty_reaches_every_weight_of_the_discriminator():
    torch.manual_seed(0)
    judge = ConvDiscriminator(16, 4)
    gradient_penalty(judge, torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), 1.0).backward()
    without = {name for name, p in judge.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in without if name.endswith("weight")} == set()


@pytest.mark.parametrize(("build", "message"), [
    (lambda: ConvGenerator(20, 64, 6), "images of 20x20 pixels are not a multiple of 8"),
    (lambda: ConvDiscriminator([16, 20], 4), "images of 16x20 pixels are not a multiple of 8"),
    (lambda: ConvGenerator(16, 24, 6), "channels: 24 is not a multiple of 64"),
])
def test_sizes_that_do_not_divide_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
