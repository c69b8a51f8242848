"""Reading a command line: one dialect for all commands, and one line for what is wrong with it."""

import argparse
import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn


FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, of a user's share of it


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds the default of an option to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or isinstance(action.default, bool | list)
        if hidden or action.default in ("", argparse.SUPPRESS):
            return action.help
        return f"{action.help}; default: %(default)s"


class Parser(argparse.ArgumentParser):
    """A parser for the options of a command.

    Hyphens and underscores in long options are the same, and so is any beginning that belongs to one option alone.

    Args:
        description: the help of the command, often the docstring of its module.
        prog: the name of the command in help texts.
    """

    def __init__(self, description: str | None = None, prog: str | None = None):
        super().__init__(
            prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False,
            epilog="Options may be written with hyphens or with underscores.",
        )

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, without the whole usage, and exit with status 2."""
        self.exit(2, f"error: {message}; --help lists the options\n")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read a command line, that of the program by default."""
        words = sys.argv[1:] if argv is None else list(argv)
        return self.parse_intermixed_args(self._respelled(words))

    def _respelled(self, words: list[str]) -> list[str]:
        """Write long options as they were declared; end with an error for unknown ones."""
        known = {_plain(flag): flag for flag in self._option_string_actions if flag.startswith("--")}
        result = []
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
        longer = [full for plain, full in known.items() if plain.startswith(name)]
        if longer and len({id(actions[full]) for full in longer}) == 1:
            return longer[0]
        hint = f" (it could be {' or '.join(longer)})" if longer else did_you_mean(name, known.values())
        self.error(f"unknown option {flag}{hint}")


def _plain(flag: str) -> str:
    return flag.replace("_", "-")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Phrase the candidates that are nearest to a word as a question in brackets, or return nothing."""
    near = difflib.get_close_matches(word, list(candidates), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def one_of(*choices: str) -> dict[str, Any]:
    """Return the arguments of `add_argument` for an option that is one of some words."""

    def read(word: str) -> str:
        if word not in choices:
            raise argparse.ArgumentTypeError(
                f"{word!r} is none of {', '.join(choices)}{did_you_mean(word, choices)}"
            )
        return word

    return {"type": read, "choices": choices}


def path(text: str) -> Path:
    """Read a path; `~` is the home folder."""
    return Path(text).expanduser()


def execute(module: ModuleType, argv: Sequence[str] | None, prog: str | None = None) -> int:
    """Run the command that a module is, and return its exit status."""
    if hasattr(module, "main"):  # a command with a parser of its own
        return module.main(argv)
    return exit_status(module.run, build_parser(module, prog).read(argv))


def build_parser(module: ModuleType, prog: str | None = None) -> Parser:
    """Return the parser of the command that a module is."""
    parser = Parser(module.__doc__, prog)
    module.add_arguments(parser)
    return parser


def exit_status(command: Callable[..., None], *arguments: Any) -> int:
    """Run a command: 0 if it ends, 1 after a user's error, of which one line is printed, 130 after Ctrl-C.

    What the system has against a file, such as a missing permission or a full disk, is a user's error.
    """
    try:
        command(*arguments)
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            if error.errno in FULL:
                message += "; make room, then start the command again: what is complete is kept"
        elif not isinstance(error, ValueError | FileNotFoundError):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
