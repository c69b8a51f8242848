"""TransGAN's networks: golden values and names of the published code, sizes, masks, bad input."""

import json

import pytest
import torch
from torch import nn

from taming.modules.transgan.blocks import Attention
from taming.modules.transgan.discriminator import ViTDiscriminator
from taming.modules.transgan.generator import TransGANGenerator, upsample
from taming.modules.transgan.locality import check_schedule, locality_mask, radius_at
from tests.test_golden import GOLDEN, read

CIFAR = [(22, 4), (32, 6), (42, 8), (60, 10)]  # of the published code


def generator(resolution=16, depths=(1, 1, 1), **params):
    return TransGANGenerator(resolution, 64, depths, latent_dim=16, **params)


def close(got, want):
    """Compare to 1e-5, relative to the largest value."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


# ---- golden values: VITA-Group/TransGAN, commit c1524fb


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_golden_generator(fused):
    state, given, want = read("transgan_generator")
    net = TransGANGenerator(
        16, 96, (2, 4, 2), latent_dim=24, heads=2, mask_kind="1d", fused_attention=fused
    ).eval()
    net.load_state_dict(state)  # with the normalization that is not used
    for epoch in (0, 25, 35, 50, 60):
        close(net(given["z"], radius_at(CIFAR, epoch)), want[f"image_epoch_{epoch}"])
    assert set(net.state_dict()) == {key for key in state if not key.startswith("to_rgb.")}


@torch.no_grad()
def test_golden_discriminator():
    state, given, want = read("transgan_discriminator")
    for fused in (False, True):
        net = ViTDiscriminator(16, 48, depth=3, heads=2, fused_attention=fused).eval()
        net.load_state_dict(state)
        close(net.features(given["x"]), want["features"])
        close(net(given["x"]), want["logits"])


@pytest.mark.parametrize(("size", "dim", "depths", "latent", "millions"), [
    (32, 384, (5, 2, 2), 384, 18.6), (32, 384, (5, 2, 2), 1024, 34.4), (32, 512, (5, 2, 2), 512, 33.1),
    (32, 768, (5, 2, 2), 768, 74.3), (32, 1024, (5, 4, 2), 1024, 133.6), (48, 768, (5, 4, 2), 1024, 150.9),
    (64, 1024, (5, 3, 3, 2), 1024, 132.9),
])
def test_published_sizes(size, dim, depths, latent, millions):
    with torch.device("meta"):
        net = TransGANGenerator(size, dim, depths, latent)
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6, 1) == millions


def test_names_of_the_released_generator():
    released = json.loads((GOLDEN / "transgan_cifar_layout.json").read_text())["shapes"]
    with torch.device("meta"):
        net = TransGANGenerator(32, 1024, (5, 4, 2), 1024)
        net.load_state_dict({name: torch.empty(shape) for name, shape in released.items()})
    ours = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert ours == {name: shape for name, shape in released.items() if not name.startswith("to_rgb.")}


@pytest.mark.parametrize(("size", "millions"), [(32, 12.46), (48, 12.49), (64, 12.53)])
def test_published_discriminators(size, millions):
    with torch.device("meta"):
        net = ViTDiscriminator(size)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


# ---- stages


def test_stages_of_any_size():
    net = generator((16, 32))
    assert net.grids == [(4, 8), (8, 16), (16, 32)] and net.dims == [64, 16, 4]
    assert net(torch.randn(2, 16)).shape == (2, 3, 16, 32)
    assert ViTDiscriminator((16, 32), 32, 2)(torch.randn(2, 3, 16, 32)).shape == (2, 1)
    x = torch.randn(2, 6 * 5, 8)
    y = upsample(x, 6, 5)
    assert y.shape == (2, 12 * 10, 2) and y.square().sum().item() == pytest.approx(x.square().sum().item())
    back = nn.functional.pixel_unshuffle(y.transpose(1, 2).unflatten(2, (12, 10)), 2)
    assert torch.equal(back.flatten(2).transpose(1, 2), x)


def test_super_resolution_shares_the_later_stages():
    torch.manual_seed(0)
    net = generator(entry_stage=2)
    high = net.super_resolve(torch.randn(2, 3, 8, 8))
    assert high.shape == (2, 3, 16, 16)
    high.square().mean().backward()
    gradient = {name: p.grad for name, p in net.named_parameters()}
    silent = {name for name, grad in gradient.items() if grad is None}
    assert silent == {"pos_embed_1", *(n for n in gradient if n.startswith(("l1.", "blocks.")))}
    assert all(gradient[name].abs().sum() > 0 for name in gradient.keys() - silent)
    plain = generator()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("from_rgb.")})
    z = torch.randn(2, 16)
    assert torch.equal(plain(z), net(z))


# ---- locality


def test_masks():
    for h, w in ((4, 4), (3, 6), (5, 1)):
        before = torch.eye(h * w, dtype=torch.bool)
        for radius in range(7):
            mask = locality_mask(h, w, radius)
            assert torch.equal(mask, mask.T) and mask.diagonal().all() and not (before & ~mask).any()
            count = [sum(abs(i - j) <= radius for i in range(n) for j in range(n)) for n in (h, w)]
            assert mask.sum() == count[0] * count[1]
            assert mask.all() == (radius >= max(h, w) - 1)
            before = mask
    i = torch.arange(12)
    assert torch.equal(locality_mask(3, 4, 2, "1d"), (i[:, None] - i).abs() <= 2)
    assert round(locality_mask(32, 32, 4).sum(1).float().mean().item()) == 70


def test_masked_attention_is_local():
    attention = Attention(8, 2)
    x = torch.randn(1, 12, 8, requires_grad=True)
    mask = locality_mask(3, 4, 1)
    for i in (0, 5, 11):
        (gradient,) = torch.autograd.grad(attention(x, mask)[0, i].sum(), x)
        assert torch.equal(gradient[0].abs().sum(1) > 0, mask[i])
    torch.testing.assert_close(attention(x, locality_mask(3, 4, 3)), attention(x))
    fused = Attention(8, 2, fused=True)
    fused.load_state_dict(attention.state_dict())
    torch.testing.assert_close(fused(x, mask), attention(x, mask))


def test_the_mask_is_that_of_the_last_stage():
    torch.manual_seed(0)
    net = generator(depths=(1, 1, 2)).eval()
    everywhere = generator(depths=(1, 1, 2), mask_all_blocks=True).eval()
    everywhere.load_state_dict(net.state_dict())
    z = torch.randn(2, 16)
    free, one, all_ = net(z), net(z, 1), everywhere(z, 1)
    assert not torch.allclose(free, one) and not torch.allclose(one, all_)
    assert torch.equal(everywhere(z), free)
    torch.testing.assert_close(everywhere(z, 15), free)


def test_schedule():
    radii = [radius_at(CIFAR, epoch) for epoch in range(70)]
    assert radii[0] == radii[21] == 4 and radii[22] == 6 and radii[59] == 10 and radii[60:] == [None] * 10
    assert radius_at([], 0) is None
    for wrong in ([(5, 4), (5, 6)], [(5, 4), (9, 3)], [(5, 4), (2, 6)]):
        with pytest.raises(ValueError, match="epochs rise and windows grow"):
            check_schedule(wrong)
    check_schedule(CIFAR)


# ---- bad input


def test_bad_input():
    for params, message in (
        (dict(resolution=18), "not a multiple of 4, for 3 stages"),
        (dict(resolution=16, entry_stage=1), "entry_stage: 1 must be a stage after the first, 2 to 3"),
        (dict(resolution=16, entry_stage=4), "entry_stage: 4 must be"),
        (dict(resolution=16, heads=3), "dim: 64 is not a multiple of 48"),
    ):
        with pytest.raises(ValueError, match=message):
            generator(**params)
    with pytest.raises(ValueError, match=r"latents are \(B, 16\), the latent_dim; got \(2, 8\)"):
        generator()(torch.randn(2, 8))
    with pytest.raises(ValueError, match="takes images of 8x8 pixels, got 4x8"):
        generator(entry_stage=2).super_resolve(torch.randn(2, 3, 4, 8))
    with pytest.raises(ValueError, match="set entry_stage"):
        generator().super_resolve(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="patches of 5x5 pixels do not divide images of 16x16"):
        ViTDiscriminator(16, 32, patch_size=5)
    with pytest.raises(ValueError, match="3 heads do not divide 32 channels"):
        ViTDiscriminator(16, 32, heads=3)
    with pytest.raises(ValueError, match="takes images of 16x16 pixels, got 16x8"):
        ViTDiscriminator(16, 32)(torch.randn(1, 3, 16, 8))
