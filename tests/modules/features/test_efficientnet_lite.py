"""EfficientNet-Lite0: TensorFlow's padding, the blocks of the paper's table, a second derivation."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.features.efficientnet_lite import EfficientNetLite0, SameConv2d
from taming.modules.features.folding import fold_norms


@pytest.mark.parametrize("size", [7, 8, 14, 15])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_padding_is_that_of_tensorflow(size, stride, kernel):
    """SAME: ceil(size / stride) outputs; of the zeros that this needs, the smaller half comes first."""
    conv = SameConv2d(1, 1, kernel, stride)
    x = torch.randn(1, 1, size, size)
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    padded = torch.zeros(size + total, size + total)
    padded[total // 2 : total // 2 + size, total // 2 : total // 2 + size] = x[0, 0]
    want = torch.empty(outputs, outputs)
    for i in range(outputs):
        for j in range(outputs):
            patch = padded[i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            want[i, j] = (patch * conv.weight[0, 0]).sum()
    torch.testing.assert_close(conv(x)[0, 0], want)


def randomized(module):
    """Give a module weights and statistics with which activations neither vanish nor saturate."""
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "bn.weight")) or ("_bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.ndim > 1:
            value.normal_().mul_((2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.uniform_(-0.2, 0.2)
    return module.eval()


def test_equals_the_definition_written_out():
    """The state dict's tensors in order, with F.conv2d: no class of ours."""
    network = randomized(EfficientNetLite0())
    w = network.state_dict()
    x = torch.randn(2, 3, 64, 64)

    def convolve(x, name, stride=1, depthwise=False):
        weight = w[name + ".weight"]
        kernel = weight.shape[-1]
        total = max((-(-x.shape[2] // stride) - 1) * stride + kernel - x.shape[2], 0)
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, weight, stride=stride, groups=len(weight) if depthwise else 1)

    def normalize(x, name):
        mean, var, scale, shift = (
            w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    y = normalize(convolve(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for i in range(16):
        block, before = f"_blocks.{i}.", y
        if i > 0:
            y = normalize(convolve(y, block + "_expand_conv"), block + "_bn0").clamp(0, 6)
        y = convolve(y, block + "_depthwise_conv", strides.get(i, 1), depthwise=True)
        y = normalize(y, block + "_bn1").clamp(0, 6)
        y = normalize(convolve(y, block + "_project_conv"), block + "_bn2")
        if y.shape == before.shape:
            y = y + before
    y = normalize(convolve(y, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))
    features, logits = network(x)
    assert features.std() > 0.1
    torch.testing.assert_close(features, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, y @ w["_fc.weight"].T + w["_fc.bias"], rtol=1e-4, atol=1e-4)


def test_sizes_are_those_of_the_published_file():
    network = EfficientNetLite0()
    assert len(network.state_dict()) == 296
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert network._blocks[15]._project_conv.weight.shape == (320, 1152, 1, 1)


def test_folding_the_norms_changes_rounding_only():
    network = randomized(EfficientNetLite0())
    x = torch.randn(2, 3, 64, 64)
    want = network(x)
    assert sum(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules()) == 49
    fold_norms(network)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())
    for got, before in zip(network(x), want, strict=True):
        torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-4)
