"""Helpers that notebooks of 2021 import, for files, nested values and parameters; devices, atomic writing."""

import argparse
import errno
import hashlib
import importlib.util
import math
import os
import stat
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch
from torch import nn
from tqdm import tqdm

URL_MAP = {"vgg_lpips": "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1"}
CKPT_MAP = {"vgg_lpips": "vgg.pth"}
MD5_MAP = {"vgg_lpips": "d507d7349b931f0638a25a48a722f98a"}
_TIMEOUT = 60  # seconds without a byte
_LINE_INTERVAL = 10  # seconds between the lines of progress in a file


class ProgressBar(tqdm):
    """A bar on a terminal and in a notebook; in a file or a pipe, a line every ten seconds and at the end."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.is_live = sys.stderr.isatty() or "ipykernel" in sys.modules
        if not self.is_live:
            kwargs = {"mininterval": _LINE_INTERVAL, "delay": 1e-9, "leave": False, **kwargs}
        super().__init__(*args, **kwargs)
        self.delay = 0  # there was no line before the first step

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the state, or write it as a line: also where tqdm would clear a bar that is closed."""
        if self.is_live:
            super().display(msg, pos)
        else:
            self.fp.write(f"{self}\n")
            self.fp.flush()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield the path of a partial file beside `path`, which replaces `path` when the block ends.

    `path` holds its old content or the new one, whole, at any moment, also after a crash or a power failure:
    the partial file and its folder are flushed to the disk. After an exception the partial file is removed.
    The folder must exist. The partial file is called `.NAME.PID.part`.

    Raises:
        OSError: the disk is full, whatever kind of error the writer made of it; it names `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        _flush_to_disk(partial)
        partial.replace(path)
        _flush_to_disk(path.parent)
    except Exception as error:
        if (number := _full_disk(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _full_disk(error: BaseException | None) -> int | None:
    """Return the system's number for a full disk (or quota) if it is what an error is due to."""
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT):
            # torch and safetensors raise errors of their own; the reason is their cause, or in their text
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _flush_to_disk(path: Path) -> None:
    """Call fsync on a file, or, where the system can, on a folder."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: str | os.PathLike, what: str = "file", *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading bytes; this never waits, as opening a pipe does.

    Args:
        path: the file; links are followed.
        what: what the file is, for messages.
        max_bytes: largest size that is allowed.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: `path` is a folder, pipe, socket or device, or the file is larger than `max_bytes`.
    """
    name = os.fspath(path)
    _check_regular(os.stat(path), name, what)  # before it is opened: opening a device can have effects
    flags = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda path, mode: os.open(path, mode | flags))
    try:
        status = os.fstat(file.fileno())
        _check_regular(status, name, what)
        if max_bytes is not None and status.st_size > max_bytes:
            raise ValueError(f"{what} {name} has {status.st_size} bytes, more than {max_bytes} are not read")
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result, name: str, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise ValueError(f"{what} {name} is a {kind}, but must be a file")


def read_bytes(path: str | os.PathLike, what: str = "file", *, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`, whatever size the system claims; errors as open_file."""
    with open_file(path, what, max_bytes=max_bytes) as file:
        data = file.read(os.fstat(file.fileno()).st_size + 1)
        data += file.read(max_bytes + 1 - len(data)) if data else b""  # of a file that grows, or in /proc
    if len(data) > max_bytes:
        raise ValueError(f"{what} {os.fspath(path)} has more than {max_bytes} bytes, which are not read")
    return data


def read_text(path: str | os.PathLike, what: str = "file", *, max_bytes: int) -> str:
    """Read a regular UTF-8 text file of at most `max_bytes`.

    Raises:
        OSError, ValueError: as open_file; also if the text is not UTF-8.
    """
    try:
        return read_bytes(path, what, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {os.fspath(path)} is not UTF-8 text ({error}): save it as UTF-8") from error


def download(
    url: str, local_path: str | Path, chunk_size: int = 1024, *, max_bytes: int | None = None
) -> None:
    """Download `url` (http, https) to the file `local_path`, in steps of `chunk_size` bytes, with a bar.

    The file appears whole or not at all. Raises ValueError for other addresses, and OSError if the transfer
    fails or ends early, or brings more than `max_bytes`.
    """
    _check_address(url)
    path = Path(local_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as partial,
        urllib.request.build_opener(_WebOnly).open(url, timeout=_TIMEOUT) as response,
    ):
        length = response.headers.get("content-length") or ""
        total = int(length) if length.isdecimal() else 0
        received = 0
        with (
            partial.open("wb") as file,
            ProgressBar(total=total or None, unit="B", unit_scale=True, desc=path.name) as bar,
        ):
            while data := response.read(chunk_size):
                file.write(data)
                received += len(data)
                bar.update(len(data))
                if max_bytes is not None and received > max_bytes:
                    raise OSError(f"{url} sends more than {max_bytes} bytes")
        if received < total:
            raise OSError(f"{url} ended after {received} of {total} bytes; try again")


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"cannot download {url}: only http and https addresses are allowed")


def md5_hash(path: str | Path) -> str:
    """Return the MD5 sum of a file as 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def get_ckpt_path(name: str, root: str | Path, check: bool = False) -> str:
    """Return the path of a known weights file: in the folder `root`, else in the `lpips` package.

    Nothing is downloaded: the package holds the very file that 2021's code downloaded.

    Args:
        name: "vgg_lpips", the heads of LPIPS on VGG.
        root: folder that is looked into first.
        check: compare the MD5 sum.

    Raises:
        ValueError: the name is unknown, or the sum is wrong.
        FileNotFoundError: the file is in neither place.
    """
    if name not in CKPT_MAP:
        raise ValueError(f"unknown weights {name!r}; choose one of {', '.join(CKPT_MAP)}")
    path = os.path.join(root, CKPT_MAP[name])
    if not os.path.isfile(path):
        path = str(lpips_heads(CKPT_MAP[name].removesuffix(".pth")))
    if check and (found := md5_hash(path)) != MD5_MAP[name]:
        raise ValueError(f"{path} has the MD5 sum {found}, expected {MD5_MAP[name]}: get the file again")
    return path


def lpips_heads(net: str) -> Path:
    """Return the file with the heads of LPIPS for a network ("vgg", "alex", "squeeze"), in the lpips package.

    The package is not imported. Raises FileNotFoundError if it is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the heads of LPIPS come with the package lpips: pip install lpips")
    path = Path(spec.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the heads of LPIPS, is missing: install the package lpips again")
    return path


class KeyNotFoundError(Exception):
    """A path leads nowhere in a nested list or dict; `keys` is the path, `visited` its part that exists."""

    def __init__(self, cause: Any, keys: list[str] | None = None, visited: list[str] | None = None):
        self.cause = cause
        self.keys = keys
        self.visited = visited
        found = [f"Key not found: {keys}"] if keys is not None else []
        found += [f"Visited: {visited}"] if visited is not None else []
        super().__init__("\n".join([*found, f"Cause:\n{cause}"]))


def retrieve(
    list_or_dict: Any,
    key: str,
    splitval: str = "/",
    default: Any = None,
    expand: bool = True,
    pass_success: bool = False,
) -> Any:
    """Return the value at the path `key`, such as `data/train/0`, in nested lists and dicts.

    A callable on the path is called, and replaced in place by its result, unless `expand` is False. With
    `pass_success` the result is the pair (value, whether it was found). Raises KeyNotFoundError if the path
    leads nowhere and `default` is None.
    """
    try:
        value, success = _follow(list_or_dict, key.split(splitval), expand), True
    except KeyNotFoundError:
        if default is None:
            raise
        value, success = default, False
    return (value, success) if pass_success else value


def _follow(node: Any, keys: list[str], expand: bool) -> Any:
    visited: list[str] = []
    parent: Any = None
    for key in keys:
        if callable(node):
            if not expand:
                cause = ValueError("Trying to get past callable node with expand=False.")
                raise KeyNotFoundError(cause, keys=keys, visited=visited)
            node = _expand(parent, visited, node)
        parent = node
        try:
            node = node[key] if isinstance(node, Mapping) else node[int(key)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise KeyNotFoundError(error, keys=keys, visited=visited) from error
        visited.append(key)
    return _expand(parent, visited, node) if expand and callable(node) else node


def _expand(parent: Any, visited: list[str], node: Any) -> Any:
    """Call a node, and replace it by its result."""
    value = node()
    if parent is not None:  # the root cannot be replaced
        parent[visited[-1] if isinstance(parent, Mapping) else int(visited[-1])] = value
    return value


def count_params(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters of a model; tied weights count once."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)


def pick_device(name: str | None = None) -> torch.device:
    """Return the device called `name`; when None, the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no device {name} here ({reason}): choose cpu, or cuda with a GPU") from error
    return device


def number(
    kind: type[int] | type[float], least: float, most: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """A type for argparse: a finite number from `least`, or `above` it, to `most`; the error says so."""
    expected = f"a {'whole ' if kind is int else ''}number {'above' if above else 'of at least'} {least}"
    expected += "" if most == math.inf else f", at most {most}"

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is not a number
    return read
