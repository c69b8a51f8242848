"""Models whose parameters are initialised only where a file has no values for them."""

import copy
import threading

import pytest
import torch
from torch import nn

from taming.checkpoint import load_model
from taming.checkpoint.deferred_init import DeferredInit, memory_limit
from taming.models.vqgan import VQModel

DISC = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 1, "disc_num_layers": 2, "disc_ndf": 32, "perceptual_weight": 0.0},
}
DDCONFIG = dict(
    double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0,
)
PARAMS = {"ddconfig": DDCONFIG, "lossconfig": DISC, "n_embed": 16, "embed_dim": 4}
CONFIG = {"model": {"target": "taming.models.vqgan.VQModel", "params": PARAMS}}


class Net(nn.Module):
    """Initialised in the ways that networks are."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 4)
        self.two = nn.Linear(4, 5)
        self.tied = nn.Linear(5, 4)
        self.tied.weight = self.one.weight
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.LayerNorm(4)
        self.drawn = nn.Parameter(torch.randn(3))
        nn.init.trunc_normal_(self.one.weight, std=0.02)
        self.two.weight.data.normal_(0.0, 0.5)
        nn.init.zeros_(self.two.bias)
        with torch.no_grad():
            self.two.bias[1] = 7.0
            self.two.bias *= 2.0
        self.register_buffer("count", torch.ones(2).mul_(3))


def test_what_is_put_off_is_what_would_have_been_done():
    expected = Net().state_dict()
    deferred = DeferredInit()
    with deferred:
        net = Net()
    assert torch.equal(net.count, torch.full((2,), 3.0))
    deferred.finish(net)
    assert net.tied.weight is net.one.weight
    assert torch.equal(net.two.bias, torch.tensor([0.0, 14.0, 0.0, 0.0, 0.0]))
    assert torch.equal(net.norm.weight, torch.ones(4)) and net.norm.weight.requires_grad
    assert 0.005 < net.one.weight.std() < 0.05
    for key, value in net.state_dict().items():
        assert value.isfinite().all() and value.shape == expected[key].shape, key


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (0.05, 2.0)])
def test_an_initialisation_that_looks_at_values_sees_its_own(bounds):
    """Not what the memory held before."""
    deferred = DeferredInit()
    with deferred:
        layer = nn.Linear(40, 40)
        layer.weight.detach().numpy()[:] = [0.0] * 39 + [7.0]
        nn.init.trunc_normal_(layer.weight, std=0.02, a=bounds[0], b=bounds[1])
    deferred.finish(layer)
    assert 0.001 < layer.weight.std() < 0.03 and layer.weight.abs().max() < 0.5


def test_what_is_made_of_parameters_is_made_of_their_values():
    """Copies, joined and scaled parameters; a later change of one changes no other."""
    deferred = DeferredInit()
    with deferred:
        one, two, three = (nn.Linear(3, 3, bias=False) for _ in range(3))
        for layer in (one, two, three):
            layer.weight.detach().numpy()[:] = 9.0
        nn.init.constant_(three.weight, 2.0)
        with torch.no_grad():
            one.weight.copy_(three.weight)
            two.weight.copy_(torch.cat([three.weight[:1] * 2, three.weight[:2]]))
            three.weight.mul_(3.0)
        again = copy.deepcopy(three)
    for layer in (one, two, three, again):
        deferred.finish(layer)
    expected = torch.full((3, 3), 2.0)
    assert torch.equal(one.weight, expected) and torch.equal(three.weight, 3 * expected)
    assert torch.equal(two.weight, expected * torch.tensor([[2.0], [1.0], [1.0]]))
    assert torch.equal(again.weight, three.weight)


def test_usual_layers_are_put_off_altogether():
    deferred = DeferredInit()
    with deferred:
        layers = nn.ModuleList([
            nn.Linear(4, 4), nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 4), nn.Embedding(4, 4), nn.LayerNorm(4)
        ])
        waiting = [deferred._recorded[p.untyped_storage().data_ptr()] for p in layers.parameters()]
    assert all(waiting)


def test_parameters_that_got_values_keep_them():
    deferred = DeferredInit()
    with deferred:
        layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3))
    deferred.finish(layer)
    assert torch.equal(layer.weight, torch.ones(2, 3))
    assert 0 < layer.bias.abs().max() <= 3 ** -0.5


def test_other_threads_initialise_as_ever():
    built = []
    with DeferredInit():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(50, 50)))
        thread.start()
        thread.join()
    assert 0.05 < built[0].weight.std() < 0.12
    assert 0.05 < nn.Linear(50, 50).weight.std() < 0.12  # and so does this one, afterwards


def test_weights_that_a_file_lacks_are_initialised_as_if_built_anew(tmp_path):
    source = VQModel(**PARAMS)
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("loss.")}
    torch.save({"state_dict": state, "config": CONFIG}, tmp_path / "x.ckpt")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model, _, _ = load_model(tmp_path / "x.ckpt", VQModel)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
    layers = [layer for layer in model.loss.discriminator.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 4
    for layer in layers:
        assert 0.015 < layer.weight.std() < 0.025  # N(0, 0.02), as a discriminator begins


def test_endless_models_end():
    with pytest.raises(ValueError, match="takes over 100,000 steps to build"), DeferredInit():
        nn.Sequential(*(nn.Identity() for _ in range(200_000)))
    with pytest.raises(ValueError, match="takes over 100,000 steps to build"), DeferredInit():
        for _ in range(200_000):
            nn.LayerNorm(1)


@pytest.mark.parametrize("make", [
    lambda: torch.zeros(10**11), lambda: torch.arange(10**11), lambda: [0] * 10**11,
    lambda: bytearray(10**12), lambda: nn.Linear(10**6, 10**6),
])
def test_memory_has_a_limit_within_the_block(make):
    pytest.importorskip("resource")
    with pytest.raises((MemoryError, RuntimeError)), memory_limit(1 << 30):
        make()
    assert torch.ones(1 << 20).sum() == 1 << 20


def test_the_limit_ends_with_the_block():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(1 << 30), memory_limit(1 << 29):
        assert torch.ones(1 << 20).sum() == 1 << 20
    assert resource.getrlimit(resource.RLIMIT_AS) == before
