"""One line instead of a traceback where Python is too old, or the packages that taming needs are not installed.

Like `taming.cli` itself, this imports the standard library only, in a syntax that older Pythons read too.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

NEEDED = (3, 11)
ROOT = Path(__file__).resolve().parents[2]  # the checkout, unless the package is installed


@contextmanager
def needs_packages():
    """End the program with one line if an import within the block finds a package missing."""
    if sys.version_info < NEEDED:
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit("error: this is Python {}, and taming needs {}.{} or newer; {}".format(found, *NEEDED, remedy()))
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "taming").split(".")[0] in ("taming", "main", "scripts"):
            raise  # a fault of ours
        sys.exit("error: {} has no package {}; {}".format(sys.executable, error.name, remedy()))


def remedy():
    """Phrase what to do: enter the environment that `make` makes, make it, or install the package."""
    if not (ROOT / "Makefile").is_file():
        return "install it with what it needs: pip install taming"
    activate = ROOT / ".venv" / "bin" / "activate"
    enter = "enter the environment: source '{}'".format(activate)
    return enter if activate.is_file() else "make one (make -C '{}' env), then {}".format(ROOT, enter)
