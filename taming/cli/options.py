"""The options that every command that draws pictures has, and what they mean for a model."""

import argparse
import dataclasses
from pathlib import Path
from typing import NoReturn

from taming.sampling import SamplingOptions

TORCHRUN = "Several processes share the work: torchrun --nproc_per_node 2 %(prog)s ..., one GPU for each."


class Parser(argparse.ArgumentParser):
    """Reads the options of a command that `description` tells of; what is wrong with them is one line."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the whole usage, and leave."""
        self.exit(2, f"error: {message}; --help lists the options\n")


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add the packages to hand to `taming.config.allow_targets` before a config is used."""
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help="let configs name "
        "classes of this package, whose code will run; may be repeated")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the run to sample from, and how to sample: the fields of `SamplingOptions`."""
    parser.epilog = TORCHRUN
    add = parser.add_argument
    add("-r", "--resume", required=True, metavar="RUN",
        help="run directory, checkpoint or exported folder of a transformer")
    for field in dataclasses.fields(SamplingOptions):
        names = [field.metadata.get("short"), f"--{field.name}"]
        default = 0 if field.name == "seed" else field.default
        help = field.metadata["help"] + ("" if default in (None, False) else f"; default: {default}")
        how = {"action": "store_true"} if default is False else {
            "type": field.metadata["type"] or str, "choices": field.metadata.get("choices")
        }
        add(*filter(None, names), default=default, help=help, **how)
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, each process its own")
    add_allow(parser)


def sampling_options(options: argparse.Namespace) -> SamplingOptions:
    """Return the sampling options of a command line."""
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    return SamplingOptions(**{name: getattr(options, name) for name in names})


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the data set whose items are drawn, and where to."""
    add_data_source(parser)
    add = parser.add_argument
    add("-o", "--outdir", type=Path, required=True, help="folder for the pictures")
    add("--batch_size", type=int, default=4, help="how many at once; changes the speed alone; default: 4")


def add_data_source(parser: argparse.ArgumentParser) -> None:
    """Add the data set, of the run or another one; see `data_section`."""
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="files that are merged over its config")
    add("--ignore_base_data", action="store_true", help="leave out the run's own `data` section")
    add("--split", default="validation", help="of the data: train, validation, test; default: validation")
    add("overrides", nargs="*", type=_data_override, metavar="data.sub=value", help="set on top of the files")


def _data_override(word: str) -> str:
    """Refuse what would change nothing: the model is that of its checkpoint."""
    if not word.startswith(("data.", "data=")):
        raise argparse.ArgumentTypeError(
            f"{word} would change nothing: the data alone can be set here, data.params.validation...=value"
        )
    return word


def read_size(text: str, option: str = "--size") -> tuple[int, int]:
    """HEIGHTxWIDTH or HEIGHT,WIDTH, in pixels."""
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} {text}: give HEIGHTxWIDTH in pixels, 64x256 for instance")
    return int(parts[0]), int(parts[1])
