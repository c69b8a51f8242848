"""Numpy's .npz files, read as data: nothing in them is executed, or allocated on their word alone.

ADM keeps images and statistics in them (Dhariwal and Nichol 2021): `arr_0`, uint8 (N, H, W, 3), and the
moments of their features, `mu`, `sigma`, `mu_s` and `sigma_s`.
"""

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from taming.util import open_file

MAX_COMPRESSED = 4 << 30  # bytes of an array that has to be decompressed into memory
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LOCAL_HEADER = 30  # bytes, before the name and the extra field


class NpzFile:
    """The arrays of a file; those without compression are mapped to it, not read, until they are used.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open_file(self.path, "npz file")
        try:
            self._zip = zipfile.ZipFile(self._file)
            self._members = {m.filename.removesuffix(".npy"): m for m in self._zip.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            self._file.close()
            raise ValueError(f"{self.path} is not an .npz file, or is damaged: {error}") from error

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._members)

    def array(self, name: str) -> np.ndarray:
        """Return an array in memory of its own.

        Raises:
            ValueError: no such array, or a damaged one, or one of Python objects.
        """
        return np.array(self.mapped(name))

    def mapped(self, name: str) -> np.ndarray:
        """Return an array, read-only, mapped to the file where it is stored without compression."""
        if name not in self._members:
            raise ValueError(f"{self.path} has no array {name}; it has {', '.join(self.names) or 'none'}")
        member = self._members[name]
        try:
            with self._zip.open(member) as stream:
                shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
                size, offset = math.prod(shape) * dtype.itemsize, stream.tell()
                if dtype.hasobject or any(side < 0 for side in shape):
                    raise ValueError(f"{dtype} {shape}")
                if offset + size != member.file_size:
                    raise ValueError(f"{member.file_size} bytes for the shape {shape} of {dtype}")
                if size and member.compress_type == zipfile.ZIP_STORED:
                    offset += self._data_offset(member)
                    order: Any = "F" if fortran else "C"
                    return np.memmap(self.path, dtype, "r", offset, shape, order)
                if size > MAX_COMPRESSED:
                    raise ValueError(f"{size} bytes compressed: save it without compression")
                values = np.frombuffer(stream.read(), dtype)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{self.path}: the array {name} is damaged, or not an array: {error}") from error
        return values.reshape(shape, order="F" if fortran else "C")

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Return where the data of a member begin; the local header may differ from the directory's."""
        self._file.seek(member.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError("its header is missing")
        name, extra = struct.unpack("<HH", header[26:])
        offset = member.header_offset + _LOCAL_HEADER + name + extra
        if offset + member.file_size > self.path.stat().st_size:
            raise ValueError("it reaches beyond the end of the file")
        return offset

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()
        self._file.close()


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays without compression. The path may have any suffix."""
    with open(path, "wb") as file:
        np.savez(file, **dict[str, Any](arrays))


def write_images(
    path: Path,
    images: Iterator[np.ndarray],
    shape: tuple[int, ...],
    more: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write images as ADM's evaluator reads them, `arr_0`, one batch after the other.

    Args:
        path: the file.
        images: uint8 (n, H, W, 3) each.
        shape: (N, H, W, 3), of all together.
        more: other arrays.

    Raises:
        ValueError: the batches are of another shape.
    """
    seen = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for batch in images:
                if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                    raise ValueError(f"images of {batch.shape[1:]}, the first have {shape[1:]}")
                member.write(np.ascontiguousarray(batch).tobytes())
                seen += len(batch)
        for name, values in (more or {}).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    if seen != shape[0]:
        raise ValueError(f"{seen} images were given for an array of {shape[0]}")
