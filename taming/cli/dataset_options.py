"""Options of the commands that work with a data set, that of the run or another one."""

import argparse

from omegaconf import DictConfig

from taming.cli.options import add_batch_size, add_outdir
from taming.data.sampler import SeededDataset
from taming.inference.dataset import build_dataset, data_section
from taming.inference.provenance import data_metadata


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the data set whose items are used, and where the images go."""
    add_data_source(parser)
    add_outdir(parser, "folder for the images", required=True)
    add_batch_size(parser, 4)


def add_data_source(parser: argparse.ArgumentParser) -> None:
    """Add the data set, that of the run or another one; see `data_of`."""
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="configurations to merge over that of "
        "the run: files, or names that `taming configs` lists")
    add("--ignore-base-data", action="store_true", help="leave out the run's own section `data`")
    add("--split", default="validation", help="of the data: train, validation or test")
    add("overrides", nargs="*", type=_data_override, metavar="data.sub=value", help="set on top of the files")


def _data_override(word: str) -> str:
    """Allow values of the data only: the model is that of its checkpoint."""
    if not word.startswith(("data.", "data=")):
        raise argparse.ArgumentTypeError(
            f"{word} would change nothing: the data alone can be set here, data.params.validation...=value"
        )
    return word


def load_dataset(config: DictConfig, options: argparse.Namespace) -> tuple[SeededDataset, dict[str, str]]:
    """Build the data set that the options of `add_data_source` name; return it and metadata of it.

    Raises:
        FileNotFoundError, ValueError: see `data_section` and `build_dataset`.
    """
    section = data_section(config, options.base, options.overrides, ignore_base_data=options.ignore_base_data)
    return build_dataset(section, options.split, options.seed), data_metadata(section, options.split)
