"""What the training command says: a user's error in one line, and nothing of what is no news here."""

import logging
import re
import sys
import traceback
import warnings
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

NOISE = (  # what Lightning and torch say that is no news here: advertisements, and advice on what we chose
    "litlogger", "litmodels", "`weights_only` was not set", "TPU available", "at the start of training",
    "does not have many workers", "LeafSpec", "on_before_batch_transfer",
    "Experiment logs directory", "exists and is not empty",
)
# torch repeats what was raised in a loader process as the text of a traceback; of it the innermost file, and
# what the error said there.
_IN_LOADER = re.compile(
    r'Caught \w+ in DataLoader worker process.*^  File "([^"]+)", line \d+, in [^\n]*\n(?: {4}[^\n]*\n)*'
    r"[\w.]+: (.*)",
    re.DOTALL | re.MULTILINE,
)


@rank_zero_only
def say(*words: object, file=None) -> None:
    """Print, in the first process only."""
    print(*words, file=file or sys.stdout, flush=True)


def silence(phrases: tuple[str, ...] = NOISE) -> None:
    """Drop Lightning's messages and everyone's warnings that contain one of these phrases."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logger = logging.getLogger(f"pytorch_lightning.{name}")
        logger.addFilter(lambda record: not any(phrase in record.getMessage() for phrase in phrases))
    for phrase in phrases:
        warnings.filterwarnings("ignore", message=f"(?s).*{re.escape(phrase)}")


def report(error: Exception, debug: bool) -> int:
    """Print a user's error, after a look around with the debugger if wished; returns the exit status."""
    if debug:
        import pdb

        traceback.print_exception(error)
        pdb.post_mortem(error.__traceback__)
    print(f"error: {message_of_ours(error) or error}", file=sys.stderr, flush=True)
    return 1


def message_of_ours(error: Exception) -> str | None:
    """What an error says that this package raised for users, here or in a loader process; None of others."""
    if not isinstance(error, ValueError | FileNotFoundError):
        return None
    innermost, message = traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
    if in_loader := _IN_LOADER.match(message):
        innermost, message = in_loader.groups()
    return message.rstrip() if Path(innermost).is_relative_to(Path(__file__).parents[1]) else None
