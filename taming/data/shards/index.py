"""Where shards are, and what is in them: names, places, indices, and copies of what lies behind addresses."""

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

from taming.util import download

logger = logging.getLogger(__name__)

INDEX = ".json"  # behind the name of a shard
_BLOCK = 512  # bytes
_PIECE = 1 << 20  # bytes that are read at once
_LONG_END = 1 << 20  # bytes; tar programs pad shards with zeros to 10 KB by default
_TRIES, _PAUSE = 3, 2.0  # of a download, seconds
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardError(ValueError):
    """A shard cannot be used at all; the message names it."""


class Index(NamedTuple):
    """What is in a shard: its size in bytes, and of each file in it the name, the offset and the size."""

    size: int
    members: list[tuple[str, int, int]]


# ---- names


def is_address(shard: str) -> bool:
    """Say whether a shard is behind an http(s) address."""
    return shard.startswith(("http://", "https://"))


def expand(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """List the shards that folders, files with ranges or wildcards, and addresses with ranges stand for.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a command or an unknown kind of address, or a shard that is named twice.
    """
    given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    found = [path for one in given for path in _expand_one(os.fspath(one))]
    if not found:
        raise ValueError("the list of shards is empty: name at least one")
    twice = sorted({path for path in found if found.count(path) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise ValueError(f"{len(twice)} shards are named twice, such as {twice[0]}")
    return found


def _expand_one(pattern: str) -> list[str]:
    scheme = re.match(r"([a-zA-Z][\w+.-]+):", pattern)
    if scheme and not is_address(pattern) or pattern.lstrip().startswith("|"):
        raise ValueError(
            f"shards {pattern!r} are refused: they are files, or http and https addresses; no command is run"
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
    """Write out number ranges, such as {000..146}."""
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) < int(first):
        raise ValueError(f"shards {pattern}: the range {match[0]} runs backwards")
    head, tail = pattern[: match.start()], pattern[match.end():]
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [head + number + rest for number in numbers for rest in _ranges(tail)]


# ---- indices


def index_of(shard: str, cache_dir: Path | None) -> Index:
    """Return what is in a shard: by the index beside it, or else by a look into it.

    A shard behind an address that has no index beside it is fetched as a whole.

    Raises:
        ShardError: the shard is broken.
    """
    if is_address(shard):
        if index := _remote_index(shard, cache_dir):
            return index
        path = fetch(shard, cache_dir)
        with _is_copy(path, shard):
            return scan(path)
    if os.path.isdir(shard):
        raise ShardError(f"shard {shard} is a folder, not a tar file: rename it, or leave it out")
    return _read_index(Path(shard + INDEX), os.path.getsize(shard)) or scan(shard)


def scan(shard: str | os.PathLike) -> Index:
    """Look through the headers of a tar file.

    Raises:
        ShardError: it is no tar file, is compressed or ends early, or has a damaged header.
    """
    size = os.path.getsize(shard)
    broken = f"shard {os.fspath(shard)} is broken"
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        compressed = isinstance(error, tarfile.TarError) and _is_compressed(shard)
        hint = "; shards must not be compressed" if compressed else ""
        raise ShardError(f"{broken}: {error}{hint}. Fetch or pack it again, or leave it out") from error
    for name, offset, length in members:
        if offset + length > size:
            raise ShardError(
                f"{broken}: {name} ends at byte {offset + length} of {size}. Fetch or pack it again"
            )
    if end + _BLOCK > size:
        raise ShardError(f"{broken}: it is cut off at byte {size}. Fetch or pack it again")
    _check_end(shard, end, broken)
    return Index(size, members)


def _check_end(shard: str | os.PathLike, end: int, broken: str) -> None:
    """Look for data behind the end: tarfile takes a damaged header for it, without a word."""
    with open(shard, "rb") as file:
        file.seek(end)
        while piece := file.read(_PIECE):
            if data := piece.lstrip(b"\0"):
                raise ShardError(
                    f"{broken}: its members end at byte {end}, but data follow at byte "
                    f"{file.tell() - len(data)}: a header is damaged, or tar files were joined. Fetch or "
                    "pack it again"
                )
        zeros = file.tell() - end
    if zeros > _LONG_END:
        logger.warning(
            "shard %s ends with %d bytes of zeros, as one that was not fetched to its end may: if so, fetch "
            "it again", os.fspath(shard), zeros,
        )


def write_index(shard: str | os.PathLike, index: Index) -> None:
    """Write an index beside its shard."""
    text = json.dumps({"size": index.size, "members": index.members}, separators=(",", ":"))
    Path(os.fspath(shard) + INDEX).write_text(text, encoding="utf-8")


def _read_index(path: Path, size: int | None) -> Index | None:
    """Read an index that fits a shard of `size` bytes, where that is known; None if there is none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        index = Index(int(content["size"]), [(str(n), int(o), int(s)) for n, o, s in content["members"]])
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # OverflowError: 1e999 is no int
        raise ShardError(f"index {path} is broken: {error}; delete it") from error
    inside = (0 <= offset <= offset + length <= index.size for _, offset, length in index.members)
    if index.size >= 1 << 63 or not all(inside):  # 63 bits: what the places are kept in
        raise ShardError(f"index {path} is broken: a member lies outside of the shard; delete it")
    return index if size in (None, index.size) else None


def _is_compressed(shard: str | os.PathLike) -> bool:
    with open(shard, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


# ---- copies of what lies behind addresses


def local_copy(shard: str, cache_dir: Path | None = None) -> str:
    """Return where the copy of a shard lies, or will: its own path if it is a file."""
    if not is_address(shard):
        return shard
    assert cache_dir is not None
    name = os.path.basename(urlsplit(shard).path) or "shard.tar"
    return str(cache_dir / f"{hashlib.sha256(shard.encode()).hexdigest()[:12]}-{name}")


def fetch(shard: str, cache_dir: Path, size: int | None = None) -> str:
    """Copy a shard from its address, once for all processes; return the copy's path.

    Raises:
        ShardError: it cannot be fetched, or has another size than its index says.
    """
    path = local_copy(shard, cache_dir)
    if not os.path.isfile(path):
        with _locked(path + ".lock"):
            if not os.path.isfile(path):  # another process has fetched it meanwhile
                _download(shard, path)
    found = os.path.getsize(path)
    if size is not None and found != size:
        raise ShardError(
            f"shard {shard} has {found} bytes, its index says {size}: one of them is of another time. Delete "
            f"the copies {path} and {path}{INDEX} to fetch both again; if these differ, too, the shard or "
            "its index must be made anew at the address"
        )
    return path


@contextmanager
def _is_copy(path: str, address: str) -> Iterator[None]:
    """Have errors say where the file in the cache comes from."""
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
            _download(address, path)
        except FileNotFoundError:
            return None
    with _is_copy(path, address):
        return _read_index(Path(path), None)


def _download(address: str, path: str) -> None:
    for trial in range(1, _TRIES + 1):
        try:
            return download(address, path, chunk_size=_PIECE)
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
    """Let one process of this machine at a time through."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: two processes may fetch the same shard, and one wins
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
