"""ST-LPIPS: equal to its definition, written out with functions; zero for equal images; shifts count less."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from taming.checkpoint import read_checkpoint
from taming.eval.networks import PERCEPTUAL_DISTANCES, load_perceptual_distance
from taming.images import from_uint8
from taming.modules.features.shift_tolerant_lpips import NETS, ShiftTolerantLPIPS

# After each convolution comes a ReLU, "pool N" takes the maximum over N x N, "blur" halves the size, and a
# bar ends what is compared.
LAYERS = {
    "vgg": "conv1 conv1 | pool2 blur conv1 conv1 | pool2 blur conv1 conv1 conv1 | "
           "pool2 blur conv1 conv1 conv1 | pool2 blur conv1 conv1 conv1 |",
    "alex": "bare2 blur relu | pool3 blur conv2 | pool3 blur conv1 | conv1 | conv1 |",
}


def definition(state, net, a, b):
    """The distance (B,) from the state dict alone, in float64."""
    state = {key: value.double() for key, value in state.items()}
    weights = iter([value for key, value in state.items() if key.startswith("net.")])
    shift, scale = state["scaling_layer.shift"], state["scaling_layer.scale"]
    x = (torch.cat([a, b]).double() - shift) / scale
    total, head = 0, 0
    for word in LAYERS[net].split():
        if word == "|":
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            weight = state[f"lin{head}.model.1.weight"][0]  # (c, 1, 1)
            total, head = total + ((first - second).square() * weight).sum(1).mean((1, 2)), head + 1
        elif word == "blur":
            kernel = next(weights)
            one = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).double() / 16
            torch.testing.assert_close(kernel, one.expand_as(kernel))
            x = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=len(kernel))[..., ::2, ::2]
        elif word == "relu":
            x = x.relu()
        elif word.startswith("pool"):
            x = F.max_pool2d(x, int(word[-1]), stride=1)
        else:
            weight, bias = next(weights), next(weights)
            x = F.conv2d(x, weight, bias, padding=int(word[-1]))
            x = x.relu() if word.startswith("conv") else x
    return total


def pair(height=48, width=64):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 2, 3, height, width, generator=generator) * 2 - 1
    return a, 0.7 * a + 0.3 * b


@pytest.fixture(scope="module", params=["vgg", "alex"])
def distance(request):
    if importlib.util.find_spec("stlpips_pytorch") is None:
        pytest.skip('needs pip install "taming[metrics-offline]"')
    return load_perceptual_distance(f"st-lpips-{request.param}")


def test_equals_the_definition_written_out(distance):
    net = PERCEPTUAL_DISTANCES[f"st-lpips-{distance.name[9:].lower()}"][1]
    state = read_checkpoint(Path(distance.file))["state_dict"]
    for size in ((48, 64), (37, 50)):
        a, b = pair(*size)
        want = definition(state, net, a, b)
        assert want.min() > 1e-4
        torch.testing.assert_close(distance(a, b).double(), want, rtol=1e-4, atol=1e-7)


def test_is_symmetric_and_zero_for_equal_images(distance):
    a, b = pair()
    assert distance(a, a.clone()).tolist() == [0, 0]
    assert torch.equal(distance(a, b), distance(b, a))
    assert (distance(a, -a) > distance(a, 0.99 * a)).all()


def test_each_pair_has_its_own_distance(distance):
    a, b = pair()
    alone = torch.cat([distance(a[i : i + 1], b[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(distance(a, b), alone, rtol=1e-4, atol=1e-7)


def photos(size=96):
    """Smooth random images with edges, larger than needed, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, (size + 1, size + 1), mode="bicubic").clamp(0, 1)
    disc = (torch.arange(size + 1) - size / 2).square()
    inside = (disc[:, None] + disc[None] < (size / 3) ** 2).float()
    return (smooth * (0.4 + 0.6 * inside)) * 2 - 1


def test_a_shift_by_one_pixel_counts_less_than_what_is_seen(distance):
    """Shift and blur change the pixels alike; only the second is a change of the image."""
    images = photos()
    reference, shifted = images[..., :-1, :-1], images[..., 1:, 1:]
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    noise = noise * (shifted - reference).square().mean().sqrt()  # as far away in the pixels
    assert (distance(reference, shifted) < 0.5 * distance(reference, reference + noise)).all()


def test_without_blurs_a_shift_counts_more(distance):
    """What makes the difference is the subsampling: the same weights, every second position without blur."""
    images = photos()
    reference, shifted = images[..., :-1, :-1], images[..., 1:, 1:]
    ours = distance(reference, shifted)
    sharp = ShiftTolerantLPIPS(distance.name[9:].lower())
    sharp.load_state_dict(distance.network.state_dict())
    for name, buffer in sharp.named_buffers():
        if name.endswith("filt"):
            buffer.zero_()[..., 1, 1] = 1
    with torch.no_grad():
        assert sharp.eval()(reference, shifted).mean() > 1.2 * ours.mean()


@pytest.mark.parametrize("net", NETS)
def test_images_that_are_too_small_are_an_error(net):
    network, smallest = ShiftTolerantLPIPS(net).eval(), NETS[net][2]
    x, small = torch.zeros(1, 3, smallest, smallest), torch.zeros(1, 3, 64, smallest - 1)
    assert network(x, x).tolist() == [0]
    with pytest.raises(ValueError, match=f"64 x {smallest - 1} .*{smallest}"):
        network(small, small)


@pytest.mark.parametrize("shapes", [
    ((1, 1, 64, 64), (1, 1, 64, 64)), ((1, 3, 64, 64), (1, 3, 64, 48)), ((3, 64, 64), (3, 64, 64)),
])
def test_other_shapes_are_an_error(shapes):
    with pytest.raises(ValueError, match="B, 3, H, W"):
        ShiftTolerantLPIPS("alex")(*(torch.zeros(shape) for shape in shapes))


def test_pairs_are_compared_in_chunks(distance):
    """More pairs than a chunk has; the network itself takes them all at once."""
    factors = torch.linspace(0.1, 1, 10)[:, None, None, None]
    a, b = (images[:1] * factors for images in pair())
    found = distance(a, b)
    with torch.no_grad():
        want = distance.network(a, b)
    assert not found.is_inference() and want.std() > 0
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="in pairs, got"):
        distance(a, b[:8])


def test_an_unknown_network_is_an_error():
    with pytest.raises(ValueError, match="squeeze.*vgg, alex"):
        ShiftTolerantLPIPS("squeeze")


def test_the_scale_of_the_input_is_minus_one_to_one(distance):
    black, white = (from_uint8(torch.full((1, 3, 64, 64), value, dtype=torch.uint8)) for value in (0, 255))
    assert distance(black, white).item() > 0.05
