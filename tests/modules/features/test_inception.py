"""FID's Inception: torchvision's with other pools, TensorFlow's order of spatial features, logits."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import inception

from taming.modules.features.inception import NUM_CLASSES, FIDInception


@pytest.fixture(scope="module")
def reference():
    """torchvision's Inception with random weights and statistics, and 1008 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = inception.Inception3(NUM_CLASSES, aux_logits=False, init_weights=False)
        for name, value in network.state_dict().items():
            if value.ndim == 4:
                value.normal_().mul_((2 / value[0].numel()) ** 0.5)
            elif name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.8, 1.2)
            elif name.endswith(("running_mean", "bias")):
                value.uniform_(-0.1, 0.1)
    return network.eval()


@pytest.fixture
def ours(reference):
    network = FIDInception().eval()
    network.load_state_dict(reference.state_dict())
    return network


def images():
    return torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1


def features_of(network, x, tap=None):
    """The pooled features, and what the module `tap` gave."""
    found = {}
    hooks = [network.avgpool.register_forward_hook(lambda *args: found.update(features=args[2].flatten(1)))]
    if tap:
        module = network.get_submodule(tap)
        hooks.append(module.register_forward_hook(lambda *args: found.update(tap=args[2])))
    with torch.no_grad():
        found["logits"] = network(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def other_pools(reference, monkeypatch):
    """torchvision's blocks with FID's pools in place of theirs; where a call comes from decides which."""
    averages, last = F.avg_pool2d, reference.Mixed_7c
    is_last = []

    def without_padding(x, *args, **kwargs):
        if is_last:
            return F.max_pool2d(x, 3, stride=1, padding=1)
        # The definition: the sum over the window divided by the number of pixels that lie in the image
        inside = averages(torch.ones_like(x[:1, :1]), *args, **kwargs)
        return averages(x, *args, **kwargs) / inside

    hooks = [
        last.register_forward_pre_hook(lambda *_: is_last.append(1)),
        last.register_forward_hook(lambda *_: is_last.clear()),
    ]
    monkeypatch.setattr(inception.F, "avg_pool2d", without_padding)
    yield
    for hook in hooks:
        hook.remove()


def test_equals_torchvisions_with_the_pools_of_fid(reference, ours, other_pools):
    x = images()
    with torch.no_grad():
        found = ours(x)
    want = features_of(reference, x, "Mixed_6d.branch1x1")
    assert want["features"].std() > 1e-3
    torch.testing.assert_close(found.features, want["features"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.logits, want["logits"], rtol=1e-3, atol=1e-3)
    spatial = want["tap"][:, :7]  # (B, 7, 17, 17), after the ReLU
    in_order = torch.stack([spatial[:, c, i, j] for i in range(17) for j in range(17) for c in range(7)], 1)
    assert found.spatial.shape == (2, 2023)
    torch.testing.assert_close(found.spatial, in_order, rtol=1e-3, atol=1e-4)


def test_differs_from_torchvisions_own(reference, ours):
    """The pools matter, so the comparison above can fail."""
    x = images()
    with torch.no_grad():
        found = ours(x)
    want = features_of(reference, x)["features"]
    assert (found.features - want).abs().max() > 0.05 * want.std()


def test_the_score_uses_logits_without_bias(ours):
    with torch.no_grad():
        found = ours(images())
        torch.testing.assert_close(found.logits - found.logits_without_bias, ours.fc.bias.expand(2, -1))
        by_hand = found.features.double() @ ours.fc.weight.double().T
    torch.testing.assert_close(found.logits_without_bias.double(), by_hand, rtol=1e-4, atol=1e-4)


def test_names_and_sizes_are_those_of_the_published_file(reference):
    ours = {key: value.shape for key, value in FIDInception().state_dict().items()}
    assert ours == {key: value.shape for key, value in reference.state_dict().items()}
    assert ours["fc.weight"] == (1008, 2048)
