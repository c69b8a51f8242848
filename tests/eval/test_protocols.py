"""The protocols, on runs of a few batches and on tokenizers whose result is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from taming.checkpoint import load_model
from taming.cli import main as taming
from taming.eval import parts
from taming.eval.classifiers import Classifier, classifier_for, classifier_of_means
from taming.eval.generation import ClassConditions, Rejection, _accepted
from taming.eval.likelihood import residual_bits
from taming.eval.networks import load_feature_network
from taming.eval.npz import NpzFile
from taming.eval.reconstruction import evaluate_reconstruction
from taming.eval.results import read_results
from taming.eval.sources import DatasetImages, FolderImages, pixels_of
from taming.eval.subject import Judges, Subject
from taming.images import from_uint8, to_uint8
from taming.metrics import FeatureStatistics, frechet_distance, psnr
from taming.models.tokenizer import Tokenizer
from taming.sampling import image_generators
from tests.tiny import train, write_transformer, write_vqgan

ROOT = Path(__file__).parents[2]
SETTINGS = ("--num-images", "6", "--batch-size", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def network():
    return load_feature_network("efflite0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer and a transformer over it."""
    folder = tmp_path_factory.mktemp("runs")
    vqgan = train(write_vqgan(folder), folder / "logs", "vqgan", "--max_steps", 2)
    transformer = train(write_transformer(folder, vqgan), folder / "logs", "transformer", "--max_steps", 2)
    return vqgan, transformer


@pytest.fixture
def photos(tmp_path):
    """Six images of 32x48 pixels, and one file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(256, size=(4, 6, 3), dtype=np.uint8))
        small.resize((48, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


class Coarse(nn.Module, Tokenizer):
    """Each pixel's colour, in steps, is its code: what is lost is known."""

    factor, resolution = 1, 32

    def __init__(self, step):
        super().__init__()
        self.step = step

    @property
    def codebook_size(self):
        return 256**3

    def encode_codes(self, x):
        r, g, b = (to_uint8(x).long() // self.step * self.step).unbind(1)
        return r * 256**2 + g * 256 + b

    def decode_codes(self, codes):
        return from_uint8(torch.stack((codes // 256**2, codes // 256 % 256, codes % 256), 1).to(torch.uint8))


def subject(model, folder):
    return Subject(model, OmegaConf.create(), {"model": type(model).__name__}, folder, torch.device("cpu"))


# ---- reconstruction


def test_a_lossless_tokenizer_loses_nothing(photos, network, tmp_path):
    model = Coarse(1)
    result = evaluate_reconstruction(subject(model, tmp_path), model, FolderImages(photos), Judges(network))
    assert result.metrics["PSNR"] == float("inf")
    assert result.metrics["SSIM"] == pytest.approx(1, abs=1e-6) and result.metrics["L1"] == 0
    assert result.metrics["rFD-EffLite0"] == pytest.approx(0, abs=1e-3)
    assert result.protocol["images"]["count"] == 6 and result.protocol["images"]["size"] == [32, 48]
    assert len(result.more["unreadable"]) == 1 and "bad.png" in result.more["unreadable"][0]
    assert result.metrics["codes per image"] == 32 * 48


def test_numbers_are_those_of_the_saved_images(photos, network, tmp_path):
    model, source = Coarse(32), FolderImages(photos)
    result = evaluate_reconstruction(subject(model, tmp_path), model, source, Judges(network), batch_size=4)
    pixels = source.read(range(6))[1]
    again = pixels // 32 * 32
    values = psnr(from_uint8(pixels), from_uint8(again))
    assert result.metrics["PSNR"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert result.errors["PSNR"] == pytest.approx(float(values.std()) / 6**0.5, rel=1e-5)
    sets = (FeatureStatistics.of(network(x).features) for x in (pixels, again))
    with pytest.warns(UserWarning, match="depends strongly"):
        expected = frechet_distance(*sets)
    assert result.metrics["rFD-EffLite0"] == pytest.approx(expected, rel=1e-3)
    assert "depends strongly" in result.more["notes"][0]
    colors = {tuple(color) for color in again.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert result.metrics["usage"] == pytest.approx(len(colors) / 256**3)


def test_the_sheet_shows_the_worst_first(photos, tmp_path):
    Image.new("RGB", (48, 32), (31, 31, 31)).save(photos / "worst.png")  # farthest below a step of 32
    Image.new("RGB", (48, 32), (32, 64, 0)).save(photos / "best.png")
    model = Coarse(32)
    evaluate_reconstruction(subject(model, tmp_path), model, FolderImages(photos), Judges(None))
    with Image.open(tmp_path / "evaluation" / "reconstruction.png") as image:
        sheet = np.asarray(image)
    assert sheet[10, 10].tolist() == [31, 31, 31] and sheet[10, 60].tolist() == [0, 0, 0]
    assert sheet[-10, -60].tolist() == sheet[-10, -10].tolist() == [32, 64, 0]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    model = Coarse(32)
    with pytest.raises(ValueError, match=r"none of 1 images can be read: .*bad\.png"):
        evaluate_reconstruction(subject(model, tmp_path), model, FolderImages(tmp_path), Judges(None))


def test_a_run_of_stage_1(runs, photos, capsys, tmp_path):
    assert taming(["evaluate", str(runs[0]), "-o", str(tmp_path), *SETTINGS]) == 0
    words = (*SETTINGS, "--num-images", "7")
    assert taming(["evaluate", str(runs[0]), "-o", str(tmp_path), "--images", str(photos), *words]) == 0
    own, other = read_results(tmp_path)
    assert own.protocol["images"]["kind"] == "dataset" and own.protocol["images"]["count"] == 4
    assert other.protocol["images"]["kind"] == "folder" and other.protocol["images"]["size"] == [32, 32]
    assert own.subject["batches"] == 2 and len(own.subject["sha256"]) == 64
    assert 0 < own.metrics["usage"] <= 1 and own.metrics["ST-LPIPS-VGG"] > 0
    assert not list((runs[0] / "evaluation").glob("parts-*"))
    out = capsys.readouterr()
    assert "left out: " in out.out and "bad.png" in out.out


def test_a_run_of_stage_1_has_no_samples(runs, capsys):
    assert taming(["evaluate", str(runs[0]), "--protocol", "generation"]) == 1
    assert "for which there is reconstruction, not generation" in capsys.readouterr().err


# ---- generation and likelihood


def evaluate(run, out, *words):
    assert taming(["evaluate", str(run), "-o", str(out), *SETTINGS, *words]) == 0
    return read_results(out)


def test_a_run_of_stage_2(runs, tmp_path):
    generation, likelihood = evaluate(
        runs[1], tmp_path / "out", "--save-samples", str(tmp_path / "samples.npz")
    )
    assert generation.protocol["count"] == 6 and generation.protocol["conditions"] == "balanced"
    assert generation.protocol["reference"]["images"]["count"] == 4
    assert generation.sampling == {"seed": "0"}
    assert {"gFD-EffLite0", "IS-EffLite0", "KID-EffLite0", "SWD-EffLite0"} <= set(generation.metrics)
    model = load_model(runs[1])[0]
    data = DatasetImages(load_model(runs[1])[1].data, "validation")
    x, c = model.get_xc(data.batch(range(4)))
    nll = model.nll(x, c) / 64
    assert likelihood.metrics["nats per code"] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert likelihood.protocol["likelihood"] == "exact"  # of a masked prior, which bound
    assert likelihood.metrics["bits per dim of the codes"] == pytest.approx(
        float(nll.mean()) * 64 / (32 * 32 * 3 * np.log(2)), rel=1e-5
    )
    with NpzFile(tmp_path / "samples.npz") as file:
        saved = file.array("arr_0")
    assert saved.shape == (6, 32, 32, 3)
    classes = ("--classes", "0,2,5,8,10,13")
    assert taming(["sample", "-r", str(runs[1]), "-n", "6", "-o", str(tmp_path / "png"), *classes]) == 0
    for i, pixels in enumerate(saved):  # 6 of 16 classes, in order: the same as the command's
        with Image.open(tmp_path / "png" / f"sample_{i:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)


def test_saved_samples_give_the_same_numbers(runs, tmp_path):
    samples, reference = tmp_path / "samples.npz", tmp_path / "reference.npz"
    words = ("--protocol", "generation", "--save-samples", str(samples))
    assert taming(["statistics", str(runs[1]), "--split", "validation", "-o", str(reference)]) == 0
    (own,) = evaluate(runs[1], tmp_path / "out", *words, "--reference", str(reference))
    (again,) = evaluate(samples, tmp_path / "again", "--reference", str(reference))
    for name, value in again.metrics.items():
        assert own.metrics.get(name, own.metrics.get(f"g{name}")) == pytest.approx(value, rel=1e-3), name
    assert again.protocol["reference"] == own.protocol["reference"]


def test_samples_of_another_evaluation_are_not_replaced(runs, tmp_path, capsys):
    samples = tmp_path / "samples.npz"
    words = ("--protocol", "generation", "--save-samples", str(samples))
    evaluate(runs[1], tmp_path, *words)
    before = samples.read_bytes()
    evaluate(runs[1], tmp_path, *words)  # the same again
    assert taming(["evaluate", str(runs[1]), "-o", str(tmp_path), *SETTINGS, *words, "--seed", "1"]) == 1
    assert "holds the samples of another evaluation" in capsys.readouterr().err
    assert samples.read_bytes() == before
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    words = ("--protocol", "generation", "--save-samples", str(folder))
    assert taming(["evaluate", str(runs[1]), "-o", str(tmp_path), *SETTINGS, *words]) == 1
    assert "holds other files" in capsys.readouterr().err
    (folder / "mine.txt").unlink()
    evaluate(runs[1], tmp_path, *words)
    assert len(list(folder.glob("*.png"))) == 6


def test_two_processes_give_the_numbers_of_one(runs, tmp_path, monkeypatch):
    words = ["evaluate", str(runs[1]), "--protocol", "generation", "likelihood", *SETTINGS]
    code = (
        "import sys; import taming.eval.parts as parts; from taming.cli import main; parts.PART = 2; "
        f"sys.exit(main({[*words, '-o', str(tmp_path / 'two')]}))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"RANK": rank, "WORLD_SIZE": "2"}
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(200) for process in both] == [0, 0]
    monkeypatch.setattr(parts, "PART", 2)
    assert taming([*words, "-o", str(tmp_path / "one")]) == 0
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    assert [each.metrics for each in one] == [each.metrics for each in two]
    assert len(one) == 2


def test_classes_are_balanced_or_random(runs):
    model = load_model(runs[1])[0]
    balanced = ClassConditions(model, 32)
    assert balanced.labels.bincount().tolist() == [2] * 16 and balanced.labels.tolist() == sorted(
        balanced.labels
    )
    assert ClassConditions(model, 20).labels.bincount(minlength=16).unique().tolist() == [1, 2]
    uniform = [ClassConditions(model, 1000, "uniform", seed).labels for seed in (0, 0, 1)]
    assert torch.equal(uniform[0], uniform[1]) and not torch.equal(uniform[0], uniform[2])
    assert len(uniform[0].unique()) == 16
    tokens = torch.cat([part.flatten() for part in balanced.encode([0, 31, 2])])
    assert tokens.tolist() == [0, 15, 1]


def test_rejection_keeps_the_most_certain_of_each_class(network):
    class Labels:
        labels = torch.tensor([0, 0, 1])

    log_p = torch.tensor([[-1, 0], [-2, 0], [-3, 0], [-4, 0], [0, -9], [0, -8]]).float()
    number = torch.tensor([0, 0, 1, 1, 2, 2])
    kept = _accepted({"number": number, "log_p": log_p, "pixels": torch.arange(6)}, Labels(), 2)
    assert kept["pixels"].tolist() == [0, 1, 5]
    assert Rejection(0.05, Classifier(network)).candidates == 20


def test_class_means_tell_classes_apart(network):
    colors = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]])
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    noise = torch.randint(-30, 30, (30, 3, 24, 24), generator=rng)
    images = (colors[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    features = network(images).features
    classifier = classifier_of_means(network, features[:15], labels[:15], 3)
    assert torch.equal(classifier(images[15:]).argmax(1), labels[15:])
    with pytest.raises(ValueError, match=r"none of \[2\]"):
        classifier_of_means(network, features[:2], labels[:2], 3)
    with pytest.raises(ValueError, match="knows 1000 classes and the model 3"):
        classifier_for(network, 3)
    assert classifier_for(network, 1000).means is None


def test_rejection_from_the_command(runs, tmp_path):
    words = ("--protocol", "generation", "--acceptance-rate", "0.5")
    (result,) = evaluate(runs[1], tmp_path, *words, "data.params.validation.params.length=64")
    assert result.sampling["acceptance rate"] == 0.5
    assert result.sampling["classifier"] == "class means of efflite0"


def test_residual_bits():
    """Against the sum written out, and the entropy, which no code can beat."""
    difference = torch.arange(-255, 256, dtype=torch.float64)
    for scale in (0.3, 2.0, 11.0):
        p = torch.sigmoid((difference + 0.5) / scale) - torch.sigmoid((difference - 0.5) / scale)
        counts = 1e6 * p / p.sum()
        entropy = float(torch.special.entr(p / p.sum()).sum()) / np.log(2)
        assert residual_bits(counts) == pytest.approx(entropy, abs=2e-4)
    perfect = torch.zeros(511, dtype=torch.float64)
    perfect[255] = 100
    assert residual_bits(perfect) < 1e-6


# ---- images, and bad input


def test_folders_are_compared(photos, tmp_path, capsys):
    (same,) = evaluate(photos, tmp_path / "same", "--reference", str(photos), "--num-images", "7")
    assert same.metrics["FD-EffLite0"] == pytest.approx(0, abs=1e-3)
    assert same.metrics["precision-EffLite0"] == same.metrics["recall-EffLite0"] == 1.0
    assert same.protocol["count"] == 6
    assert "bad.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{photos}"], "name a --reference"),
        (["nowhere"], "there is no such file or folder"),
        (["{photos}", "--reference", "{other}"], "statistics of 3 features, but efflite0 has 1280"),
        (
            ["{photos}", "--reference", "{foreign}"],
            "weights abcabcabcabc, but this evaluation uses efflite0 with 5793",
        ),
        (["{photos}", "--reference", "{nan}"], "not finite"),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, capsys, words, message):
    about = {"network": {"name": "Other", "sha256": "abc" * 22}, "images": {}}
    note = np.frombuffer(json.dumps(about).encode(), np.uint8)
    mean, covariance = np.zeros(1280), np.eye(1280)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "foreign.npz", mu=mean, sigma=covariance, taming=note)
    np.savez(tmp_path / "nan.npz", mu=mean * np.nan, sigma=covariance)
    names = {name: tmp_path / f"{name}.npz" for name in ("other", "foreign", "nan")} | {"photos": photos}
    assert taming(["evaluate", *(word.format(**names) for word in words), "-o", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1


def test_published_statistics_are_read(photos, tmp_path, network):
    """ADM's layout: moments and images; the file does not name its network."""
    pixels = FolderImages(photos).read(range(6))[1]
    features = network(pixels).features.double()
    np.savez(
        tmp_path / "adm.npz", mu=features.mean(0), sigma=np.cov(features.T.numpy()),
        arr_0=pixels.permute(0, 2, 3, 1).numpy(),
    )
    (result,) = evaluate(photos, tmp_path, "--reference", str(tmp_path / "adm.npz"))
    assert result.metrics["FD-EffLite0"] == pytest.approx(0, abs=1e-3)
    assert result.metrics["precision-EffLite0"] == 1.0
    assert result.protocol["reference"]["network"] == "not stated by the file"


def test_features_that_are_not_finite_name_the_image(photos, network, tmp_path, monkeypatch):
    forward = type(network).forward

    def broken(self, images):
        found = forward(self, images)
        found.features[(images == images.amax()).flatten(1).any(1)] = float("nan")
        return found

    monkeypatch.setattr(type(network), "forward", broken)
    model = Coarse(1)
    with pytest.raises(ValueError, match=r"features of \d samples are not finite, the first is sample \d"):
        evaluate_reconstruction(subject(model, tmp_path), model, FolderImages(photos), Judges(network))


# ---- models without codes

VAE = """
model:
  base_learning_rate: 1.0e-3
  target: taming.models.vae.GaussianVAE
  params: {ddconfig: {resolution: 32, in_channels: 3, ch: 8, latent_dim: 4}}
"""


def test_a_model_of_noise(tmp_path, capsys):
    yaml = write_vqgan(tmp_path)
    yaml.write_text(VAE + yaml.read_text()[yaml.read_text().index("\ndata:"):])
    run = train(yaml, tmp_path / "logs", "vae", "--max_steps", 1)
    reconstruction, generation = evaluate(run, tmp_path, "--save-samples", str(tmp_path / "samples.npz"))
    assert "usage" not in reconstruction.metrics and reconstruction.metrics["PSNR"] > 0
    assert generation.metrics["gFD-EffLite0"] > 0 and generation.protocol["conditions"] == "none"
    model = load_model(run)[0]
    expected = pixels_of(model.sample(1, image_generators(0, [3])[0]))[0].permute(1, 2, 0).numpy()
    with NpzFile(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file.array("arr_0")[3], expected)
    for words, message in ((["--top-k", "3"], "top_k is for transformers"),
                           (["--protocol", "likelihood"], "reconstruction and generation, not likelihood")):
        assert taming(["evaluate", str(run), *SETTINGS, *words]) == 1
        assert message in capsys.readouterr().err
