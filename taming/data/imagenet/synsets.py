"""The files of an ImageNet folder: the list of images, the numbers of the synsets, and their names."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import yaml

from taming.data.files.lists import find_images, read_lines
from taming.util import read_text

logger = logging.getLogger(__name__)

IGNORED = {"n06596364_9591.JPEG"}  # left out of the training set, as in 2021
# The classes of the restricted ImageNet.
RIN = "30-32, 33-37, 151-268, 281-285, 80-100, 365-382, 389-397, 118-121, 300-319"  # animals


def str_to_indices(string: str) -> list[int]:
    """Read a list of class numbers, such as "30-32, 280": sorted; the end of a range is not included.

    Raises:
        ValueError: not of that form.
    """
    indices: list[int] = []
    for part in str(string).split(","):
        first, dash, last = part.partition("-")
        try:
            indices += range(int(first), int(last)) if dash else [int(first)]
        except ValueError as error:
            raise ValueError(
                f"sub_indices {string!r} has the part {part!r}: write class numbers, and ranges without "
                'their end, such as "30-32, 280"'
            ) from error
    return sorted(indices)


def give_synsets_from_indices(
    indices: Sequence[int], path_to_yaml: str | os.PathLike = "data/imagenet_idx_to_synset.yaml"
) -> list[str]:
    """Return the synsets, such as n01440764, with these class numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, does not map numbers to synsets, or lacks one.
    """
    if not os.path.isfile(path_to_yaml):
        raise FileNotFoundError(
            f"{path_to_yaml} does not exist: put a YAML file there, a line `number: synset` for each class"
        )
    try:
        known: Any = yaml.safe_load(read_text(path_to_yaml, max_bytes=1 << 24))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        reason = " ".join(str(error).split())  # of several lines
        raise ValueError(
            f"{path_to_yaml} is not valid YAML: write a line `number: synset` for each class ({reason})"
        ) from error
    unknown = [index for index in indices if not isinstance(known, dict) or index not in known]
    if unknown:
        raise ValueError(f"{path_to_yaml} has no synset for class {unknown[0]}")
    return [str(known[index]) for index in indices]


def list_images(file_list: str, datadir: str) -> tuple[str, list[str]]:
    """Return what names the images, and their paths relative to `datadir`, each in the folder of its synset.

    That is the text file `file_list`, or, where it does not exist, all images of the folder, sorted.

    Raises:
        ValueError: an image is not in the folder of a synset.
    """
    source = file_list
    if os.path.isfile(source):
        names = read_lines(source, "file list")
    else:
        source, names = datadir, [os.path.relpath(path, datadir) for path in find_images(datadir)]
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"{len(loose)} images of {source}, such as {loose[0]}, are in no folder of a synset: sort them "
            "into folders such as n01440764"
        )
    return source, names


def without_ignored(names: Sequence[str]) -> list[str]:
    """Leave out the images that are broken, as 2021 did."""
    return [name for name in names if os.path.basename(name) not in IGNORED]


def select(names: Sequence[str], sub_indices: str, file: str) -> list[str]:
    """Keep the images of some classes; `index_synset.yaml` numbers them, else their sorted order.

    Raises:
        FileNotFoundError: that file is needed, since not all 1000 synsets are present.
        ValueError: the classes are not present.
    """
    indices = str_to_indices(sub_indices)
    present = sorted({name.split("/")[0] for name in names})
    if len(present) == 1000 and not os.path.isfile(file):
        wanted = {present[index] for index in indices}
    else:
        wanted = set(give_synsets_from_indices(indices, file))
    kept = [name for name in names if name.split("/")[0] in wanted]
    if not kept:
        raise ValueError(f"none of the {len(names)} images are of the classes {sub_indices}")
    return kept


def human_names(file: str, synsets: Sequence[str]) -> list[str]:
    """Return the name of each synset by the text file `synset_human.txt`, lines `n01440764 tench, ...`.

    Without that file the synsets replace their names, with a warning.

    Raises:
        ValueError: the file lacks a synset.
    """
    if not os.path.isfile(file):
        logger.warning("%s does not exist: human_label will be the synset, such as %s", file, synsets[0])
        return list(synsets)
    lines = read_lines(file, "names of synsets")
    known = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    unknown = sorted(set(synsets) - set(known))
    if unknown:
        raise ValueError(
            f"{file} has no name for {len(unknown)} synsets, such as {unknown[0]}: add a line each"
        )
    return [known[synset] for synset in synsets]
