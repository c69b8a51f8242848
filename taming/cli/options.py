"""Options that several commands have, what their values mean, and where output may go."""

import argparse
import dataclasses
import os
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path
from typing import Any

from taming.inference.provenance import check_replaceable
from taming.parameters import did_you_mean
from taming.sampling import SamplingOptions
from taming.util import number

TORCHRUN = "Several processes share the work, each with a GPU: torchrun --nproc_per_node 2 -m taming {} ..."

Size = tuple[int, int]  # height, width

# ---- values


def path(text: str) -> Path:
    """Read a path; `~` is the home folder."""
    return Path(text).expanduser()


def size(text: str) -> Size:
    """Read HEIGHTxWIDTH or HEIGHT,WIDTH, in pixels."""
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: give HEIGHTxWIDTH in pixels, 64x256 for instance")
    return int(parts[0]), int(parts[1])


def one_of(*choices: str) -> dict[str, Any]:
    """Return the arguments of `add_argument` for an option that is one of some words."""

    def read(word: str) -> str:
        if word not in choices:
            hint = did_you_mean(word, choices)
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}{hint}")
        return word

    return {"type": read, "choices": choices}


# ---- options


def add_run(parser: argparse.ArgumentParser, what: str, **more: Any) -> None:
    """Add the run to work with; `what` says which kind."""
    help = f"{what}: run directory, checkpoint file or exported folder"
    parser.add_argument("-r", "--run", type=path, metavar="RUN", help=help, **more)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the device to compute on."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU")


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add the packages to hand to `taming.config.allow_targets` before a config is used."""
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help="let configs name "
                        "classes of this package, whose code will run; may be repeated")


def add_batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """Add how many images are computed together."""
    help = "images at once; changes the speed alone"
    parser.add_argument("--batch-size", type=number(int, 1), default=default, help=help)


def add_outdir(parser: argparse.ArgumentParser, help: str, **more: Any) -> None:
    """Add where the output goes."""
    parser.add_argument("-o", "--outdir", type=path, help=help, **more)


def add_sampling_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the transformer to sample from, and how to sample: the fields of `SamplingOptions`."""
    parser.epilog = TORCHRUN.format(command)
    add_run(parser, "a transformer", required=True)
    add_device(parser)
    add_allow(parser)
    add_sampling_fields(parser)


def add_sampling_fields(parser: argparse.ArgumentParser) -> None:
    """Add how to sample: the fields of `SamplingOptions`."""
    group = parser.add_argument_group("how images are sampled")
    for field in dataclasses.fields(SamplingOptions):
        about = field.metadata
        flags = [*about.get("short", "").split(), "--" + field.name.replace("_", "-")]
        if isinstance(field.default, bool):
            how: dict[str, Any] = {"action": "store_true"}
        else:
            how = one_of(*about["choices"]) if "choices" in about else {"type": about["type"]}
            how["default"] = field.default
        group.add_argument(*flags, help=about["help"], **how)
    parser.set_defaults(seed=0)


def sampling_options(options: argparse.Namespace) -> SamplingOptions:
    """Return how to sample, from the options that `add_sampling_options` added."""
    return SamplingOptions(**{
        field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingOptions)
    })


def add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """Add the images that maps are made of, and the model that makes them."""
    add = parser.add_argument
    add("folder", type=path, help="images, at any depth")
    add_outdir(parser, "folder for the maps", required=True)
    add("--model", required=True, help="name on the hub, or a folder")
    add("--offline", action="store_true", help="do not connect to the hub: the model was fetched before")
    add_device(parser)


# ---- where output may go


def check_folder(folder: Path, inputs: Iterable[Path] = ()) -> Path:
    """Return a folder for output, which may be new.

    Args:
        folder: the folder.
        inputs: folders and files that are read.

    Raises:
        ValueError: nothing can be written there; or it lies in an input, where a later start would read what
            this one wrote.
    """
    _check_place(folder, f"--outdir {folder}")
    for given in inputs:
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise ValueError(f"--outdir {folder} lies in {given}, which is read: choose another folder")
    return folder


def png_file(given: Path | None, name: str, inputs: Iterable[Path | None] = ()) -> Path:
    """Return where a command writes its one image.

    Args:
        given: a name that ends in .png; or a folder, for the file `name`, under the next name that is free if
            it is there already; this folder if None.
        name: of the file, without its ending.
        inputs: files that are read.

    Raises:
        ValueError: the file cannot be written, or would replace an input or a file of other origin.
    """
    file, folder = given, given or Path()
    if file is None or file.is_dir() or not file.suffix:
        names = chain((f"{name}.png",), (f"{name}_{i}.png" for i in count(2)))
        file = next(folder / each for each in names if not (folder / each).exists())
    check_png(file, f"--outdir {folder}")
    if any(each is not None and each.resolve() == file.resolve() for each in inputs):
        raise ValueError(f"--outdir {folder}: {file} is read, and would be replaced: choose another name")
    return file


def check_png(file: Path, given: str) -> None:
    """Raise ValueError unless a PNG file can be written; `given` are the words that named it."""
    if file.is_dir():
        raise ValueError(f"{given} is a folder: name a file, {file / 'image.png'} for instance")
    if file.suffix.lower() != ".png":
        raise ValueError(f"{given}: the file is a PNG: choose a name that ends in .png")
    _check_place(file.parent, given)
    check_replaceable(file)


def _check_place(folder: Path, given: str) -> None:
    """Raise ValueError unless the folder, or the nearest existing one above it, can be written to."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{given}: {place} is a file: name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: {place} is not writable: name another folder")
