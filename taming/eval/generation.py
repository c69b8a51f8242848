"""How good generated images are: the protocol `generation`.

Images are sampled, decoded and rounded to 8 bits as they would be saved, and compared with a reference by the
features of a network. Sample i of a seed is the same image whatever batch, order and number of processes.
N images, K classes, B batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming.eval.classifiers import Classifier
from taming.eval.distances import DistanceSettings, distances
from taming.eval.npz import NpzFile, write_images
from taming.eval.parts import Measured, Parts, joined
from taming.eval.results import VERSION, Result, environment
from taming.eval.sources import DatasetImages, pixels_of
from taming.eval.statistics import Reference, measure_features, network_about
from taming.eval.subject import Judges, Subject
from taming.images import from_uint8, save_png
from taming.inference.distributed import rank_and_world_size
from taming.inference.loading import decode
from taming.inference.provenance import digest, options_metadata
from taming.models.base import LatentGenerator
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import conditions_of, stage_of_kind
from taming.sampling import SamplingOptions, image_generators
from taming.util import atomic_write

NOTE = "taming"  # an array beside the images of an .npz file: how they were made


class CodeSamples:
    """Samples of a transformer; subclasses say which conditions they have."""

    model: Net2NetTransformer

    def encode(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the conditions of images, as `sample_codes` takes them."""
        raise NotImplementedError

    def sample(self, numbers: Sequence[int], seeds: Sequence[int], options: SamplingOptions) -> Tensor:
        """Generate images (B, C, H, W), of these numbers; each has random numbers of its own seed."""
        codes = self.model.sample_codes(
            self.encode(numbers), options, generator=image_generators(options.seed or 0, seeds)
        )
        return decode(self.model, codes)


class ClassConditions(CodeSamples):
    """Conditions of N images: class numbers, or none where the model has no condition that must be given.

    Args:
        model: the transformer.
        count: images N.
        how: "balanced": as many images of each class, in the order of the classes, some get one more where K
            does not divide N; "uniform": classes at random, by a seed.
        seed: of "uniform".
    """

    def __init__(self, model: Net2NetTransformer, count: int, how: str = "balanced", seed: int = 0):
        self.model, self.how = model, how
        stage = stage_of_kind(model, "class")
        self.labels: Tensor | None = None
        if stage is not None and stage.vocab_size is not None:
            generator = torch.Generator().manual_seed(seed)
            number = torch.arange(count)
            uniform = torch.randint(stage.vocab_size, (count,), generator=generator)
            self.labels = number * stage.vocab_size // count if how == "balanced" else uniform
        conditions_of(model, 1, given=self._given([0]))  # errors come before anything is computed

    def _given(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {} if self.labels is None else {"class": self.labels[list(numbers)].tolist()}

    def encode(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return classes, or what needs not be given."""
        return conditions_of(self.model, len(numbers), given=self._given(numbers))

    def describe(self) -> str:
        """Say how classes are chosen."""
        return "none" if self.labels is None else self.how


class DatasetConditions(CodeSamples):
    """Conditions of the items of a data set, in their order, again from the first after the last.

    Args:
        model: the transformer.
        dataset: its items hold the conditions.
    """

    labels: Tensor | None = None

    def __init__(self, model: Net2NetTransformer, dataset: DatasetImages):
        self.model, self.dataset = model, dataset

    @torch.no_grad()
    def encode(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the conditions of items of the data set."""
        batch = self.dataset.batch([number % len(self.dataset) for number in numbers])
        _, c = self.model.get_xc(batch)
        each = [c] if isinstance(c, Tensor) else c
        return self.model.encode_conditions([value.to(self.model.device) for value in each])

    def describe(self) -> dict[str, Any]:
        """Describe the data."""
        return self.dataset.describe()


class NoiseSamples:
    """Samples of a model without conditions and codes, whose images are functions of noise."""

    labels: Tensor | None = None

    def __init__(self, model: LatentGenerator):
        self.model = model

    def sample(self, numbers: Sequence[int], seeds: Sequence[int], options: SamplingOptions) -> Tensor:
        """Generate images (B, C, H, W); each has random numbers of its own."""
        generators = image_generators(options.seed or 0, seeds)
        return torch.cat([self.model.sample(1, generator) for generator in generators])

    def describe(self) -> str:
        """Say that there are none."""
        return "none"


Conditions = ClassConditions | DatasetConditions | NoiseSamples


@dataclass(frozen=True)
class Rejection:
    """Keep the samples that a classifier is most certain about (Razavi et al. 2019, section 3.4).

    Of the candidates for the images of one class within a part (`taming.eval.parts.PART` images), those with
    the highest probability of that class are kept.

    Attributes:
        rate: share that is kept, in (0, 1].
        classifier: gives the probability of classes.
    """

    rate: float
    classifier: Classifier

    @property
    def candidates(self) -> int:
        """Samples for each image that is kept."""
        return max(1, round(1 / self.rate))


def make_conditions(
    model: Net2NetTransformer | LatentGenerator, count: int, how: str, dataset: DatasetImages | None,
    seed: int = 0,
) -> Conditions:
    """Choose conditions: of classes, if that is all that the model has to be given; else those of a data set.

    Args:
        model: a transformer, or a model that turns noise into images.
        count: images N.
        how: "balanced" or "uniform" (see ClassConditions), "dataset" for those of the data; None chooses.

    Raises:
        ValueError: conditions of a data set are needed, and there is none.
    """
    if isinstance(model, LatentGenerator):
        return NoiseSamples(model)
    if how != "dataset" and all(
        stage.kind in ("class", "none", "coordinates") for stage in model.cond_stages
    ):
        return ClassConditions(model, count, how, seed)
    if dataset is None:
        raise ValueError(
            "the conditions of the model come from a data set: give the run's data, or others (-b)"
        )
    return DatasetConditions(model, dataset)


def evaluate_generation(
    subject: Subject,
    reference: Reference | None,
    conditions: Conditions,
    judges: Judges,
    options: SamplingOptions,
    *,
    count: int,
    batch_size: int = 32,
    settings: DistanceSettings | None = None,
    rejection: Rejection | None = None,
    save_to: Path | None = None,
) -> Result | None:
    """Generate images and compare them with a reference; return the result, in the first process alone.

    Args:
        subject: a transformer.
        reference: what is compared with; processes other than the first need none.
        conditions: of the images.
        judges: the network whose features are compared.
        options: how to sample; `seed` None stands for 0.
        count: images N.
        batch_size: images at once.
        settings: of the distances.
        rejection: keep the best of more samples.
        save_to: an .npz file as ADM's evaluator takes them, or a folder for PNG files.

    Raises:
        ValueError: an option or a reference that does not fit; a file at `save_to` of another evaluation.
    """
    started, judges = time.time(), judges.to(subject.device)
    network = judges.network
    assert network is not None
    options = options.replace(seed=options.seed or 0)
    sampling = changed_options(options) | (
        {}
        if rejection is None
        else {"acceptance rate": rejection.rate, "classifier": rejection.classifier.name}
    )
    protocol = {
        "name": "generation", "version": VERSION, "rounding": "nearest 8-bit", "count": count,
        "conditions": conditions.describe(), "network": network_about(network),
    }
    identity = {
        "protocol": protocol, "sampling": sampling,
        "subject": subject.about, "saved": save_to is not None,
    }
    if save_to is not None:
        check_saved(save_to, identity)
    parts = Parts(subject.folder, identity, count)

    def compute(numbers: list[int]) -> Measured:
        return _generate(
            subject, conditions, judges, options, numbers, batch_size, rejection, save_to is not None
        )

    parts.measure(compute, "samples")
    if rank_and_world_size()[0] != 0:
        return None
    measured = parts.collect("features", "spatial", "logits")
    assert reference is not None
    metrics, used, notes = distances(reference, measured, network, settings)
    if save_to is not None:
        _save(parts, save_to, identity)
    parts.remove()
    return Result(
        protocol | {"reference": reference.about, "distances": used},
        {f"g{k}" if k.startswith(("F", "sF")) else k: v for k, v in metrics.items()},
        subject=subject.about,
        sampling=sampling,
        more=environment(started, subject.device) | {"notes": notes},
    )


def changed_options(options: SamplingOptions) -> dict[str, Any]:
    """Return the options that are not the defaults; the seed always."""
    defaults, values = options_metadata(SamplingOptions()), options_metadata(options)
    return {name: value for name, value in values.items() if value != defaults[name] or name == "seed"}


@torch.inference_mode()
def _generate(
    subject: Subject, conditions: Conditions, judges: Judges, options: SamplingOptions, numbers: list[int],
    batch_size: int, rejection: Rejection | None, keep_images: bool,
) -> Measured:
    """Generate the images of a part and measure them."""
    each = 1 if rejection is None else rejection.candidates
    candidates = [(number, number * each + j) for number in numbers for j in range(each)]
    found: list[Measured] = []
    for start in range(0, len(candidates), batch_size):
        chosen, seeds = zip(*candidates[start : start + batch_size], strict=True)
        pixels = pixels_of(conditions.sample(chosen, seeds, options).cpu())
        found.append({"pixels": pixels, "number": torch.tensor(chosen)})
        if rejection is not None:
            found[-1]["log_p"] = rejection.classifier(pixels.to(subject.device)).log_softmax(1)
    samples = joined(found)
    if rejection is not None:
        samples = _accepted(samples, conditions, each)
    assert judges.network is not None
    measured = [
        measure_features(judges.network, pixels.to(subject.device))
        for pixels in samples["pixels"].split(batch_size)
    ]
    return joined(measured) | ({"pixels": samples["pixels"]} if keep_images else {})


def _accepted(samples: Measured, conditions: Conditions, each: int) -> Measured:
    """Keep one of `each` candidates: of every class, those with the highest probability of it."""
    if conditions.labels is None:
        raise ValueError(
            "rejection sampling needs a model conditioned on classes, and classes not of a data set"
        )
    labels = conditions.labels[samples["number"]]
    kept = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        certainty = samples["log_p"][rows, label]
        kept.append(rows[certainty.topk(len(rows) // each).indices])
    order = torch.cat(kept).sort().values
    return {name: values[order] for name, values in samples.items()}


# ---- images that are kept


def check_saved(path: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError if something is at `path` that another evaluation, or something else, wrote."""
    if path.suffix != ".npz":
        if path.is_file():
            raise ValueError(f"{path} is a file: name a folder for PNG files, or a file that ends in .npz")
        mark = path / ".evaluation"
        if path.is_dir() and any(path.iterdir()) and not (
            mark.is_file() and mark.read_text(encoding="utf-8").strip() == digest(str(identity))
        ):
            raise ValueError(f"{path} holds other files: name another folder for the samples")
    elif path.exists():
        with NpzFile(path) as file:
            mine = NOTE in file.names and file.array(NOTE).tobytes().decode(errors="replace")
        if mine != digest(str(identity)):
            raise ValueError(f"{path} exists and holds the samples of another evaluation: name another file")


def _save(parts: Parts, path: Path, identity: dict[str, Any]) -> None:
    mark = digest(str(identity))
    if path.suffix != ".npz":
        path.mkdir(parents=True, exist_ok=True)
        (path / ".evaluation").write_text(mark, encoding="utf-8")
        number = 0
        for part in parts:
            for pixels in part.array("pixels"):
                save_png(from_uint8(torch.from_numpy(pixels)), path / f"{number:06d}.png")
                number += 1
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with NpzFile(parts.path(0)) as first:
        height, width = first.mapped("pixels").shape[2:]
    with atomic_write(path) as partial:
        images = (part.array("pixels").transpose(0, 2, 3, 1) for part in parts)
        note = np.frombuffer(mark.encode(), np.uint8)
        write_images(partial, images, (parts.count, height, width, 3), {NOTE: note})
