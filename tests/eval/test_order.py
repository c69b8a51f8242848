"""The metrics order sets of images as people would: clean, compressed, blurred, of another kind."""

import io

import pytest
import torch
from PIL import Image

from taming.data.landscapes import Landscapes
from taming.eval.distances import distances
from taming.eval.networks import load_feature_network, load_perceptual_distance
from taming.eval.statistics import Reference
from taming.images import from_uint8, to_pil, to_uint8
from taming.metrics import FeatureStatistics

COUNT = 96  # images of each set
TIMES = 4  # classes of a biome, by the time of day


@pytest.fixture(scope="module")
def biomes():
    """Images, uint8 (2 * COUNT, 3, 64, 64), of the first and the last biome."""
    data = Landscapes(64, length=1600, split="train", keys=["image", "class_label"])
    found = {0: [], 3: []}
    for i in range(len(data)):
        item = data[i]
        biome = int(item["class_label"]) // TIMES
        if biome in found and len(found[biome]) < 2 * COUNT:
            found[biome].append(to_uint8(torch.as_tensor(item["image"]).permute(2, 0, 1)))
        if all(len(images) == 2 * COUNT for images in found.values()):
            break
    return [torch.stack(images) for images in found.values()]


def compressed(image):
    stream = io.BytesIO()
    to_pil(from_uint8(image)).save(stream, "JPEG", quality=10)
    with Image.open(stream) as again:
        return torch.from_numpy(__import__("numpy").array(again)).permute(2, 0, 1)


def blurred(images):
    small = torch.nn.functional.avg_pool2d(images.float(), 4)
    return torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear").round().to(torch.uint8)


@pytest.mark.slow
def test_distances_grow_with_the_damage(biomes):
    network = load_feature_network("efflite0")
    (real, clean), other = biomes[0].split(COUNT), biomes[1][:COUNT]
    features = network(real).features
    reference = Reference(FeatureStatistics.of(features), features=features)
    sets = [clean, torch.stack([compressed(image) for image in clean]), blurred(clean), other]
    found = [distances(reference, {"features": network(images).features}, network)[0] for images in sets]
    for name in ("FD-EffLite0", "KID-EffLite0", "SWD-EffLite0"):
        values = [metrics[name] for metrics in found]
        print(name, values)
    for name in ("FD-EffLite0", "KID-EffLite0", "SWD-EffLite0"):
        values = [metrics[name] for metrics in found]
        assert values == sorted(values), (name, values)
    coverage = [metrics["coverage-EffLite0"] for metrics in found]
    assert coverage == sorted(coverage, reverse=True) and coverage[0] > 0.5 > coverage[-1]


@pytest.mark.slow
def test_a_learned_distance_grows_with_the_damage(biomes):
    distance = load_perceptual_distance("st-lpips-vgg")
    clean, other = biomes[0][:24], biomes[1][:24]
    sets = [clean, torch.stack([compressed(image) for image in clean]), blurred(clean), other]
    values = [float(distance(from_uint8(clean), from_uint8(images)).mean()) for images in sets]
    print(values)
    assert values[0] == 0 and values == sorted(values)
