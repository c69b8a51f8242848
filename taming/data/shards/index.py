"""Where shards are, and what is in them: names, indices, and copies of what is behind addresses.

Names, indices and headers come from files of strangers: each has a limit, and what is beyond is one line.
"""

import glob
import hashlib
import json
import logging
import math
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from taming.util import download, open_file, read_text

logger = logging.getLogger(__name__)

INDEX = ".json"  # behind the name of a shard
_BLOCK = 512  # bytes
_PIECE = 1 << 20  # bytes that are read at once
_LONG_END = 1 << 20  # bytes; tar programs pad shards with zeros to 10 KB by default
_DIGITS = re.compile(rb"\d{100}")
MAX_SHARDS = 1_000_000  # that ranges stand for
MAX_MEMBERS = 250_000  # files in a shard
MAX_INDEX = 1 << 25  # bytes of an index: 130 for each of so many files
MAX_NAME = 4096  # characters of a file's name
MAX_HEADER = 8192  # bytes that tarfile may read at once: a header, or a long name
MAX_END = 1 << 30  # bytes behind the end of a shard
MAX_DOWNLOAD = 1 << 36  # bytes of a shard that has no index
_TRIES, _PAUSE = 3, 2.0  # of a download, seconds
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")


class ShardError(ValueError):
    """A shard cannot be used at all; the message names it."""


class Index(NamedTuple):
    """What is in a shard: its size in bytes, and of each file in it the name, the offset and the size."""

    size: int
    members: list[tuple[str, int, int]]


# ---- names


def is_address(shard: str) -> bool:
    """Return whether a shard is behind an http(s) address."""
    return shard.startswith(("http://", "https://"))


def expand(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """List the shards that folders, files with ranges or wildcards, and addresses with ranges stand for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a command or an unknown kind of address, or a shard that is named twice.
    """
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    found = [path for one in given for path in _expand_one(os.fspath(one))]
    if not found:
        raise ValueError("the list of shards is empty: name at least one")
    if twice := sorted(path for path, count in Counter(found).items() if count > 1):
        raise ValueError(f"{len(twice)} shards are named twice, such as {twice[0]}")
    return found


def _expand_one(pattern: str) -> list[str]:
    scheme = re.match(r"([a-zA-Z][\w+.-]+):", pattern)
    if scheme and not is_address(pattern) or pattern.lstrip().startswith("|"):
        raise ValueError(
            f"shards {pattern!r} are not allowed: give files, or http and https addresses; no command is run"
        )
    names = _ranges(pattern)
    if is_address(pattern):
        return names
    if os.path.isdir(pattern):
        names = [os.path.join(pattern, "*.tar")]
    paths = []
    for name in names:
        hits = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if not hits:
            raise FileNotFoundError(f"there is no shard {name} (working directory: {os.getcwd()})")
        paths += hits
    return paths


def _ranges(pattern: str) -> list[str]:
    """List the names that number ranges, such as {000..146}, stand for.

    Raises:
        ValueError: a range runs backwards, or there are too many names.
    """
    counts = []
    for match in _RANGE.finditer(pattern):
        counts.append(int(match[2]) - int(match[1]) + 1)
        if counts[-1] < 1:
            raise ValueError(f"shards {pattern}: the range {match[0]} runs backwards")
    if math.prod(counts) > MAX_SHARDS:
        raise ValueError(f"shards {pattern}: the ranges stand for more than {MAX_SHARDS} shards")
    names = [""]
    position = 0
    for match in _RANGE.finditer(pattern):
        head, first, last = pattern[position:match.start()], match[1], match[2]
        numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        names = [name + head + number for name in names for number in numbers]
        position = match.end()
    return [name + pattern[position:] for name in names]


# ---- indices


def index_of(shard: str, cache_dir: Path | None) -> Index:
    """Return what is in a shard: from the index beside it, or else from its headers.

    A shard from an address without an index is downloaded as a whole.

    Raises:
        ShardError: the shard is broken.
    """
    if is_address(shard):
        assert cache_dir is not None
        if index := _remote_index(shard, cache_dir):
            return index
        path = fetch(shard, cache_dir)
        with _is_copy(path, shard):
            return scan(path)
    return _read_index(Path(shard + INDEX), os.path.getsize(shard)) or scan(shard)


def scan(shard: str | os.PathLike) -> Index:
    """Read the headers of a tar file.

    Raises:
        ShardError: it is not a tar file, is compressed or cut short, or has a bad header or too many files.
    """
    name = os.fspath(shard)
    broken = f"shard {name} is broken"
    try:
        file = open_file(shard, "shard")
    except ValueError as error:
        raise ShardError(f"{error}: rename it, or leave it out") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        try:
            members, end = _read_headers(file)
        except Exception as error:  # TarError, OSError, ValueError, RecursionError, ...
            compressed = isinstance(error, tarfile.TarError) and _is_compressed(file)
            hint = "; shards must not be compressed" if compressed else ""
            raise ShardError(f"{broken}: {error}{hint}. Fetch or pack it again, or leave it out") from error
        for member, offset, length in members:
            if offset + length > size:
                raise ShardError(
                    f"{broken}: {member} ends at byte {offset + length} of {size}. Fetch or pack it again"
                )
        if end + _BLOCK > size:
            raise ShardError(f"{broken}: it is cut off at byte {size}. Fetch or pack it again")
        if size - end > MAX_END:
            raise ShardError(f"{broken}: {size - end} bytes follow its end. Fetch or pack it again")
        _check_end(file, name, end, broken)
    return Index(size, members)


def _read_headers(file: BinaryIO) -> tuple[list[tuple[str, int, int]], int]:
    """Return the members of a tar file, (name, offset, size), and where it ends, in bytes."""
    members = []
    with tarfile.open(fileobj=_HeaderFile(file), mode="r:") as tar:  # type: ignore[call-overload]
        for count, member in enumerate(tar, 1):
            if member.size < 0:  # tarfile would go back, without end
                raise ValueError(f"{member.name[:100]} has {member.size} bytes")
            if count > MAX_MEMBERS:
                raise ValueError(f"it has more than {MAX_MEMBERS} members: pack several smaller shards")
            if member.isreg() and not member.issparse():
                members.append((_checked(member.name), member.offset_data, member.size))
        return members, tar.offset


class _HeaderFile:
    """A file for tarfile that limits how much is read at once, and rejects headers that make it slow."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header has {size} bytes")
        data = self._file.read(size)
        if size > _BLOCK and _DIGITS.search(data):  # tarfile searches them in quadratic time
            raise ValueError("a header has a number of more than 100 digits")
        return data


def _checked(name: str) -> str:
    """Return the name of a member.

    Raises:
        ValueError: it is too long, or no text.
    """
    if len(name) > MAX_NAME:
        raise ValueError(f"the name of a file has {len(name)} characters")
    return name.encode("utf-8", "backslashreplace").decode()


def _check_end(file: BinaryIO, name: str, end: int, broken: str) -> None:
    """Look for data behind the end: tarfile silently takes a damaged header for the end."""
    file.seek(end)
    while piece := file.read(_PIECE):
        if data := piece.lstrip(b"\0"):
            raise ShardError(
                f"{broken}: its members end at byte {end}, but data follow at byte "
                f"{file.tell() - len(data)}: a header is damaged, or tar files were joined. Fetch or "
                "pack it again"
            )
    if (zeros := file.tell() - end) > _LONG_END:
        logger.warning(
            "shard %s ends with %d bytes of zeros, as one that was not fetched to its end may: if so, fetch "
            "it again", name, zeros,
        )


def write_index(shard: str | os.PathLike, index: Index) -> None:
    """Write an index beside its shard."""
    text = json.dumps({"size": index.size, "members": index.members}, separators=(",", ":"))
    Path(os.fspath(shard) + INDEX).write_text(text, encoding="utf-8")


def _read_index(path: Path, size: int | None) -> Index | None:
    """Read an index that fits a shard of `size` bytes, where that is known; None if there is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path, "index", max_bytes=MAX_INDEX))
        members = [(_checked(str(n)), int(o), int(s)) for n, o, s in content["members"]]
        index = Index(int(content["size"]), members)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # 1e999 overflows
        raise ShardError(f"index {path} is broken: {error}; delete it") from error
    if len(members) > MAX_MEMBERS:
        raise ShardError(f"index {path} has more than {MAX_MEMBERS} members: pack several smaller shards")
    inside = (0 <= offset <= offset + length <= index.size for _, offset, length in members)
    if index.size >= 1 << 63 or not all(inside):  # 63 bits: what the places are kept in
        raise ShardError(f"index {path} is broken: a member lies outside of the shard; delete it")
    return index if size in (None, index.size) else None


def _is_compressed(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


# ---- copies of shards from addresses


def local_copy(shard: str, cache_dir: Path | None = None) -> str:
    """Return the path of the copy of a shard, which may not exist yet; of a file, its own path."""
    if not is_address(shard):
        return shard
    assert cache_dir is not None
    name = os.path.basename(urlsplit(shard).path).removesuffix(".tar")[-100:]
    return str(cache_dir / f"{hashlib.sha256(shard.encode()).hexdigest()[:12]}-{name}.tar")


def fetch(shard: str, cache_dir: Path, size: int | None = None) -> str:
    """Copy a shard from its address, once for all processes; return the copy's path.

    Raises:
        ShardError: it cannot be fetched, or has another size than its index says.
    """
    path = local_copy(shard, cache_dir)
    if not os.path.isfile(path):
        with _locked(path + ".lock"):
            if not os.path.isfile(path):  # another process has fetched it meanwhile
                _download(shard, path, MAX_DOWNLOAD if size is None else size)
    found = os.path.getsize(path)
    if size is not None and found != size:
        raise ShardError(
            f"shard {shard} has {found} bytes, its index says {size}: one of them is of another time. Delete "
            f"the copies {path} and {path}{INDEX} to fetch both again; if these differ, too, the shard or "
            "its index must be made again at the address"
        )
    return path


@contextmanager
def _is_copy(path: str, address: str) -> Iterator[None]:
    """Add to errors where the file in the cache comes from."""
    try:
        yield
    except ShardError as error:
        raise ShardError(f"{error}. {path} is a copy from {address}: delete it to fetch it again") from error


def _remote_index(shard: str, cache_dir: Path) -> Index | None:
    path = local_copy(shard, cache_dir) + INDEX
    parts = urlsplit(shard)
    address = parts._replace(path=parts.path + INDEX).geturl()
    if not os.path.isfile(path):
        try:
            _download(address, path, MAX_INDEX)
        except FileNotFoundError:
            return None
    with _is_copy(path, address):
        return _read_index(Path(path), None)


def _download(address: str, path: str, max_bytes: int) -> None:
    for trial in range(1, _TRIES + 1):
        reason: Exception
        try:
            return download(address, path, chunk_size=_PIECE, max_bytes=max_bytes)
        except HTTPError as error:
            if error.code in (403, 404, 410):
                raise FileNotFoundError(f"{address} does not exist (HTTP {error.code})") from error
            reason = error
        except (OSError, HTTPException, UnicodeError) as error:
            reason = error
        if trial == _TRIES or isinstance(reason, InvalidURL | UnicodeError):  # these do not pass
            raise ShardError(f"cannot fetch {address}: {reason}") from reason
        time.sleep(_PAUSE * trial)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock, so that one process of this machine at a time runs the block."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: two processes may fetch the same shard, and one wins
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
