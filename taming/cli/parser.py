"""Reading a command line: one dialect for all commands, and one line for what is wrong with it."""

import argparse
import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from taming.config import allow_targets
from taming.parameters import did_you_mean

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, of a user's share of it


# Earlier names of options, which are accepted wherever the new one is an option and the old one is not.
NAMES_OF_2021 = (
    ("--resume", "--run"), ("--class", "--classes"), ("--classes", "--class-folders"), ("--out", "--outdir"),
    ("--output", "--outdir"), ("--prefix", "--part"), ("--config", "--base"), ("--size", "--resolution"),
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds the default of an option to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or isinstance(action.default, bool | list)
        if hidden or action.default in ("", argparse.SUPPRESS):
            return action.help
        return f"{action.help}; default: %(default)s"


class Parser(argparse.ArgumentParser):
    """A parser for the options of a command.

    In long options hyphens and underscores are the same. The beginning of an option stands for it, if there
    is only one option that begins so.

    Args:
        description: the help of the command, often the docstring of its module.
        prog: the name of the command in help texts.
    """

    def __init__(self, description: str | None = None, prog: str | None = None):
        super().__init__(
            prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, without the whole usage, and exit with status 2."""
        self.exit(2, f"error: {message}; --help lists the options\n")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read a command line, that of the program by default."""
        words = sys.argv[1:] if argv is None else list(argv)
        read = self.parse_args if "--" in words else self.parse_intermixed_args
        return read(self._respelled(words))

    def _respelled(self, words: list[str]) -> list[str]:
        """Write long options as they were declared; end with an error for unknown ones."""
        flags = {flag: flag for flag in self._option_string_actions if flag.startswith("--")}
        aliases = {old: flag for old, flag in NAMES_OF_2021 if flag in flags and old not in flags}
        known = {_plain(name): flag for name, flag in (flags | aliases).items()}
        result: list[str] = []
        for number, word in enumerate(words):
            if word == "--":
                return result + words[number:]
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = self._flag(flag, known)
            result.append(flag + equals + value)
        return result

    def _flag(self, flag: str, known: dict[str, str]) -> str:
        name = _plain(flag)
        if name in known:
            return known[name]
        actions = self._option_string_actions
        longer = list(dict.fromkeys(full for plain, full in known.items() if plain.startswith(name)))
        if longer and len({id(actions[full]) for full in longer}) == 1:
            return longer[0]
        hint = f" (it could be {' or '.join(longer)})" if longer else did_you_mean(name, known)
        self.error(f"unknown option {flag}{hint}")


def _plain(flag: str) -> str:
    return flag.replace("_", "-")


def execute(
    module: ModuleType, argv: Sequence[str] | None, prog: str | None, defaults: Mapping[str, Any]
) -> int:
    """Run the command that a module is, and return its exit status; see `taming.cli.command`."""
    if hasattr(module, "main"):  # a command with a parser of its own
        return module.main(argv, prog)
    parser = build_parser(module, prog)
    parser.set_defaults(**defaults)
    return exit_status(run, module, parser.read(argv))


def build_parser(module: ModuleType, prog: str | None = None) -> Parser:
    """Return the parser of the command that a module is."""
    parser = Parser(module.__doc__, prog)
    module.add_arguments(parser)
    return parser


def run(module: ModuleType, options: argparse.Namespace) -> None:
    """Run a command with the options that were read, and let configs name classes of `--allow PACKAGE`."""
    allow_targets(*getattr(options, "allow", ()))
    module.run(options)


def exit_status(command: Callable[..., None], *arguments: Any) -> int:
    """Run a command: 0 if it ends, 1 after a user's error, after one line about it, 130 after Ctrl-C.

    What the system reports, such as a missing permission, a full disk or a connection that ends, is a user's
    error, whether it names a file or not.
    """
    try:
        command(*arguments)
    except (ValueError, OSError) as error:
        message = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            if error.errno in FULL:
                message += "; make room, then start the command again: what is complete is kept"
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
