"""LPIPS: equal to the lpips package, finite where that is not, and invisible to its owner."""

import copy
import io
import pickle
import urllib.error
import warnings

import lpips
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming.modules.losses.lpips import LPIPS, TRUNKS, normalize_tensor, spatial_average, vgg16
from taming.modules.losses.vqperceptual import VQLPIPS

NETS = ["vgg", "alex", "squeeze"]


class Owner(nn.Module):
    """What holds LPIPS in practice: a loss with weights of its own."""

    def __init__(self, **kwargs):
        super().__init__()
        self.perceptual_loss = LPIPS(random_trunk=True, **kwargs)
        self.weight = nn.Parameter(torch.ones(3, 1, 1))


@pytest.fixture(scope="module")
def references():
    """The package's networks with random trunks; its heads are the trained ones."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # its way of calling torchvision is deprecated
        torch.manual_seed(0)
        nets = {net: lpips.LPIPS(net=net, pnet_rand=True, verbose=False) for net in NETS}
    return {net: reference.requires_grad_(False) for net, reference in nets.items()}


def images(*shape, seed=0):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def torchvision_names(state):
    """The trunk's weights as torchvision names them, out of the package's state dict."""
    return {"features." + key.split(".", 2)[2]: v for key, v in state.items() if key.startswith("net.slice")}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("names", ["torchvision", "2021"])
def test_equals_the_lpips_package(references, net, names):
    state = references[net].state_dict()
    ours = LPIPS(net=net)
    ours.load_trunk_state(torchvision_names(state) if names == "torchvision" else state)
    x, y = images(2, 3, 48, 64)
    want = references[net](x, y)
    got = ours(x, y)
    assert got.shape == want.shape == (2, 1, 1, 1)
    assert want.min() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_equals_the_lpips_package(references):
    ours = LPIPS(net="squeeze")
    ours.load_trunk_state(references["squeeze"].state_dict())
    x, y = images(1, 3, 32, 32)
    grads = [torch.autograd.grad(f(v, y).sum(), v)[0] for f in (ours, references["squeeze"])
             for v in [x.clone().requires_grad_(True)]]
    assert grads[1].abs().max() > 1e-5
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3 * grads[1].abs().max().item())


def test_weights_are_taken_out_of_a_whole_checkpoint_of_2021(references):
    reference = copy.deepcopy(references["squeeze"])
    for i in range(7):
        reference.lins[i].model[1].weight.mul_(1.5)
    state = {f"loss.perceptual_loss.{k}": v for k, v in reference.state_dict().items()}
    state["encoder.conv_in.weight"] = torch.zeros(1)
    ours = LPIPS(net="squeeze")
    ours.load_trunk_state(state)
    x, y = images(1, 3, 32, 32)
    torch.testing.assert_close(ours(x, y), reference(x, y), rtol=1e-5, atol=1e-5)


def test_trunk_state_of_another_network_is_rejected(references):
    with pytest.raises(ValueError, match=r"features\.\d+\.\w+"):
        LPIPS(net="vgg").load_trunk_state(references["alex"].state_dict())


@pytest.mark.parametrize("net", NETS)
def test_equal_images_have_distance_zero_and_a_finite_gradient(net):
    loss = LPIPS(net=net, random_trunk=True)
    x = images(1, 3, 32, 32)[0].requires_grad_(True)
    value = loss(x, x.detach().clone())
    value.sum().backward()
    assert value.abs().max() == 0
    assert x.grad.isfinite().all()


def test_normalization_is_smooth_at_zero():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    normalize_tensor(x).sum().backward()
    assert x.grad.isfinite().all()
    unit = normalize_tensor(images(5, 3, 3))
    torch.testing.assert_close(unit.square().sum(1), torch.ones(2, 3, 3))


def test_invisible_to_its_owner_before_and_after_use():
    owner = Owner(net="squeeze")
    for _ in range(2):
        assert list(owner.state_dict()) == ["weight"]
        assert [name for name, _ in owner.named_parameters()] == ["weight"]
        assert list(owner.buffers()) == []
        owner.perceptual_loss(*images(1, 3, 32, 32))
    assert not any(p.requires_grad for p in owner.perceptual_loss._loaded[0].parameters())


def test_checkpoints_of_2021_load_strictly_and_strangers_stay_unexpected(references):
    owner = Owner(net="squeeze")
    before = owner.perceptual_loss(*images(1, 3, 32, 32))
    historic = references["squeeze"].state_dict()
    state = {f"perceptual_loss.{k}": v for k, v in historic.items() if not k.startswith("lins")}
    state["weight"] = torch.full((3, 1, 1), 2.0)
    result = owner.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert owner.weight.flatten().tolist() == [2.0] * 3
    assert torch.equal(owner.perceptual_loss(*images(1, 3, 32, 32)), before)
    result = owner.load_state_dict({**state, "perceptual_loss.other": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["perceptual_loss.other"]


@pytest.mark.parametrize("used", [False, True])
def test_owner_can_be_copied_and_pickled(used):
    owner, pair = Owner(net="squeeze"), images(1, 3, 32, 32)
    if used:
        owner.perceptual_loss(*pair)
    copies = copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))
    value = owner.perceptual_loss(*pair)
    assert value.item() > 0
    for other in copies:
        assert torch.equal(other.perceptual_loss(*pair), value)


def test_stays_in_evaluation_mode_and_float32():
    owner, (x, y) = Owner(net="squeeze"), images(1, 3, 32, 32)
    want = owner.perceptual_loss(x, y)
    owner.train().to(torch.bfloat16)
    assert not owner.perceptual_loss.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = owner.perceptual_loss(x, y)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_training_in_bfloat16_is_close_to_float32():
    """Values and gradients, of images that differ by little; other calls compute in float32."""
    loss = LPIPS(net="vgg", random_trunk=True)
    x, noise = images(2, 3, 64, 64)
    y = (x + 0.2 * noise).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(x, y)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), y)))
    (exact, exact_grad), (value, grad) = found
    assert value.dtype == torch.float32 and not torch.equal(value, exact)
    torch.testing.assert_close(value, exact, rtol=0.03, atol=0)
    assert torch.cosine_similarity(grad.flatten(), exact_grad.flatten(), dim=0) > 0.95
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), exact)
    with torch.autocast("cpu", dtype=torch.float16):  # whose range is too small
        assert torch.equal(loss(x, y), exact)


def test_building_and_loading_disturb_no_global_generator():
    state = torch.random.get_rng_state()
    first, second = LPIPS(net="alex", random_trunk=True), LPIPS(net="alex", random_trunk=True)
    pair = images(1, 3, 32, 32)
    assert torch.equal(first(*pair), second(*pair))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_first_use_in_inference_mode_leaves_it_fit_for_training():
    loss, (x, y) = LPIPS(net="squeeze", random_trunk=True), images(1, 3, 32, 32)
    with torch.inference_mode():
        value = loss(x, y)
    x.requires_grad_(True)
    loss(x, y).sum().backward()
    assert value.item() > 0
    assert x.grad.abs().max() > 0


def test_built_on_the_meta_device_it_still_works():
    with torch.device("meta"):
        loss = LPIPS(net="squeeze", random_trunk=True)
    pair = images(1, 3, 32, 32)
    assert torch.equal(loss(*pair), LPIPS(net="squeeze", random_trunk=True)(*pair))


def test_one_channel_counts_three_times():
    loss, (x, y) = LPIPS(net="squeeze", random_trunk=True), images(2, 1, 32, 40)
    assert torch.equal(loss(x, y), loss(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(("shapes", "message"), [
    (((1, 5, 32, 32), (1, 5, 32, 32)), "5.*perceptual_weight: 0"),
    (((1, 3, 32, 32), (1, 3, 32, 48)), "one shape"),
    (((1, 3, 15, 32), (1, 3, 15, 32)), "15 x 32.*16.*perceptual_weight: 0"),
])
def test_rejects_what_it_cannot_compare(shapes, message):
    with pytest.raises(ValueError, match=message):
        LPIPS(net="vgg", random_trunk=True)(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("net", NETS)
def test_smallest_size_is_the_trunk_s_own(net):
    loss, smallest = LPIPS(net=net, random_trunk=True), TRUNKS[net].smallest
    assert loss(*images(1, 3, smallest, smallest)).item() > 0
    with pytest.raises(RuntimeError):  # the network itself fails one pixel below
        loss._loaded[0](*images(1, 3, smallest - 1, smallest - 1))


def test_unknown_net_is_an_error_with_the_choices():
    with pytest.raises(ValueError, match="resnet.*vgg, alex, squeeze"):
        LPIPS(net="resnet")
    with pytest.raises(ValueError, match="'alex'.*net="):
        LPIPS("alex")


def test_offline_the_error_names_file_place_and_ways_out(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    loss = LPIPS()  # building needs no file
    with pytest.raises(FileNotFoundError) as caught:
        loss(*images(1, 3, 32, 32))
    place = str(tmp_path / "hub" / "checkpoints")
    for part in ("vgg16-397923af.pth", place, "trunk_path", "perceptual_weight: 0"):
        assert part in str(caught.value)


@pytest.mark.parametrize("explicit", [False, True])
def test_trunk_is_read_from_the_cache_or_the_given_path(references, tmp_path, monkeypatch, explicit):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / ("mine.pth" if explicit else "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torchvision_names(references["squeeze"].state_dict()), path)
    loss = LPIPS(net="squeeze", trunk_path=path if explicit else None)
    pair = images(1, 3, 32, 32)
    torch.testing.assert_close(loss(*pair), references["squeeze"](*pair), rtol=1e-5, atol=1e-5)


def test_wrong_trunk_files_are_named(tmp_path):
    pair = images(1, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        LPIPS(trunk_path=tmp_path / "missing.pth")(*pair)
    buffer = io.BytesIO()
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, buffer)
    (tmp_path / "short.pth").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(ValueError, match="short.pth"):
        LPIPS(trunk_path=tmp_path / "short.pth")(*pair)
    (tmp_path / "part.pth").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="part.pth holds no features.0.bias"):
        LPIPS(trunk_path=tmp_path / "part.pth")(*pair)


def first_stage_checkpoint(reference):
    """What a first stage's file of 2021 held: the model, and the perceptual network inside its loss."""
    network = {f"loss.perceptual_loss.{key}": value for key, value in reference.state_dict().items()
               if not key.startswith("lins")}  # the package's second name for its heads
    model = {"encoder.conv_in.weight": torch.zeros(3), "loss.discriminator.main.0.weight": torch.zeros(3)}
    return {"state_dict": model | network, "epoch": 3, "hparams": OmegaConf.create({"n_embed": 4})}


@pytest.mark.parametrize("net", NETS)
def test_a_first_stage_of_2021_serves_as_the_file_of_the_network(references, tmp_path, monkeypatch, net):
    reference = copy.deepcopy(references[net])
    for head in reference.lins:
        head.model[1].weight.mul_(1.5)  # other than the package's: these are what must be used
    torch.save(first_stage_checkpoint(reference), tmp_path / "last.ckpt")
    monkeypatch.setattr(torch.hub, "urlopen", None)
    loss = VQLPIPS(perceptual_net=net, perceptual_path=str(tmp_path / "last.ckpt"))
    x, y = images(2, 3, 48, 64)
    torch.testing.assert_close(loss.perceptual_loss(x, y), reference(x, y), rtol=1e-5, atol=1e-5)
    assert loss(torch.zeros(()), x, y)[1]["train/p_loss"].item() > 0


def test_a_checkpoint_without_the_network_says_so(tmp_path):
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(3)}}, tmp_path / "new.ckpt")
    pair = images(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"new.ckpt holds no features\.\*.*loss\.perc.*perceptual_path"):
        LPIPS(trunk_path=tmp_path / "new.ckpt")(*pair)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth is not a checkpoint: .*it holds a list"):
        LPIPS(trunk_path=tmp_path / "list.pth")(*pair)


def test_a_file_in_the_old_format_is_read_and_code_is_rejected(references, tmp_path):
    pair, state = images(1, 3, 32, 32), torchvision_names(references["squeeze"].state_dict())
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loss = LPIPS(net="squeeze", trunk_path=tmp_path / "old.pth")
    torch.testing.assert_close(loss(*pair), references["squeeze"](*pair), rtol=1e-5, atol=1e-5)
    for new in (True, False):
        torch.save({"x": print}, tmp_path / "code.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match="code.pth"):
            LPIPS(net="squeeze", trunk_path=tmp_path / "code.pth")(*pair)


# ---- attributes and calls of 2021


@pytest.mark.parametrize("net", NETS)
def test_the_parts_of_2021_compute_the_distance(references, net):
    ours, (x, y) = LPIPS(net=net), images(2, 3, 48, 64)
    ours.load_trunk_state(references[net].state_dict())
    scaled = ours.scaling_layer(x), ours.scaling_layer(y)
    first, second = (list(map(normalize_tensor, ours.net(image))) for image in scaled)
    assert [f.shape[1] for f in first] == ours.chns and len(first) == ours.net.N_slices
    total = 0
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        head = getattr(ours, f"lin{i}") if i < 5 else ours.network().get_submodule(f"lin{i}")
        total = total + spatial_average(head.model((a - b).square()))
    torch.testing.assert_close(total, ours(x, y))
    theirs = references[net].net(scaled[0])
    for mine, other in zip(ours.net(scaled[0]), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_features_have_the_names_of_2021():
    features = LPIPS(random_trunk=True).net(images(1, 3, 32, 32)[0])
    assert features._fields == ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
    assert features.relu3_3.shape == (1, 256, 8, 8)


def test_the_network_is_an_ordinary_module_for_whoever_takes_it():
    loss = LPIPS(random_trunk=True)
    owner = nn.Module()
    owner.vgg16 = loss.net
    assert "vgg16.slice5.28.weight" in owner.state_dict()
    assert not any(p.requires_grad for p in owner.parameters())
    assert list(loss.state_dict()) == [] and list(loss.parameters()) == []


def test_the_network_follows_moves_but_no_casts():
    loss = LPIPS(net="squeeze", random_trunk=True).to(torch.float64)
    assert loss.net.slice1.get_parameter("0.weight").dtype == torch.float32
    loss.to("meta")
    assert loss.net.slice1.get_parameter("0.weight").device.type == "cpu"


def test_loading_now_instead_of_later(references, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.save(torchvision_names(references["vgg"].state_dict()), path)
    loss = LPIPS.from_pretrained()
    assert "loaded=True" in repr(loss)
    pair = images(1, 3, 32, 32)
    torch.testing.assert_close(loss(*pair), references["vgg"](*pair), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="vgg_lpips"):
        LPIPS().load_from_pretrained("alex_lpips")
    network = vgg16(requires_grad=True)
    assert all(p.requires_grad for p in network.parameters())
    x = loss.scaling_layer(pair[0])
    assert torch.equal(network(x).relu5_3, loss.net(x).relu5_3)
    assert not torch.equal(vgg16(pretrained=False)(x).relu5_3, network(x).relu5_3)
