"""Parity with the evaluator of ADM (Dhariwal and Nichol 2021), where its files are.

TAMING_ADM_FILES names a folder with FILES and the weights of FID's Inception. The 60,000 images take minutes
on a GPU, and hours without one.
"""

import os
from pathlib import Path

import pytest
import torch

from taming.eval.distances import distances
from taming.eval.networks import InceptionFeatures, load_feature_network
from taming.eval.sources import NpzImages
from taming.eval.statistics import features_of, load_reference

REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
SAMPLES = "admnet_guided_upsampled_imagenet256.npz"
FILES = (REFERENCE, SAMPLES)
VARIABLE = "TAMING_ADM_FILES"

# As the README of guided-diffusion has them, and how far a port of its TensorFlow graph may be away: a public
# one in torch has 215.9764, 3.94103, 6.14049, 0.82548 and 0.5285
PUBLISHED = {
    "IS": (215.8370, 0.3),
    "FID": (3.94256, 0.003),
    "sFID": (6.14043, 0.003),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.004),
}


def missing() -> str:
    """Say which files are not there; empty if all are."""
    folder = Path(os.environ.get(VARIABLE, ""))
    absent = [name for name in FILES if VARIABLE not in os.environ or not (folder / name).is_file()]
    names = InceptionFeatures.weights.names
    if VARIABLE not in os.environ or not any((folder / name).is_file() for name in names):
        absent.append(" or ".join(names))
    return ", ".join(absent)


def measure(folder: Path, root: Path) -> dict[str, float]:
    """Compare the samples with the reference, as `taming evaluate` does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_feature_network("inception", folder, device)
    reference, _ = load_reference(
        folder / REFERENCE, network, root / "reference", batch_size=64, device=device
    )
    samples, _ = features_of(
        NpzImages(folder / SAMPLES), network, root / "samples", batch_size=64, device=device
    )
    return distances(reference, samples, network)[0]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"set {VARIABLE} to a folder with {missing()}")
def test_the_numbers_are_those_of_the_evaluator_of_adm(tmp_path):
    found = measure(Path(os.environ[VARIABLE]), tmp_path)
    for name, (value, tolerance) in PUBLISHED.items():
        assert found[name] == pytest.approx(value, abs=tolerance), name
