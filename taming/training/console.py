"""What the training command prints: its own lines, errors in one line each, and no advertisements."""

import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

# Messages of Lightning and torch that do not help here: advertisements, advice on what is chosen on purpose.
NOISE = (
    "litlogger", "litmodels", "`weights_only` was not set", "TPU available", "at the start of training",
    "does not have many workers", "LeafSpec", "Experiment logs directory", "exists and is not empty",
    "GPU available", "`max_epochs` was not set", "on_before_batch_transfer",
    "is not supported by the model summary",
)
# torch repeats an exception of a loader process as the text of a traceback; the groups are the innermost file
# in it, and the message.
_IN_LOADER = re.compile(
    r'Caught \w+ in DataLoader worker process.*^  File "([^"]+)", line \d+, in [^\n]*\n(?: {4}[^\n]*\n)*'
    r"[\w.]+: (.*)",
    re.DOTALL | re.MULTILINE,
)
_PACKAGE = Path(__file__).parents[1]


def is_rank_zero() -> bool:
    """Tell whether this is the first of the processes that train together, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def rank_zero_print(*words: object) -> None:
    """Print a line at once, in the first process only, as long as there is something to print to."""
    if not is_rank_zero():
        return
    try:
        print(*words, flush=True)
    except OSError:  # the terminal was closed: what ends the run is its signal, not this
        sys.stdout = open(os.devnull, "w")


def command_line(*words: object, allow: Iterable[str] = ()) -> str:
    """Return a call of this command that can be pasted into a shell, whatever its words contain."""
    started = Path(sys.argv[0])
    program = ["python", "main.py"]
    if started.name == "taming":
        program = ["taming", "train"]
    elif started.parts[-2:] == ("taming", "__main__.py"):
        program = ["python", "-m", "taming", "train"]
    allowed = [word for package in allow for word in ("--allow", package)]
    return shlex.join(map(str, [*program, *words, *allowed]))


def filter_noise(phrases: tuple[str, ...] = NOISE) -> None:
    """Drop Lightning's messages and everyone's warnings that contain one of these phrases."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logger = logging.getLogger(f"pytorch_lightning.{name}")
        logger.addFilter(lambda record: not any(phrase in record.getMessage() for phrase in phrases))
    for phrase in phrases:
        warnings.filterwarnings("ignore", message=f"(?s).*{re.escape(phrase)}")


def report(error: BaseException, debug: bool, given: Sequence[str] = ()) -> int:
    """Print an error in one line, after a session of the debugger if `debug`; return the exit status, 1.

    An error that all processes raise (`on_all_ranks`) is printed once.

    `given` are the keys and values of the command line; one may be the cause.
    """
    if debug:
        import pdb

        traceback.print_exception(error)
        pdb.post_mortem(error.__traceback__)
    if is_rank_zero() or not getattr(error, "on_all_ranks", False):
        print(f"error: {one_line(error, given)}", file=sys.stderr, flush=True)
    return 1


def one_line(error: BaseException, given: Sequence[str] = ()) -> str:
    """The message of an error for users; of other errors the type and the first line of the message."""
    if message := message_for_users(error):
        return message
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: lower data.params.batch_size ({first_line(error)})"
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    words = f"; the command line sets {shlex.join(given)}" if given else ""
    return f"{type(error).__name__}: {first_line(error)}{notes}{words}; add --debug to see where"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "no message")


def message_for_users(error: BaseException) -> str | None:
    """The message that this package raised for users, here or in a loader process; None for other errors."""
    if type(error).__module__.startswith("taming."):
        return str(error)
    if not isinstance(error, ValueError | OSError) or error.__traceback__ is None:
        return None
    innermost, message = traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
    if in_loader := _IN_LOADER.match(message):
        innermost, message = in_loader.groups()
    return message.rstrip() if Path(innermost).is_relative_to(_PACKAGE) else None


def comes_from(error: BaseException, packages: Iterable[str]) -> bool:
    """Tell whether code of one of these packages was running when the error was raised."""
    names = tuple(packages)
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(module == name or module.startswith(f"{name}.") for module in modules for name in names)
