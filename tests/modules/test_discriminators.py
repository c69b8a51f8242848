"""Discriminators beside PatchGAN: shapes, what a logit depends on, frozen features, and their limits."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.discriminator.blur import BlurPool, BlurPoolDiscriminator, gaussian_blur
from taming.modules.discriminator.features import FeatureDiscriminator
from taming.modules.discriminator.stylegan import StyleGANDiscriminator


def features(**arguments):
    arguments = dict(network="efflite0", random_weights=True, side=64, width=8) | arguments
    return FeatureDiscriminator(**arguments)


@pytest.mark.parametrize(("height", "width", "n_layers"), [(32, 32, 3), (48, 32, 3), (24, 40, 2)])
def test_stylegan_gives_one_logit_per_image_of_any_size(height, width, n_layers):
    net = StyleGANDiscriminator(ndf=4, n_layers=n_layers)
    assert net(torch.randn(3, 3, height, width)).shape == (3, 1)


def test_stylegan_keeps_the_deviation_of_features():
    torch.manual_seed(0)
    net = StyleGANDiscriminator(ndf=32, n_layers=3, deviation_group=0)
    x = torch.randn(16, 3, 32, 32)
    h = F.leaky_relu(net.from_rgb(x), 0.2)
    assert 0.3 < float(net.blocks(h).std() / h.std()) < 3.0


def test_the_deviation_is_that_of_the_group():
    net = StyleGANDiscriminator(ndf=4, n_layers=1, deviation_group=2)
    x = torch.randn(4, 8, 2, 2)
    want = [x[[i, i + 2]].std(0, unbiased=False).mean() for i in (0, 1)]
    got = net._deviation(x)
    assert got.shape == (4, 1, 2, 2)
    torch.testing.assert_close(got[:, 0, 0, 0], torch.stack(want + want), rtol=1e-3, atol=1e-4)
    assert net._deviation(x[:3]).abs().max() < 1e-3  # 3 images have no groups of 2
    alone = StyleGANDiscriminator(ndf=4, n_layers=1, deviation_group=0).eval()
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(alone(images)[:1], alone(images[:1]))


def test_blur_pool_keeps_constants_and_halves():
    pool = BlurPool()
    assert pool(torch.full((1, 2, 6, 8), 3.0)).shape == (1, 2, 3, 4)
    torch.testing.assert_close(pool(torch.full((1, 2, 7, 5), 3.0)), torch.full((1, 2, 4, 3), 3.0))
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 16, 16)
    assert pool(stripes)[..., 1:-1].abs().max() < 1e-6  # nothing is aliased
    assert pool.state_dict() == {}


def test_blur_pool_discriminator_judges_each_image_alone():
    net = BlurPoolDiscriminator(ndf=8, n_layers=2)
    x = torch.randn(3, 3, 32, 24)
    assert net(x).shape == (3, 1, 8, 6)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_gaussian_blur():
    point = torch.zeros(1, 2, 21, 21)
    point[..., 10, 10] = 1.0
    blurred = gaussian_blur(point, 2.0)
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(1, 2))
    places = torch.arange(21.0) - 10
    variance = (blurred[0, 0].sum(0) * places.square()).sum()
    assert float(variance) == pytest.approx(4.0, rel=0.05)
    torch.testing.assert_close(blurred, blurred.transpose(2, 3))
    assert gaussian_blur(point, 0.0) is point
    assert gaussian_blur(torch.rand(1, 3, 4, 4), 9.0).shape == (1, 3, 4, 4)  # wider than the image


@pytest.mark.parametrize("network", ["efflite0", "dinov2_small"])
def test_only_the_heads_of_frozen_features_are_trained(network):
    net = features(network=network, side=56)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = net(x)
    assert logits.ndim == 2 and len(logits) == 2
    logits.mean().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in net.parameters())
    assert {key.split(".")[0] for key in net.state_dict()} == {"heads"}
    other = features(network=network, side=56)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(x), net.eval()(x))


def test_heads_have_bounded_slopes():
    head = features().heads[0].train()
    for _ in range(30):
        head(torch.randn(2, 24, 8, 8))  # the norm of the weights is followed in training
    norm = torch.linalg.matrix_norm(head.first.weight.flatten(1), ord=2)
    assert float(norm) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("net", [
    StyleGANDiscriminator(ndf=4, n_layers=2), BlurPoolDiscriminator(ndf=4, n_layers=2),
    features(side=32),
], ids=lambda net: type(net).__name__)
def test_other_channels_are_named(net):
    with pytest.raises(ValueError, match="takes 3 channels, got 4: set disc_in_channels"):
        net(torch.zeros(1, 4, 32, 32))


def test_bad_frozen_networks(tmp_path):
    with pytest.raises(ValueError, match="there is no network 'vgg' for maps; choose one of efflite0"):
        features(network="vgg")
    with pytest.raises(ValueError, match="disc_in_channels: 5, but efflite0 takes images of 1 or 3"):
        features(input_nc=5)
    net = FeatureDiscriminator("dinov2_base", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no dinov2_vitb14_pretrain.pth: put .* from https://dl.fbai"):
        net(torch.zeros(1, 3, 32, 32))
