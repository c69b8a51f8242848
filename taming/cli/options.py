"""The options that every command that draws pictures has, and what they mean for a model."""

import argparse
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint, load_model
from taming.config import allow_targets
from taming.inference.decoding import PRECISIONS
from taming.inference.distributed import own_device
from taming.inference.provenance import model_note
from taming.models.cond_transformer import Net2NetTransformer
from taming.util import number

SETTINGS = ("seed", "top_k", "top_p", "temperature", "min_p", "guidance", "stride", "precision")
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
    """Add the run to draw with, and how to draw."""
    parser.epilog = TORCHRUN
    add = parser.add_argument
    add("-r", "--resume", required=True, metavar="RUN",
        help="run directory, checkpoint or exported folder of a transformer")
    add("-t", "--temperature", type=number(float, 0, above=True), default=1.0, help="below 1 for likelier "
        "pictures; default: 1.0")
    add("-k", "--top_k", type=number(int, 1), help="draw among the k likeliest codes; default: all")
    add("-p", "--top_p", type=number(float, 0, 1, above=True), help="draw among the likeliest codes of total "
        "probability p; default: 1")
    add("--min_p", type=number(float, 0, 1), help="draw among codes of at least that share of the likeliest "
        "one's probability; default: 0")
    add("--guidance", type=number(float, 0), default=1.0, metavar="SCALE", help="above 1, pictures follow "
        "their condition more; for models that were trained with a null_token; default: 1, none")
    add("--stride", type=number(int, 1), default=1, help="of pictures larger than in training: codes drawn "
        "before the window moves; more is faster; default: 1")
    add("--seed", type=number(int, 0), default=0, help="another seed, other pictures; default: 0")
    add("--precision", choices=list(PRECISIONS), default="32", help="of the transformer's weights; bf16 "
        "takes half the memory and time, and decodes in it too; 16 is for older GPUs; default: 32")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, each process its own")
    add_allow(parser)


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


def load_transformer(options: argparse.Namespace) -> tuple[Net2NetTransformer, DictConfig, dict[str, str]]:
    """The model of `--resume` on this process's device, its config, and a note of how it draws.

    Reduced precision is that of the transformer's weights: its steps are bound by reading them, and autocast
    would read all of float32. The stages that turn pictures into codes stay in float32, since bfloat16
    changes codes.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it holds no transformer, guidance is asked for that it was not trained for, or more codes
            than it has.
    """
    allow_targets(*options.allow)
    file = find_checkpoint(options.resume)
    model, config, step = load_model(file, device=own_device(options.device))
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{file} is a {type(model).__name__}: give a run of stage 2, a transformer")
    if options.guidance != 1.0 and model.null_token is None:
        raise ValueError(
            f"--guidance {options.guidance:g}: the model of {file} has no null token to be guided away from: "
            "train it with cond_dropout and null_token, or leave guidance out"
        )
    if options.top_k is not None and options.top_k > model.codebook_size:
        raise ValueError(
            f"--top_k {options.top_k}: the model of {file} has {model.codebook_size} codes: give 1 to "
            f"{model.codebook_size}, or leave it out for all"
        )
    note = model_note(model, config)  # of the weights before they are rounded
    model.transformer.to(PRECISIONS[options.precision])
    note |= {name: str(getattr(options, name)) for name in SETTINGS}
    return model, config, note | {"checkpoint": file.name, "step": str(step)}


def settings(options: argparse.Namespace) -> dict[str, float | None]:
    """What of the options `Net2NetTransformer.sample_codes` takes."""
    return {name: getattr(options, name) for name in SETTINGS if name not in ("seed", "precision")}


def read_size(text: str, option: str = "--size") -> tuple[int, int]:
    """HEIGHTxWIDTH or HEIGHT,WIDTH, in pixels."""
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} {text}: give HEIGHTxWIDTH in pixels, 64x256 for instance")
    return int(parts[0]), int(parts[1])
