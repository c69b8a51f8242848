"""Write the statistics of a set of images, to evaluate against.

    taming statistics photos/ --size 256 -o photos.npz
    taming statistics configs/landscapes/landscapes_vqgan.yaml --split train -o landscapes.npz

The file holds mean and covariance of the features of a network, as ADM's files do, the features of up to
10,000 images for precision and recall, and the network, its weights' hash, and how images were resized.
"""

import argparse
from pathlib import Path

from omegaconf import DictConfig

from taming.checkpoint import config_of, find_checkpoint, read_checkpoint
from taming.cli.dataset_options import add_data_source
from taming.cli.evaluate import add_networks, data_images, is_run, load_judges
from taming.cli.options import TORCHRUN, add_allow, add_device, add_outdir
from taming.config import find_config, load_config
from taming.eval.sources import ImageSource, open_source
from taming.eval.statistics import features_of, make_reference, save_reference
from taming.inference.distributed import own_device, rank_and_world_size
from taming.training.console import rank_zero_print
from taming.util import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = TORCHRUN.format("statistics")
    add = parser.add_argument
    add("target", help="folder or .npz file of images, configuration (a file or a name), or run")
    add_outdir(parser, "file to write, NAME.npz", metavar="FILE", required=True)
    add(
        "--size",
        type=number(int, 1),
        help="resize the smaller side of images in folders to it, and crop the centre; default: none",
    )
    add("-n", "--num-images", type=number(int, 2), help="take that many, from the first; default: all")
    add_networks(parser)
    add_data_source(parser)
    add("--batch-size", type=number(int, 1), default=32, help="images at once; changes the speed alone")
    add_device(parser)
    add_allow(parser)


def run(options: argparse.Namespace) -> None:
    """Extract features and write the file."""
    if options.outdir.suffix != ".npz":
        raise ValueError(f"-o {options.outdir}: the file is an .npz file: choose a name that ends in .npz")
    device = own_device(options.device)
    network = load_judges(options, device).network
    assert network is not None
    source = find_source(options)
    folder = options.outdir.absolute().parent
    rank_zero_print(f"{len(source)} images by {network.name} ({network.sha256[:12]})")
    measured, parts = features_of(
        source, network, folder, batch_size=options.batch_size, device=device, what="images"
    )
    if rank_and_world_size()[0] != 0:
        return
    reference = make_reference(measured, source, network)
    save_reference(reference, options.outdir)
    parts.remove()
    for reason in source.why_left_out(measured["bad"]):
        print(f"left out: {reason}")
    print(
        f"{options.outdir}: {reference.statistics.count} images, {network.num_features} features of "
        f"{network.name}"
    )


def find_source(options: argparse.Namespace) -> ImageSource:
    """Return the images of a folder, a file, a config or a run."""
    place = Path(options.target).expanduser()
    if place.is_dir() and not is_run(place) or place.suffix == ".npz":
        return open_source(place, options.size, options.num_images)
    if options.size is not None:
        raise ValueError("--size is for folders: images of a configuration have the size that it gives")
    config: DictConfig
    if place.exists() and place.suffix not in (".yaml", ".yml"):
        file = find_checkpoint(place)
        config = config_of(read_checkpoint(file, tensors=()), file)
    else:
        config = load_config([find_config(options.target)])
    return data_images(config, options, "image", options.num_images)
