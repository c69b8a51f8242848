"""Say how good images are: of a run, or in a folder.

    taming evaluate logs/RUN                                 its images: protocols below
    taming evaluate logs/RUN --protocol generation -n 50000 --reference VIRTUAL_imagenet256_labeled.npz
    taming evaluate samples/ --reference photos/             two folders (or .npz files) of images

Of a tokenizer the protocol is `reconstruction`: Frechet distance of reconstructions from their images, PSNR,
SSIM, a learned distance, usage of the codebook. Of a transformer it is `generation`: Frechet distance of
samples from a reference, precision and recall, density and coverage, kernel distance; and `likelihood`: nats
per code and bits per dimension. Each result is printed, and added to RUN/evaluations.jsonl with all that its
numbers depend on. An evaluation that was interrupted goes on when it is started again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint
from taming.cli.dataset_options import add_data_source
from taming.cli.options import (
    TORCHRUN,
    add_allow,
    add_device,
    add_outdir,
    add_sampling_fields,
    one_of,
    path,
    sampling_options,
)
from taming.eval.classifiers import Classifier, classifier_for, num_classes
from taming.eval.distances import distances
from taming.eval.generation import (
    Conditions,
    Rejection,
    changed_options,
    evaluate_generation,
    make_conditions,
)
from taming.eval.likelihood import evaluate_likelihood
from taming.eval.networks import (
    FEATURE_NETWORKS,
    PERCEPTUAL_DISTANCES,
    FeatureNetwork,
    default_networks,
    load_feature_network,
    load_perceptual_distance,
)
from taming.eval.parts import Parts
from taming.eval.reconstruction import evaluate_reconstruction
from taming.eval.results import VERSION, Result, append_result, environment, table
from taming.eval.sources import DatasetImages, ImageSource, hash_of_set, open_source
from taming.eval.statistics import (
    Reference,
    features_of,
    holds_statistics,
    load_reference,
    make_reference,
    network_about,
)
from taming.eval.subject import Judges, Subject, load_subject
from taming.inference.dataset import data_section
from taming.inference.distributed import own_device, rank_and_world_size
from taming.inference.loading import why_no_images
from taming.models.autoencoder import Autoencoder
from taming.models.base import LatentGenerator
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Tokenizer
from taming.training.console import rank_zero_print
from taming.util import number

PROTOCOLS = ("reconstruction", "generation", "likelihood")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = TORCHRUN.format("evaluate")
    add = parser.add_argument
    add("target", type=path, help="run directory, checkpoint, exported folder; or a folder or .npz file of "
        "images, which are compared with --reference")
    add("--protocol", nargs="+", default=[], **one_of(*PROTOCOLS), metavar="NAME", help="reconstruction, "
        "generation, likelihood; default: the first for tokenizers, the others for transformers")
    add(
        "-n",
        "--num-images",
        type=number(int, 2),
        help="images; default: 2048 samples, all that there are of other images",
    )
    add("--images", type=path, metavar="FOLDER", help="reconstruct the images of a folder or .npz file, not "
        "those of the run's data")
    add(
        "--size",
        type=number(int, 1),
        help="resize the smaller side of images in folders to it, and crop the "
        "centre; default: the size of the model",
    )
    add("--reference", type=path, metavar="PATH", help="what samples are compared with: statistics that "
        "`taming statistics` or ADM wrote, a folder or .npz file of images; default: the run's data")
    add("--conditions", default="balanced", **one_of("balanced", "uniform", "dataset"), help="classes of the "
        "samples: as many of each, at random, or those of the data; spatial conditions are of the data")
    add("--acceptance-rate", type=number(float, 0, 1, above=True), default=1.0, help="generate more samples, "
        "and keep this share of each class, of which a classifier is most certain")
    add("--classifier", **one_of(*FEATURE_NETWORKS), help="network whose classes, or features, are that "
        "classifier's; default: --network")
    add("--save-samples", type=path, metavar="PATH", help="keep the samples: an .npz file as ADM's evaluator "
        "reads them, or a folder")
    add_networks(parser)
    add_data_source(parser)
    add_outdir(parser, "folder for evaluations.jsonl; default: the run")
    add("--batch-size", type=number(int, 1), default=32, help="images at once; changes the speed alone")
    add_device(parser)
    add_allow(parser)
    add_sampling_fields(parser)


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Add the networks that judge images."""
    add = parser.add_argument
    add(
        "--network",
        **one_of(*FEATURE_NETWORKS),
        help="whose features are compared: inception (FID), dinov2, "
        "efflite0; default: inception if its weights are found, else efflite0",
    )
    add("--weights", type=path, metavar="FILE", help="weights of the network, or a folder with them")
    add(
        "--perceptual",
        **one_of(*PERCEPTUAL_DISTANCES),
        help="learned distance of two images; default: lpips if its weights are found, else st-lpips-vgg",
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate, print, and add the results to the file."""
    if is_run(options.target):
        subject = load_subject(options.target, device=options.device)
        results = evaluate_run(subject, options)
        folder = options.outdir or subject.run
    else:
        results, folder = [evaluate_images(options)], options.outdir
    if rank_and_world_size()[0] != 0:
        return
    for result in filter(None, results):
        print(f"\n{result.protocol['name']}" + (f" ({result.label})" if result.label else ""))
        print(table({"": result}))
        for line in result.more.get("notes", []):
            print(f"note: {line}")
        for line in result.more.get("unreadable", []):
            print(f"left out: {line}")
        if folder is None:
            print(result.to_json())
        else:
            print(f"in {append_result(result, folder)}")


def is_run(target: Path) -> bool:
    """Tell a run or checkpoint from images.

    Raises:
        FileNotFoundError: there is nothing at that place.
    """
    if not target.exists():
        raise FileNotFoundError(f"{target}: there is no such file or folder")
    if target.suffix == ".npz":
        return False
    try:
        find_checkpoint(target)
    except FileNotFoundError:
        return False
    return True


def evaluate_run(subject: Subject, options: argparse.Namespace) -> list[Result | None]:
    """Evaluate a model by the protocols that are asked for, or that fit it."""
    model = subject.model
    possible = possible_protocols(model)
    if not possible:  # a network that is published alone
        raise ValueError(f"{options.target} is a {type(model).__name__}: {why_no_images(model)}")
    protocols = options.protocol or possible[-2:]  # of transformers not the first, which is their tokenizer's
    if wrong := [name for name in protocols if name not in possible]:
        raise ValueError(
            f"{options.target} is a {type(model).__name__}, for which there is "
            f"{' and '.join(possible)}, not {wrong[0]}"
        )
    results: list[Result | None] = []
    is_prior = isinstance(model, Net2NetTransformer)
    first_stage = model.first_stage_model if is_prior else model
    key = model.first_stage_key if is_prior else model.image_key
    if "reconstruction" in protocols:
        judges = load_judges(options, subject.device, perceptual=True)
        size = options.size or first_stage.resolution
        source = open_source(options.images, size, options.num_images) if options.images else \
            data_images(subject.config, options, key, options.num_images)
        announce("reconstruction", len(source), judges)
        reference, parts = None, list[Parts]()
        if options.reference is not None and judges.network is not None:
            reference, parts = make_or_load_reference(
                options, judges.network, subject.folder, subject.device, None, size
            )
        results.append(evaluate_reconstruction(
            subject, first_stage, source, judges, batch_size=options.batch_size, reference=reference,
        ))
        remove(parts)
    if "generation" in protocols:
        results += evaluate_samples(subject, options, key)
    if "likelihood" in protocols:
        source = data_images(subject.config, options, key, options.num_images)
        rank_zero_print(f"likelihood of {len(source)} images")
        results.append(evaluate_likelihood(subject, source, batch_size=options.batch_size))
    return results


def possible_protocols(model: Any) -> list[str]:
    """Return the protocols that fit a model."""
    if isinstance(model, Net2NetTransformer):
        return ["reconstruction", "generation", "likelihood"]
    is_first_stage = isinstance(model, Tokenizer | Autoencoder)
    is_generator = isinstance(model, LatentGenerator)
    return ["reconstruction"] * is_first_stage + ["generation"] * is_generator


def evaluate_samples(subject: Subject, options: argparse.Namespace, key: str) -> list[Result | None]:
    """Evaluate samples with guidance 1, and, where another is given, with that as well."""
    model, count = subject.model, options.num_images or 2048
    sampling = sampling_options(options)
    if isinstance(model, LatentGenerator):
        if changed := [name for name in changed_options(sampling) if name != "seed"]:
            raise ValueError(f"{changed[0]} is for transformers, not for {type(model).__name__}")
    else:
        model.check_options(sampling)
    judges = load_judges(options, subject.device)
    network = judges.network
    assert network is not None
    data = None
    if options.reference is None or options.conditions == "dataset" or needs_data(model):
        data = data_images(subject.config, options, key, None)
    conditions = make_conditions(model, count, options.conditions, data, sampling.seed or 0)
    of_size: Any = model if isinstance(model, LatentGenerator) else model.first_stage_model
    size = options.size or of_size.resolution
    reference, parts = make_or_load_reference(options, network, subject.folder, subject.device, data, size)
    rejection = None
    if options.acceptance_rate < 1:
        rejection = Rejection(
            options.acceptance_rate, make_classifier(subject, options, network, conditions, key)
        )
    announce("generation", count, judges)
    results = []
    for guidance in dict.fromkeys((1.0, sampling.guidance)):
        results.append(evaluate_generation(
            subject, reference, conditions, judges, sampling.replace(guidance=guidance), count=count,
            batch_size=options.batch_size, rejection=rejection,
            save_to=options.save_samples if guidance == sampling.guidance else None,
        ))
    remove(parts)
    return results


def evaluate_images(options: argparse.Namespace) -> Result | None:
    """Compare the images of two places."""
    if options.reference is None:
        raise ValueError(
            f"{options.target} holds no checkpoint: for images, name a --reference to compare with"
        )
    started, device = time.time(), own_device(options.device)
    judges = load_judges(options, device)
    network = judges.network
    assert network is not None
    source = open_source(options.target, options.size, options.num_images)
    folder = (options.outdir or Path()) / "evaluation"
    announce("images", len(source), judges)
    reference, parts = make_or_load_reference(options, network, folder, device, None, options.size)
    measured, found = features_of(
        source, network, folder, batch_size=options.batch_size, device=device, what="images"
    )
    if rank_and_world_size()[0] != 0:
        return None
    assert reference is not None
    metrics, used, notes = distances(reference, measured, network)
    remove([*parts, found])
    return Result(
        protocol={
            "name": "images",
            "version": VERSION,
            "network": network_about(network),
            "distances": used,
            "reference": reference.about,
            "resize": source.describe()["resize"],
            "count": len(measured["features"]),
        },
        metrics=metrics,
        subject={"images": options.target.name, "sha256": hash_of_set(measured["hash"])},
        more=environment(started, device)
        | {"notes": notes, "unreadable": source.why_left_out(measured["bad"])},
    )


# ---- what an evaluation needs


def load_judges(options: argparse.Namespace, device: torch.device, *, perceptual: bool = False) -> Judges:
    """Load the networks that are asked for, or those that are there."""
    network, distance = default_networks()
    return Judges(
        load_feature_network(options.network or network, options.weights, device),
        load_perceptual_distance(options.perceptual or distance, device=device) if perceptual else None,
    )


def remove(parts: list[Parts]) -> None:
    """Remove what was kept until the result was there."""
    for each in parts if rank_and_world_size()[0] == 0 else []:
        each.remove()


def announce(protocol: str, count: int, judges: Judges) -> None:
    """Say what will be done, and by which networks."""
    names = [f"{each.name} ({each.sha256[:12]})" for each in (judges.network, judges.perceptual) if each]
    rank_zero_print(f"{protocol} of {count} images by {' and '.join(names)}")


def data_images(
    config: DictConfig, options: argparse.Namespace, key: str, limit: int | None
) -> DatasetImages:
    """Return the images of the run's data, or of others that the options name."""
    section = data_section(
        config.copy(), options.base, options.overrides, ignore_base_data=options.ignore_base_data
    )
    return DatasetImages(section, options.split, key, limit=limit)


def needs_data(model: Net2NetTransformer | LatentGenerator) -> bool:
    """Tell whether conditions of the model can come from a data set only."""
    if isinstance(model, LatentGenerator):
        return False
    return any(stage.kind not in ("class", "none", "coordinates") for stage in model.cond_stages)


def make_or_load_reference(
    options: argparse.Namespace, network: FeatureNetwork, folder: Path, device: torch.device,
    data: ImageSource | None, size: int | None,
) -> tuple[Reference | None, list[Parts]]:
    """Return the reference that is named, or the data; and parts to remove in the end.

    Processes other than the first need none, and may get None.
    """
    given = options.reference
    if given is not None and holds_statistics(given):
        return load_reference(given, network, folder, batch_size=options.batch_size, device=device)
    source = data if given is None else open_source(given, size if given.is_dir() else None)
    assert source is not None
    measured, parts = features_of(source, network, folder, batch_size=options.batch_size, device=device)
    return make_reference(measured, source, network) if measured else None, [parts]


def make_classifier(
    subject: Subject, options: argparse.Namespace, network: FeatureNetwork, conditions: Conditions, key: str
) -> Classifier:
    """Return the classifier of rejection sampling."""
    if conditions.labels is None:
        raise ValueError("--acceptance-rate: the model has no classes that a classifier could tell")
    kinds = [stage.kind for stage in subject.model.cond_stages]
    place = kinds.index("class")
    classes = subject.model.cond_stages[place].vocab_size
    if options.classifier not in (None, network.name):
        network = load_feature_network(options.classifier, device=subject.device)
    data = None if num_classes(network) == classes else data_images(subject.config, options, key, None)
    return classifier_for(
        network, classes, data, subject.model.cond_keys[place], batch_size=options.batch_size,
        device=subject.device,
    )
