"""The callback that judges models during training: its numbers, and checkpoints ranked by them."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from taming.checkpoint import load_model
from taming.config import find_config, load_config
from taming.eval.networks import load_feature_network
from taming.eval.sources import DatasetImages, pixels_of
from taming.images import from_uint8
from taming.metrics import FeatureStatistics, frechet_distance
from taming.sampling import image_generators
from taming.training.command import main
from tests.ranks import main_on_ranks
from tests.tiny import curves, resume, train, write_transformer, write_vqgan

CALLBACK = "lightning.callbacks.evaluation"
EVALUATION = (
    f"{CALLBACK}.target=taming.training.callbacks.Evaluation", f"{CALLBACK}.params.network=efflite0",
    f"{CALLBACK}.params.num_images=3",
)


def distance(images, made):
    network = load_feature_network("efflite0")
    sets = [FeatureStatistics.of(network(pixels_of(x)).features) for x in (images, made)]
    with pytest.warns(UserWarning):
        return frechet_distance(*sets)


def logged(run, name):
    return [float(row[name]) for row in curves(run) if name in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = (*EVALUATION, "lightning.modelcheckpoint.params.monitor=val/rfd")
    vqgan = train(write_vqgan(folder), folder / "logs", "vqgan", "--max_epochs", 2, *words)
    words = (*EVALUATION, f"{CALLBACK}.params.every_n_validations=2", f"{CALLBACK}.params.seed=5")
    yaml = write_transformer(folder, vqgan)
    return vqgan, train(yaml, folder / "logs", "transformer", "--max_epochs", 2, *words)


def test_reconstructions_are_judged_and_checkpoints_ranked(runs):
    values = logged(runs[0], "val/rfd")
    assert len(values) == 2
    kept = sorted((runs[0] / "checkpoints").glob("epoch=*rfd=*.ckpt"))
    assert [file.stem.split("rfd=")[1] for file in kept] == [f"{value:.4f}" for value in values]
    model, config, _ = load_model(runs[0])
    pixels = DatasetImages(config.data, "validation").read(range(3))[1]
    x = from_uint8(pixels)
    with torch.no_grad():
        made = model.decode_codes(model.encode_codes(x))
    assert values[1] == pytest.approx(distance(x, made), rel=1e-3)


@pytest.mark.slow
def test_two_processes_judge_all_images_together(tmp_path):
    words = (*EVALUATION, f"{CALLBACK}.params.num_images=4", "data.params.batch_size=1", "--max_epochs", 1)
    main_on_ranks(2, "-b", write_vqgan(tmp_path), "-t", "-l", tmp_path / "logs", "-n", "two", *words)
    (run,) = (tmp_path / "logs").glob("*_two")
    model, config, _ = load_model(run)
    x = from_uint8(DatasetImages(config.data, "validation").read(range(4))[1])
    with torch.no_grad():
        made = model.decode_codes(model.encode_codes(x))
    assert logged(run, "val/rfd") == [pytest.approx(distance(x, made), rel=1e-3)]


def test_samples_are_judged_with_random_numbers_of_their_own(runs):
    values = logged(runs[1], "val/gfd")
    assert len(values) == 1  # every second validation
    model, config, _ = load_model(runs[1])
    x, c = model.get_xc(DatasetImages(config.data, "validation").batch(range(3)))
    conditions = model.encode_conditions(c)
    parts = [
        model.generate([each[rows] for each in conditions], generator=image_generators(5, range(3)[rows]))
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert values[0] == pytest.approx(distance(x, torch.cat(parts)), rel=1e-3)


def test_training_is_the_same_without_it(runs, tmp_path):
    plain = train(write_vqgan(tmp_path), tmp_path / "logs", "plain", "--max_epochs", 2)
    a, b = (load_model(run)[0].state_dict() for run in (runs[0], plain))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_count_of_validations_goes_on(runs, tmp_path):
    words = (*EVALUATION, f"{CALLBACK}.params.every_n_validations=2")
    run = train(write_vqgan(tmp_path), tmp_path / "logs", "part", "--max_epochs", 1, *words)
    assert logged(run, "val/rfd") == []
    resume(run, "--max_epochs", 2)
    assert logged(run, "val/rfd") == pytest.approx(logged(runs[0], "val/rfd")[1:])


@pytest.mark.parametrize(("word", "message"), [
    (f"{CALLBACK}.params.network=inceptoin", "no network for features 'inceptoin'"),
    (f"{CALLBACK}.params.num_images=0", "num_images"),
    (f"{CALLBACK}.params.weights=nowhere.pth", "nowhere.pth"),
    ("lightning.modelcheckpoint.params.monitor=val/rdf", "did you mean val/rfd"),
])
def test_wrong_values_end_before_the_first_batch(tmp_path, capsys, word, message):
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs"), *EVALUATION, word]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert message in printed.err and "trained for" not in printed.out
    assert not (tmp_path / "logs").exists()


def test_a_distance_needs_two_images(tmp_path, caplog):
    run = train(
        write_vqgan(tmp_path), tmp_path / "logs", "one", "--max_epochs", 1, *EVALUATION,
        f"{CALLBACK}.params.num_images=1",
    )
    assert logged(run, "val/rfd") == [] and "no distance" in caplog.text
    assert all(math.isfinite(value) for value in logged(run, "val/rec_loss"))


def test_a_gan_is_judged_by_samples(tmp_path):
    config = load_config([find_config("transgan/transgan_landscapes")])
    config.model.params.generator.update({"dim": 32, "depths": [1, 1, 1], "latent_dim": 4})
    config.model.params.discriminator.update({"dim": 16, "depth": 1})
    for split, length in (("train", 32), ("validation", 4)):
        config.data.params[split].params.length = length
    OmegaConf.save(config, tmp_path / "gan.yaml")
    yaml = tmp_path / "gan.yaml"
    run = train(yaml, tmp_path / "logs", "gan", "--max_epochs", 1, "--max_steps", 2, *EVALUATION)
    model, config, _ = load_model(run)
    x = from_uint8(DatasetImages(config.data, "validation").read(range(3))[1])
    made = torch.cat([model.sample(1, each) for each in image_generators(0, range(3))])
    assert logged(run, "val/gfd") == [pytest.approx(distance(x, made), rel=1e-2)]
