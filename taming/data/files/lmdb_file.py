"""Lmdb files, as LSUN is distributed: which keys they hold, and where the values lie.

The library of that name maps a file into memory and trusts it: a damaged or hostile one ends the process.
Here the layout of its version 0.9 (`MDB_page`, `MDB_node` and `MDB_meta` of mdb.c; 64 bits, little-endian) is
read page by page, and every place is checked. N entries, n nodes of a page.
"""

import os
import struct
from typing import BinaryIO, NamedTuple

import numpy as np

from taming.util import open_file

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16  # bytes of a page: number (8), unused (2), flags (2), end of the places of nodes (2), unused (2)
_META = struct.Struct("<II 16x I 48x HH 32x QQQ")  # after the header of the first two pages
_BRANCH, _LEAF = 1, 2  # flags of pages
_ELSEWHERE, _NESTED = 1, 2 | 4  # flags of nodes: the value has pages of its own; it is a database
_EMPTY = (1 << 64) - 1  # the root where there are no entries
MAX_DEPTH = 32  # of the tree
MAX_ENTRIES = 10_000_000


class Entries(NamedTuple):
    """Entries in the order of their keys: the keys, joined, and where the values lie, in bytes."""

    keys: bytes
    ends: np.ndarray  # (N + 1,) int64, of the keys
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) uint32

    def key(self, index: int) -> bytes:
        start, end = self.ends[index:index + 2]
        return self.keys[start:end]


def read_entries(path: str | os.PathLike) -> Entries:
    """Read where the entries of the main database of an lmdb file lie.

    Values are not looked at: a place can be beyond the end of the file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not an lmdb file, cut off or damaged, or holds too many entries or nested databases.
    """
    with open_file(path, "lmdb file") as file:
        size = os.fstat(file.fileno()).st_size
        page_size, root, depth, pages = _read_meta(file, size)
        none = np.empty(0, np.int64)
        found = [(b"", none, none, none)]
        stack, count = ([] if root == _EMPTY else [(root, 1)]), 0
        visited: set[int] = set()
        while stack:
            number, level = stack.pop()
            if number >= pages or number in visited or level > min(depth, MAX_DEPTH):
                raise ValueError(f"page {number} is not where the tree of {pages} pages says")
            visited.add(number)
            page = np.frombuffer(os.pread(file.fileno(), page_size, number * page_size), np.uint8)
            flags, nodes = _read_nodes(page)
            if flags & _BRANCH:
                low, high, top = nodes[1:4]
                children = low | high << 16 | top << 32
                stack += [(child, level + 1) for child in children[::-1].tolist()]
                continue
            found.append(_read_leaf(page, nodes, number * page_size, page_size, pages))
            if (count := count + len(nodes[0])) > MAX_ENTRIES:
                raise ValueError(f"it holds more than {MAX_ENTRIES} entries")
    keys, key_sizes, offsets, sizes = zip(*found, strict=True)
    ends = np.concatenate([[0], *key_sizes]).cumsum()
    return Entries(b"".join(keys), ends, np.concatenate(offsets), np.concatenate(sizes).astype(np.uint32))


def _read_meta(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Return the size of a page, the root and depth of the tree, and the number of pages."""
    valid: list[tuple[int, ...]] = []
    for second in (False, True):  # they are written in turn
        start = (valid[0][2] if valid else 4096) if second else 0
        head = os.pread(file.fileno(), _HEADER + _META.size, start)
        if len(head) < _HEADER + _META.size:
            continue
        magic, version, page_size, flags, depth, root, last, transaction = _META.unpack_from(head, _HEADER)
        if (magic, version) == (_MAGIC, _VERSION) and 512 <= page_size <= 1 << 16 and not page_size & 1:
            valid.append((transaction, flags, page_size, root, depth, last + 1))
    if not valid:
        raise ValueError("it is not an lmdb file of version 1")
    _, flags, page_size, root, depth, pages = max(valid)
    if flags & 4:
        raise ValueError("its keys have several values each")
    if size < (wanted := pages * page_size):
        raise ValueError(
            f"it is cut off: it has {size} bytes of {wanted} or more (if it is whole, since images were "
            "removed from it, use what `mdb_copy -c` makes of it)"
        )
    return page_size, root, depth, pages


def _read_nodes(page: np.ndarray) -> tuple[int, tuple[np.ndarray, ...]]:
    """Return the flags of a page, and of its nodes: place, two halves of a number, flags, size of the key."""
    flags, lower = page[10:14].view("<u2").tolist() if len(page) >= _HEADER else (0, 0)
    if flags & ~0x10 not in (_BRANCH, _LEAF) or not _HEADER <= lower <= len(page) or lower & 1:
        raise ValueError("a page of the tree is damaged")
    places = page[_HEADER:lower].view("<u2").astype(np.int64)  # (n,)
    if (places > len(page) - 8).any():
        raise ValueError("a page of the tree is damaged")
    fields = page[places[:, None] + np.arange(8)].view("<u2").astype(np.int64)  # (n, 4)
    return flags, (places, *fields.T)


def _read_leaf(
    page: np.ndarray, nodes: tuple[np.ndarray, ...], start: int, page_size: int, pages: int
) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """Return the entries of a leaf that begins at the byte `start`: keys, their sizes, places, sizes."""
    places, low, high, flags, key_sizes = nodes
    sizes, elsewhere = low | high << 16, (flags & _ELSEWHERE) > 0
    inside = np.where(elsewhere, 8, sizes)  # bytes of the page
    ends = places + 8 + key_sizes + inside
    if (flags & _NESTED).any():
        raise ValueError("it holds nested databases")
    # Nodes must not overlap: a page could name so many that they fill the memory.
    if (ends > len(page)).any() or (8 + key_sizes + inside).sum() > len(page):
        raise ValueError("a page of the tree is damaged")
    first = np.concatenate([[0], key_sizes.cumsum()])
    keys = page[np.repeat(places + 8 - first[:-1], key_sizes) + np.arange(first[-1])].tobytes()
    offsets = start + places + 8 + key_sizes
    if elsewhere.any():
        numbers = page[(ends - 8)[elsewhere][:, None] + np.arange(8)].view("<u8")[:, 0]
        offsets[elsewhere] = np.minimum(numbers, pages).astype(np.int64) * page_size + _HEADER
    return keys, key_sizes, offsets, sizes
