"""Depth and label maps of a folder: where they go, what is kept, and what the models of transformers give."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.files.depth import read_depth, rgba_to_depth
from taming.data.files.label_maps import read_ids
from taming.inference import pseudo_labels
from taming.inference.pseudo_labels import (
    depth_estimate,
    depth_pixels,
    extract,
    label_estimate,
    label_names,
    label_pixels,
    load_depth_model,
    load_label_model,
    map_names,
    most_likely,
)

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (30, 20)), ("sub/b.png", (24, 40))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    (tmp_path / "photos" / "c.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def brightness(pixels: np.ndarray) -> np.ndarray:
    """A map that anybody can check."""
    return pixels.mean(-1) / 3 - 17.25


def test_maps_lie_like_their_images_and_hold_what_was_estimated(photos, tmp_path):
    names = map_names(photos, tmp_path / "out")
    outcomes = dict(zip(names, extract(names, brightness, depth_pixels), strict=True))
    assert outcomes[str(photos / "a.jpg")] == ("made", "") == outcomes[str(photos / "sub/b.png")]
    assert outcomes[str(photos / "c.png")][0] == "bad" and "c.png" in outcomes[str(photos / "c.png")][1]
    pixels = np.asarray(Image.open(photos / "sub/b.png"))
    stored = rgba_to_depth(np.asarray(Image.open(tmp_path / "out/sub/b.png")))
    assert np.array_equal(stored, brightness(pixels).astype(np.float32))
    assert read_depth(tmp_path / "out/a.png").shape == (20, 30)
    assert not list((tmp_path / "out").rglob(".*"))


def test_what_is_there_is_kept(photos, tmp_path):
    names = map_names(photos, tmp_path / "out")
    steps = extract(names, brightness, depth_pixels)
    next(steps)
    steps.close()  # interrupted
    (tmp_path / "out" / ".c.png.part").touch()
    seen = []

    def watched(pixels):
        seen.append(pixels.shape)
        return brightness(pixels)

    assert [outcome for outcome, _ in extract(names, watched, depth_pixels)] == ["kept", "bad", "made"]
    assert seen == [(40, 24, 3)]


def test_ids_have_as_many_bits_as_they_need(photos, tmp_path):
    for highest, mode in ((255, "L"), (300, "I;16")):
        names = map_names(photos, tmp_path / mode)

        def ids(pixels, highest=highest):
            return np.arange(pixels[..., 0].size).reshape(pixels.shape[:2]) % (highest + 1)

        list(extract(names, ids, label_pixels))
        assert Image.open(tmp_path / mode / "a.png").mode == mode
        assert read_ids(tmp_path / mode / "a.png").max() == highest
    with pytest.raises(ValueError, match="ids from -1 to 0 do not fit"):
        label_pixels(np.array([[-1, 0]]))


def test_names_that_collide_are_an_error(photos, tmp_path):
    with pytest.raises(ValueError, match="is in .*photos, where maps would be taken for images"):
        map_names(photos, photos / "depth")
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    with pytest.raises(ValueError, match="a.jpg and .*a.png would have the same map"):
        map_names(photos, tmp_path / "out")


class Processor:
    """What a processor of transformers does, in the least."""

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        return {"pixel_values": torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float() / 255}


class Output:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def test_depths_are_brought_to_the_size_of_the_image():
    def network(pixel_values):
        return Output(predicted_depth=7 + 3 * pixel_values.mean(1)[:, ::2, ::2])  # (1, h, w)

    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 255
    depth = depth_estimate((Processor(), network), CPU)(pixels)
    assert depth.shape == (20, 30) and depth.dtype == np.float32
    assert depth[:, :10] == pytest.approx(7, abs=1e-4) and depth[:, 20:] == pytest.approx(10, abs=1e-4)


def test_labels_are_the_likeliest_at_the_size_of_the_image():
    def network(pixel_values):
        bright = pixel_values.mean(1, keepdim=True)[:, :, ::2, ::2]
        return Output(logits=torch.cat([0.5 - bright, torch.full_like(bright, -9), bright - 0.5], 1))

    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 16:] = 255
    ids = label_estimate((Processor(), network), CPU)(pixels)
    assert ids.shape == (20, 30) and set(np.unique(ids)) == {0, 2}
    assert (ids[:, :15] == 0).all() and (ids[:, 17:] == 2).all()


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
def test_labels_do_not_depend_on_how_many_are_resized_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(pseudo_labels, "MAX_VALUES", at_once * 20 * 30 + 5)
    logits = torch.randn(7, 5, 6)
    logits[5] = logits[2]  # of equal ones the first
    resized = torch.nn.functional.interpolate(logits[None], (20, 30), mode="bilinear", align_corners=False)
    assert torch.equal(most_likely(logits, 20, 30), resized[0].argmax(0))


def test_a_large_image_takes_little_memory():
    """150 labels at 3000x2000 pixels would be 3.6 GB; the maps of values and labels are 150 MB."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert most_likely(torch.randn(150, 8, 8), 3000, 2000).shape == (3000, 2000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# ---- the library itself


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'pip install "taming\[data\]", or pip install transformers'):
        load_depth_model("x", CPU)


def segformer(library, folder):
    config = library.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        id2label={0: "sky", 1: "tree", 2: "sea"},
    )
    torch.manual_seed(0)
    library.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    library.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_segmentation_model_from_a_folder(library, photos, tmp_path):
    model = load_label_model(str(segformer(library, tmp_path / "model")), CPU)
    assert label_names(model[1]) == ["sky", "tree", "sea"]
    names = map_names(photos, tmp_path / "out")
    outcomes = [outcome for outcome, _ in extract(names, label_estimate(model, CPU), label_pixels)]
    assert outcomes == ["made", "bad", "made"]
    ids = read_ids(tmp_path / "out/sub/b.png")
    assert ids.shape == (40, 24) and ids.max() < 3
    with pytest.raises(ValueError, match="is not a model for DepthEstimation"):
        load_depth_model(str(tmp_path / "model"), CPU)


def test_a_depth_model_from_a_folder(library, photos, tmp_path):
    config = library.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
    )
    torch.manual_seed(0)
    library.DPTForDepthEstimation(config).save_pretrained(tmp_path / "model")
    library.DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    estimate = depth_estimate(load_depth_model(str(tmp_path / "model"), CPU), CPU)
    names = map_names(photos, tmp_path / "out")
    assert [outcome for outcome, _ in extract(names, estimate, depth_pixels)] == ["made", "bad", "made"]
    depth = rgba_to_depth(np.asarray(Image.open(tmp_path / "out/a.png")))
    assert depth.shape == (20, 30) and np.isfinite(depth).all() and depth.std() > 0


def test_weights_that_are_cut_off_are_named(library, tmp_path):
    weights = segformer(library, tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"of {tmp_path / 'model'} are cut off or damaged: fetch them"):
        load_label_model(str(tmp_path / "model"), CPU)


def test_a_missing_model_is_named(library, tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody/nothing was not found among"):
        load_depth_model("nobody/nothing", CPU, offline=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load_depth_model(str(tmp_path / "empty"), CPU)
