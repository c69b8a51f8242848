"""The command line of main.py: its own flags, every argument of the Trainer, and `key.sub=value` words."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Trainer

from taming.parameters import did_you_mean
from taming.training.legacy_arguments import (
    OLD_ARGUMENTS,
    OLD_SWITCHES,
    TRAINER_PARAMETERS,
    translate_trainer_arguments,
)
from taming.util import number

FLAGS = ("train", "debug", "no_test", "scale_lr", "dry_run", "ignore_base_data")  # alone they mean True
SHORT = {
    "-b": "base", "-t": "train", "-r": "resume", "-n": "name", "-p": "project", "-s": "seed", "-f": "postfix",
    "-d": "debug", "-l": "logdir", "-h": "help",
}
BOOLEANS = {word: True for word in ("true", "t", "yes", "y", "1")}
BOOLEANS |= {word: False for word in ("false", "f", "no", "n", "0")}
DOTLIST_ITEM = re.compile(r"[^\W\d][\w-]*(\.[\w-]+)*=", re.ASCII)
# The first sentence of each argument in Lightning's documentation.
DESCRIPTIONS = {
    name: " ".join(re.sub(r":\w+:|``", "", text).split()).replace("%", "%%")
    for name, text in re.findall(
        r"^ {12}(\w+): (.+?)(?:\.\s|\n\n)", Trainer.__init__.__doc__ or "", re.M | re.S
    )
}
SWITCHES = {name for name, parameter in TRAINER_PARAMETERS.items() if "bool" in str(parameter.annotation)}


def build_parser(prog: str = "main.py") -> argparse.ArgumentParser:
    """Describe every option. `parse` brings a command line into the form `--name=value` that this reads.

    `prog` is the name of the command in the help text.
    """
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{prog} -b CONFIG [CONFIG ...] [-t] [options] [--TRAINER_ARGUMENT VALUE] [key.sub=value ...]",
        description="Train a model: both stages, from YAML files.",
        epilog="key.sub=value overrides the files, e.g. model.params.embed_dim=256 data.params.batch_size=8",
    )
    add = parser.add_argument
    add("-b", "--base", action="append", default=[], metavar="CONFIG", help="YAML files, the last one wins")
    _add_flag(parser, "-t", "--train", help="train (without it: only build, and test)")
    add("-r", "--resume", "--run", metavar="RUN", help="resume a run: its directory, or a checkpoint in it")
    add("-n", "--name", help="the run directory is LOGDIR/TIME_NAME (default: the name of the first config)")
    add("-p", "--project", help="project name, for loggers that know projects")
    add("-s", "--seed", type=number(int, 0, 2**32 - 1),
        help="seed of all random numbers (default: that of the config, else 23)")
    add("-f", "--postfix", default="", help="appended to the name of the run directory")
    add("-l", "--logdir", default="logs", help="where run directories are made (default: logs)")
    _add_flag(parser, "-d", "--debug", help="on an error, open the debugger")
    _add_flag(parser, "--no_test", "--no-test", help="no test after training")
    _add_flag(parser, "--scale_lr", default=True,
              help="learning rate = accumulation x devices x nodes x batch size x base (default)")
    _add_flag(parser, "--dry_run", "--dry-run", help="print what would be trained, and stop")
    _add_flag(parser, "--ignore_base_data", help="leave out the `data` section of the configs")
    add("--allow", action="append", default=[], metavar="PACKAGE",
        help="let configs name classes of this package, whose code will run; may be repeated")
    group = parser.add_argument_group("of pytorch_lightning.Trainer", "they win over lightning.trainer")
    group.add_argument("--gpus", type=_scalar, default=argparse.SUPPRESS, metavar="GPUS",
                       help="`0,` the first; `0,1` these two; `2` any two; `-1` all; `0` none, the CPU; "
                       "default: one GPU if there is one")
    for name, parameter in TRAINER_PARAMETERS.items():
        group.add_argument(f"--{name}", type=_scalar, default=argparse.SUPPRESS, metavar="VALUE",
                           help=f"{DESCRIPTIONS.get(name, '')} (default: {parameter.default})".strip())
    for name in OLD_ARGUMENTS:
        if name not in TRAINER_PARAMETERS and name != "gpus":
            group.add_argument(f"--{name}", type=_scalar, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse(
    argv: Sequence[str], prog: str = "main.py"
) -> tuple[argparse.Namespace, dict[str, Any], list[str], list[str]]:
    """Read a command line; `prog` is the name of the command in the help text.

    Returns:
        The options (base, train, resume, name, project, seed, postfix, logdir, debug, no_test, scale_lr,
        dry_run, ignore_base_data, allow; `seed` is None when not given); the Trainer arguments that were
        given, under their present names, for `resolve_trainer_arguments`; the `key.sub=value` words; and
        notes, one for each old name that was translated.

    Raises:
        ValueError: an unknown option (with the closest known ones), a value that is missing or of the wrong
            kind, or a word that belongs to nothing.
    """
    parser = build_parser(prog)
    known = {"help", *vars(parser.parse_args([])), *TRAINER_PARAMETERS, *OLD_ARGUMENTS}
    words, dotlist = _scan(argv, known)
    given = vars(parser.parse_args(words))
    notes = []
    checkpoint = given.pop("resume_from_checkpoint", None)
    if checkpoint is not None:
        if given["resume"]:
            raise ValueError("--resume_from_checkpoint and --resume are the same option: give only --resume")
        given["resume"] = str(checkpoint)
        notes.append(f"--resume_from_checkpoint is now --resume {checkpoint}")
    if given["resume"] and given["name"]:
        raise ValueError("--name and --resume exclude each other: a resumed run keeps its directory")
    of_trainer = [name for name in given if name in TRAINER_PARAMETERS or name in OLD_ARGUMENTS]
    trainer = {name: given.pop(name) for name in of_trainer}
    overrides, more = translate_trainer_arguments(trainer)
    return argparse.Namespace(**given), overrides, dotlist, notes + more


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that the caller decides how to report them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _add_flag(parser: argparse.ArgumentParser, *names: str, help: str, default: bool = False) -> None:
    """Add an option whose value, True or False, may be left out."""
    add = parser.add_argument
    add(*names, type=_boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def _boolean(text: str) -> bool:
    """Read yes or no in the spellings of 2021."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return BOOLEANS[text.lower()]


def _scalar(text: str) -> Any:
    """Read a value as YAML does (4, true, null, [0, 1]); with a colon it is a duration (00:12:00:00)."""
    if ":" in text and not text.startswith("{"):
        return text
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a YAML value: {error}") from error
    return read["value"]


def _scan(argv: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Split a command line into `--name=value` words and `key.sub=value` items.

    argparse alone would take the word after an optional value (`-t model.params.n_embed=8`) or after a list
    of files for part of it.
    """
    words, dotlist = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if not DOTLIST_ITEM.match(word):
                raise ValueError(f"{word!r} belongs to no option; overrides are written key.sub=value")
            dotlist.append(word)
            continue
        name, value = _split_option(word, known)
        if name == "help":
            words.append("--help")
        elif name == "base":
            files = [] if value is None else [value]
            while value is None and rest and not rest[0].startswith("-") and not DOTLIST_ITEM.match(rest[0]):
                files.append(rest.pop(0))
            if not files:
                raise ValueError(f"{word} needs the name of a YAML file")
            words += [f"--base={file}" for file in files]
        else:
            words.append(f"--{name}={_value_of(name, word, rest) if value is None else value}")
    return words, dotlist


def _split_option(word: str, known: set[str]) -> tuple[str, str | None]:
    """Split `--name`, `--name=value`, `-s` or `-s23` into name (with underscores) and value or None."""
    if not word.startswith("--"):
        if word[:2] not in SHORT:
            raise ValueError(f"unknown option {word!r}; short ones are {', '.join(SHORT)}")
        return SHORT[word[:2]], word[2:].removeprefix("=") or None
    option, equals, value = word[2:].partition("=")
    name = {"run": "resume"}.get(option, option.replace("-", "_"))
    if "." in option and equals:
        raise ValueError(f"unknown option {word!r}: overrides are written without dashes, {word[2:]}")
    if name not in known:
        near = did_you_mean(name, known, "--{}".format)
        raise ValueError(f"unknown option '--{option}'{near}; --help lists all")
    return name, value if equals else None


def _value_of(name: str, word: str, rest: list[str]) -> str:
    """Take the value of an option from the words after it; a flag, or a Trainer switch, may stand alone."""
    following = rest[0] if rest else "-"
    if name in FLAGS:
        return rest.pop(0) if following.lower() in BOOLEANS else "True"
    is_value = not following.startswith("-") or re.match(r"-\d", following) is not None
    if name in TRAINER_PARAMETERS or name in OLD_ARGUMENTS:
        is_value = is_value and not DOTLIST_ITEM.match(following)
    if is_value:
        return rest.pop(0)
    if name in SWITCHES or name in OLD_SWITCHES:
        return "True"
    raise ValueError(f"{word} needs a value")
