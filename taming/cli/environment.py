"""One line instead of a traceback where Python is too old, or packages that taming needs are missing.

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
        needed = ".".join(map(str, NEEDED))
        sys.exit(f"error: this is Python {found}, and {needed} or newer is needed; {remedy()}")
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "taming").split(".")[0] in ("taming", "main", "scripts"):
            raise  # a fault of ours
        sys.exit(f"error: {sys.executable} has no package {error.name}; {remedy()}")


def remedy():
    """Phrase what to do: enter the environment that `make` makes, make it, or install the package."""
    if not (ROOT / "Makefile").is_file():
        return "install it with what it needs: pip install taming"
    activate = ROOT / ".venv" / "bin" / "activate"
    enter = f"enter the environment: source '{activate}'"
    return enter if activate.is_file() else f"make one (make -C '{ROOT}' env), then {enter}"
