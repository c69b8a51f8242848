"""The metrics order sets of images as people would: clean, compressed, blurred, of another kind."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from taming.data.landscapes import Landscapes
from taming.eval.distances import distances
from taming.eval.networks import load_feature_network, load_perceptual_distance
from taming.eval.statistics import Reference
from taming.images import from_uint8, to_uint8
from taming.metrics import FeatureStatistics

SIZE, COUNT = 192, 64  # pixels, images of each set
TIMES = 4  # classes of a biome, by the time of day


@pytest.fixture(scope="module")
def sets():
    """Sets of uint8 (COUNT, 3, SIZE, SIZE): of the first biome twice, with damage, and of the last biome."""
    labels = Landscapes(32, length=1600, split="train", keys=["class_label"])
    images = Landscapes(SIZE, length=1600, split="train", keys=["image"])
    biomes = [int(labels[i]["class_label"]) // TIMES for i in range(800)]
    first = [i for i, biome in enumerate(biomes) if biome == 0][: 2 * COUNT]
    last = [i for i, biome in enumerate(biomes) if biome == 3][:COUNT]
    real, clean, other = (
        torch.stack([to_uint8(torch.as_tensor(images[i]["image"])).permute(2, 0, 1) for i in numbers])
        for numbers in (first[:COUNT], first[COUNT:], last)
    )
    assert len(real) == len(clean) == len(other) == COUNT
    damaged = {"JPEG": compressed(clean), "blurred": blurred(clean)}
    return {"real": real, "clean": clean, **damaged, "other": other}


def compressed(images):
    """Save as JPEG files of quality 10."""
    found = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=10)
        with Image.open(stream) as again:
            found.append(torch.from_numpy(np.array(again)).permute(2, 0, 1))
    return torch.stack(found)


def blurred(images):
    """Average over 4x4 pixels, and interpolate."""
    small = F.avg_pool2d(images.float(), 4)
    return F.interpolate(small, scale_factor=4, mode="bilinear").round().to(torch.uint8)


@pytest.mark.slow
def test_distances_grow_with_the_damage(sets):
    network = load_feature_network("efflite0")
    real = network(sets["real"]).features
    reference = Reference(FeatureStatistics.of(real), features=real)
    found = [
        distances(reference, {"features": network(sets[name]).features}, network)[0]
        for name in ("clean", "JPEG", "blurred", "other")
    ]
    for name in ("FD-EffLite0", "KID-EffLite0", "SWD-EffLite0"):
        values = [metrics[name] for metrics in found]
        print(name, *(f"{value:.4g}" for value in values))
        assert values == sorted(values), (name, values)
    assert found[0]["coverage-EffLite0"] > 0.8 and found[3]["coverage-EffLite0"] < 0.1
    assert found[0]["precision-EffLite0"] > 0.7 and found[3]["precision-EffLite0"] < 0.1


@pytest.mark.slow
def test_a_learned_distance_grows_with_the_damage(sets):
    distance = load_perceptual_distance("st-lpips-vgg")
    clean = from_uint8(sets["clean"][:12])
    values = [
        float(distance(clean, from_uint8(sets[name][:12])).mean())
        for name in ("clean", "JPEG", "blurred", "other")
    ]
    print("ST-LPIPS-VGG", *(f"{value:.4g}" for value in values))
    assert values[0] == 0 and values == sorted(values), values
