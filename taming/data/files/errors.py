"""What can be wrong with one sample of a data set."""

from collections.abc import Iterator
from contextlib import contextmanager


class BadSample(ValueError):
    """One sample of a data set cannot be used; the message names the file and the reason."""


class BadImage(BadSample):
    """A file cannot be read as an image; the message names the file and the reason."""


@contextmanager
def file_errors(path: object, what: str = "image", kind: type[BadSample] = BadImage) -> Iterator[None]:
    """Turn whatever goes wrong with a file into an error of that kind, which names it as `str(path)` does.

    MemoryError is one of them: a decoder raises it for a size that a broken header claims.
    """
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
        reason = " ".join(str(error).split()) or "no reason given"
        raise kind(f"cannot read {what} {path}: {type(error).__name__}: {reason}") from error
