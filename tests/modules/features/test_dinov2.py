"""DINOv2: a second derivation, positions for other sizes, names of the published file."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.features.dinov2 import GRID, SIZES, DINOv2


@pytest.fixture
def tiny():
    network = DINOv2((2, 24, 3)).eval()
    for value in network.state_dict().values():
        value.normal_(std=0.3)
    return network


def test_equals_the_definition_written_out(tiny):
    """Attention head by head, patches cut out by hand, in float64."""
    w = {key: value.double() for key, value in tiny.state_dict().items()}
    x = torch.randn(2, 3, 28, 42)

    def norm(x, name):
        return F.layer_norm(x, (24,), w[name + ".weight"], w[name + ".bias"], 1e-6)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    patches = [x[:, :, i : i + 14, j : j + 14].double().flatten(1) for i in (0, 14) for j in (0, 14, 28)]
    kernel = w["patch_embed.proj.weight"].flatten(1)
    tokens = torch.stack([p @ kernel.T + w["patch_embed.proj.bias"] for p in patches], 1)
    positions = tiny.positions(2, 3).double()
    y = torch.cat([w["cls_token"].expand(2, 1, 24), tokens], 1) + positions
    for i in range(2):
        block = f"blocks.{i}."
        q, k, v = linear(norm(y, block + "norm1"), block + "attn.qkv").split(24, dim=2)
        heads = []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
            heads.append(weights @ v[..., part])
        y = y + w[block + "ls1.gamma"] * linear(torch.cat(heads, 2), block + "attn.proj")
        hidden = linear(norm(y, block + "norm2"), block + "mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        y = y + w[block + "ls2.gamma"] * linear(hidden, block + "mlp.fc2")
    want = norm(y, "norm")[:, 0]
    with torch.no_grad():
        got = tiny(x)
    assert got.shape == (2, 24) and want.std() > 0.1
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_positions_of_the_trained_size_are_the_stored_ones(tiny):
    assert torch.equal(tiny.positions(GRID, GRID), tiny.pos_embed)


def cubic(t, a=-0.75):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def test_positions_of_another_size_are_interpolated_with_the_offset(tiny):
    """Row i of 16 lies at (i + 0.5) * 37 / 16.1 - 0.5 of the stored 37."""
    stored = tiny.pos_embed[0, 1:].unflatten(0, (GRID, GRID)).double()
    got = tiny.positions(16, 16)[0, 1:].unflatten(0, (16, 16))
    assert torch.equal(tiny.positions(16, 16)[0, 0], tiny.pos_embed[0, 0])

    def line(i):
        at = (i + 0.5) * GRID / 16.1 - 0.5
        low = int(at // 1)
        return [(min(max(low + d, 0), GRID - 1), cubic(at - low - d)) for d in (-1, 0, 1, 2)]

    for i, j in ((0, 0), (3, 9), (8, 15), (15, 2)):
        want = sum(wy * wx * stored[y, x] for y, wy in line(i) for x, wx in line(j))
        torch.testing.assert_close(got[i, j].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "parameters"), [("small", 22), ("base", 87), ("large", 304)])
def test_sizes_are_the_published_ones(size, parameters):
    with torch.device("meta"):
        network = DINOv2(size)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == parameters
    assert network.pos_embed.shape == (1, 1370, SIZES[size][1])
    names = set(network.state_dict())
    assert {"cls_token", "mask_token", "blocks.11.ls2.gamma", "blocks.0.attn.qkv.bias", "norm.bias",
            "patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"} <= names
