"""The patch discriminator: golden logits, its keys, its patch and its limits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("use_actnorm", [False, True])
def test_golden(use_actnorm):
    case = load_file(GOLDEN / f"discriminator_actnorm_{str(use_actnorm).lower()}.safetensors")
    net = NLayerDiscriminator(input_nc=3, ndf=8, n_layers=2, use_actnorm=use_actnorm).eval()
    net.load_state_dict({k.removeprefix("state/"): v for k, v in case.items() if k.startswith("state/")})
    with torch.no_grad():
        torch.testing.assert_close(net(case["in/x"]), case["out/logits"], rtol=1e-4, atol=1e-5)


def test_default_layers_are_those_of_the_checkpoints():
    shapes = {k: tuple(v.shape) for k, v in NLayerDiscriminator().state_dict().items() if v.ndim == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4), "main.2.weight": (128, 64, 4, 4), "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4), "main.11.weight": (1, 512, 4, 4),
    }
    assert "main.2.bias" not in NLayerDiscriminator().state_dict()
    assert "main.2.bias" in NLayerDiscriminator(use_actnorm=True).state_dict()


def test_widths_stop_at_eight_times_the_first():
    convolutions = [m for m in NLayerDiscriminator(ndf=2, n_layers=5).modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [2, 4, 8, 16, 16, 16, 1]


def test_a_logit_sees_70_pixels():
    net = NLayerDiscriminator(ndf=4).eval()
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    logits = net(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


@pytest.mark.parametrize("n_layers", [1, 3])
def test_smallest_image_gives_one_logit_and_smaller_ones_an_error(n_layers):
    net, side = NLayerDiscriminator(ndf=2, n_layers=n_layers).eval(), 3 * 2**n_layers
    assert net(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{side - 1} x 64.*{side}.*disc_num_layers"):
        net(torch.zeros(1, 3, side - 1, 64))
    with pytest.raises(RuntimeError):  # the convolutions alone would fail too
        net.main(torch.zeros(1, 3, side - 1, 64))


def test_rejects_other_channels_and_no_layers():
    with pytest.raises(ValueError, match="takes 3 channels, got 4.*disc_in_channels"):
        NLayerDiscriminator(ndf=2)(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="disc_num_layers is 0"):
        NLayerDiscriminator(n_layers=0)


def test_initialization_has_the_deviations_of_dcgan():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NLayerDiscriminator()
        bias = net.main[0].bias.clone()
        net.apply(weights_init)
    convolution, norm = net.main[5].weight, net.main[6]
    assert convolution.std().item() == pytest.approx(0.02, rel=0.02)
    assert convolution.mean().item() == pytest.approx(0, abs=1e-3)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert norm.bias.abs().max() == 0
    assert torch.equal(net.main[0].bias, bias)


@pytest.mark.parametrize("use_actnorm", [False, True])
def test_gradients_reach_every_weight_and_the_image(use_actnorm):
    net = NLayerDiscriminator(ndf=4, n_layers=2, use_actnorm=use_actnorm).train()
    x = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    net(x).square().mean().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
