"""Run directories `LOGDIR/TIME_NAME`: make one, lock it while it is in use, find the newest of a name."""

import errno
import glob
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taming.checkpoint import find_checkpoint
from taming.training.console import is_rank_zero

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"
LOCK_NAME = ".lock"
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d")


def find_run(path: str | Path) -> Path:
    """Return what a path names, or the newest match of a pattern such as `logs/*_custom_vqgan`.

    Only matches that hold a checkpoint count. The newest is that with the latest time in its name; for names
    without a time it is that of the last change.

    Raises:
        FileNotFoundError: nothing matches, or no match holds a checkpoint.
    """
    path = os.path.expanduser(path)
    if os.path.exists(path):
        return Path(path)
    matches = glob.glob(path)
    runs = [match for match in matches if _holds_checkpoint(match)]
    if not runs:
        raise FileNotFoundError(
            f"no checkpoint at {path}" + (f", in none of {len(matches)} matches" if matches else "")
        )
    return Path(max(runs, key=_start_time))


def _holds_checkpoint(path: str) -> bool:
    try:
        return find_checkpoint(path).is_file()
    except FileNotFoundError:
        return False


def _start_time(path: str) -> tuple[str, float]:
    changed = os.path.getmtime(path)
    in_name = _TIME.findall(path)
    return in_name[-1] if in_name else time.strftime(TIME_FORMAT, time.localtime(changed)), changed


@contextmanager
def new_run_dir(path: Path, keep: Callable[[], bool]) -> Iterator[None]:
    """Make and lock a run directory for the time of a block.

    If the block ends with an exception and `keep()` is false, since nothing was learned, the directory is
    removed again.

    Raises:
        ValueError: the directory exists already, or cannot be made.
    """
    if not is_rank_zero():
        yield
        return
    had_parent = path.parent.exists()
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"{path} exists already: a run of that name was started in the same second; start again, or give "
            "the run another name (-n)" if isinstance(error, FileExistsError) and path.is_dir() else
            f"cannot make the run directory {path}: {error.strerror}; change --logdir or --name"
        ) from error
    try:
        with locked_run_dir(path):
            yield
    except BaseException:
        if not keep():
            shutil.rmtree(path, ignore_errors=True)
            if not had_parent and not any(path.parent.iterdir()):
                path.parent.rmdir()
        raise


@contextmanager
def locked_run_dir(path: Path) -> Iterator[None]:
    """Hold the lock of a run directory for the time of a block.

    It is a POSIX record lock: it ends with the process, however that ends, and the processes that load data
    do not inherit it.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    if fcntl is None or not is_rank_zero():
        yield
        return
    file = path / LOCK_NAME
    descriptor = _lock(file)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(file: Path) -> int:
    """Open and lock a file; its last owner may remove it at the same moment, hence the loop."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"cannot write to the run directory {file.parent}: {error.strerror}") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return descriptor  # a file system without locks
            owner = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise ValueError(
                f"the run {file.parent} is in use by {owner or 'another process'}: stop that one first, or "
                "start another run"
            ) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)
