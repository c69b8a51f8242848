"""Read files of torch.save and safetensors: their structure first, and the bytes of tensors that are wanted.

Four formats: the zip file that torch writes since version 1.6, the stream of pickles before it, safetensors,
and flax's msgpack. Tensors are read into memory of their own, and compared with the CRC-32 where the file has
one, or they are mapped.
"""

import io
import json
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from taming.checkpoint.msgpack import read_arrays
from taming.checkpoint.pickles import STORAGES, ForbiddenNameError, StoredBytes, StoredTensor, unpickle

ZIP_MAGIC = b"PK\x03\x04"
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # the first number in a file of torch before 1.6
MAX_PICKLE = 1 << 26  # bytes
MAX_HEADER = 1 << 25  # bytes of a safetensors header, or of a zip file's list of entries
PROGRAM = "/code/__torch__"  # is in the names of entries of TorchScript's files
CHUNK = 1 << 20  # bytes that are read and summed at a time, while they are in the processor's cache
CHECKSUMS, DECLARED = "crc32", "checksums"  # our entries in the metadata of a safetensors file
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}


class FormatError(ValueError):
    """A file is of none of these formats, or holds something else than a checkpoint."""


class TensorFile:
    """An open file with tensors; close it, or use it in a `with` statement.

    Args:
        path: an ordinary file; others, which could make the reader wait, are a ValueError.
        mmap: map tensors instead of reading them. Their checksums are not verified then, and writing to the
            file while they are in use ends the process.
    """

    def __init__(self, path: Path, mmap: bool = False):
        self.path, self.mmap = path, mmap
        self._file = open_ordinary(path)
        self.size = os.fstat(self._file.fileno()).st_size
        self._storages: dict[StoredBytes, Tensor] = {}
        self._mapped: Tensor | None = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def structure(self) -> tuple[Any, dict[str, str]]:
        """Return what the file holds, with `StoredTensor`s, and the metadata of a safetensors file.

        Raises:
            ForbiddenNameError: it asks for names that no checkpoint needs.
            FormatError: it is of another format.
            ValueError, EOFError, LookupError, ...: it is damaged.
        """
        if self.path.suffix == ".safetensors":
            return self._read_safetensors()
        if self.path.suffix == ".msgpack":
            return {"state_dict": read_arrays(self._file, self.size)}, {}
        is_zip = self._file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        self._file.seek(0)
        return self._read_zip() if is_zip else self._read_stream(), {}

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Return a tensor with its data; tensors that share data in the file share memory.

        Raises:
            ValueError, EOFError: its bytes are not those that were written.
        """
        data, size = stored.data, stored.dtype.itemsize
        if data not in self._storages:
            self._storages[data] = self._map(data, size) if self.mmap else self._read(data)
        elements = self._storages[data][: data.size // size * size].view(stored.dtype)
        return elements.as_strided(stored.shape, stored.stride, elements.storage_offset() + stored.offset)

    # ---- bytes

    def _read(self, data: StoredBytes) -> Tensor:
        storage = torch.empty(data.size, dtype=torch.uint8)
        view = memoryview(storage.numpy())  # type: ignore[arg-type]
        crc = data.seed
        self._file.seek(data.start)
        for start in range(0, data.size, CHUNK):
            piece = view[start : start + CHUNK]
            if self._file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise EOFError(f"it ends within {data.name}")
            if data.crc is not None:
                crc = zlib.crc32(piece, crc)
        if data.crc not in (None, crc):
            raise ValueError(f"the checksum of {data.name} is wrong: bytes have changed since it was written")
        return storage

    def _map(self, data: StoredBytes, alignment: int) -> Tensor:
        if self._mapped is None:
            self._mapped = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        piece = self._mapped[data.start : data.start + data.size]
        return piece if data.start % alignment == 0 else piece.clone()

    # ---- formats

    def _read_zip(self) -> Any:
        entries = self._entries()
        programs = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise FormatError("a zip file, but not one of torch.save")
        root = programs[0].removesuffix("data.pkl")
        order = entries.get(f"{root}byteorder")
        if order is not None and self._read(order).numpy().tobytes() != b"little":
            raise ValueError("its numbers are in the byte order of another machine")
        program = entries[programs[0]]
        if program.size > MAX_PICKLE:
            raise ValueError(f"{program.name} has {program.size} bytes, more than {MAX_PICKLE}")

        def storage(identifier: tuple[Any, ...]) -> tuple[StoredBytes, torch.dtype]:
            _, kind, key, _, count = identifier
            return _checked(entries[f"{root}data/{key}"], kind, count)

        return unpickle(io.BytesIO(self._read(program).numpy().tobytes()), storage)

    def _entries(self) -> dict[str, StoredBytes]:
        """List the entries of a zip file by name; they must be stored uncompressed, each name once."""
        with zipfile.ZipFile(_Limited(self._file, self.size)) as archive:  # type: ignore[call-overload]
            listed = archive.infolist()
        if any(PROGRAM in entry.orig_filename for entry in listed):
            raise FormatError(
                "it is a TorchScript program, as Cosmos' encoder.jit, decoder.jit and autoencoder.jit are: "
                "code that would run here, not weights by name. Load it with torch.jit.load in a program of "
                "its own if you trust it, or take a tokenizer of docs/checkpoints.md"
            )
        found: dict[str, StoredBytes] = {}
        for entry in listed:
            name = entry.orig_filename
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its entry {name[:80]} is compressed, which torch.save never does")
            self._file.seek(entry.header_offset)
            header = self._file.read(30)
            name_length, extra_length = struct.unpack("<HH", header[26:])
            encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
            is_here = header[:4] == ZIP_MAGIC and self._file.read(name_length).decode(encoding) == name
            if not is_here or name in found:
                raise ValueError(f"its entry {name[:80]} is not where its list says, or is there twice")
            start = entry.header_offset + 30 + name_length + extra_length
            found[name] = StoredBytes(name, start, entry.file_size, entry.CRC or None)  # 0: not computed
        if sum(data.size for data in found.values()) > self.size:
            raise ValueError("its entries overlap, or do not lie within the file")
        return found

    def _read_stream(self) -> Any:
        """Read the format of torch before 1.6: five pickles, then size and data of each storage."""
        program = io.BytesIO(self._file.read(MAX_PICKLE))
        found: dict[str, StoredBytes] = {}

        def storage(identifier: tuple[Any, ...]) -> Any:
            if identifier[0] == "module":  # a class, followed by its source code, which is not looked at
                return identifier[1]
            _, kind, key, _, count, view = identifier
            if view is not None:
                raise ValueError("its tensors are views of the kind that torch before 0.4 had")
            data = found.setdefault(key, StoredBytes(f"storage {key}", 0, count * _dtype_of(kind).itemsize))
            return _checked(data, kind, count)

        try:
            magic = unpickle(program, storage)
        except ForbiddenNameError:
            raise
        except Exception:  # any other file, read as a pickle
            magic = None
        if magic != OLD_MAGIC:
            raise FormatError("neither a file of torch.save nor named .safetensors")
        _version, _machine, content, keys = (unpickle(program, storage) for _ in range(4))
        position = program.tell()
        for key in keys:
            found[key].start = position + 8  # behind the number of elements
            position += 8 + found[key].size
        if position > self.size or len(set(keys)) != len(found):
            raise EOFError("it ends within its tensors")
        return content

    def _read_safetensors(self) -> tuple[dict[str, Any], dict[str, str]]:
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"its header would have {length} bytes")
        header = json.loads(self._file.read(length))
        metadata = header.pop("__metadata__", {})
        sums = json.loads(metadata.pop(CHECKSUMS, "null"))
        if metadata.get(DECLARED) is not None and sums is None:
            raise ValueError("its checksums are gone")
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
            first, last = entry["data_offsets"]
            if first != end or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the place of {name[:80]} in it does not fit its shape")
            end = last
            data = StoredBytes(name, 8 + length + first, last - first)
            if sums is not None:
                data.crc, data.seed = sums[name], _seed(name, dtype, shape)
            strides = torch.empty(shape, dtype=dtype, device="meta").stride()
            tensors[name] = StoredTensor(data, dtype, 0, shape, strides)
        if 8 + length + end != self.size:
            raise EOFError(f"it has {self.size} bytes, not {8 + length + end}")
        return {"state_dict": {name: tensors[name] for name in header}}, metadata


class _Limited:
    """A file that is read in small pieces: zipfile trusts the size of a list of entries."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if (count if count >= 0 else self.size - self.tell()) > MAX_HEADER:
            raise ValueError("its list of entries is too long")
        return self.file.read(count)


def open_ordinary(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is a folder, a pipe or a device, from which reading may never end.

    Raises:
        FileNotFoundError, PermissionError: it is not there, or may not be read.
        ValueError: it is of another kind.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is a folder, a pipe or a device, not a file")
    return path.open("rb")


def checksums(tensors: Mapping[str, Tensor]) -> str:
    """Sum up contiguous tensors, their names, types and shapes, for the metadata of a safetensors file."""
    sums = {}
    for name, tensor in tensors.items():
        data: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        sums[name] = zlib.crc32(data, _seed(name, tensor.dtype, tuple(tensor.shape)))
    return json.dumps(sums)


def _seed(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return zlib.crc32(f"{name} {dtype} {list(shape)}".encode())


def _dtype_of(kind: Any) -> torch.dtype:
    dtype = STORAGES.get(getattr(kind, "path", ""))
    if dtype is None:
        raise ValueError("its tensors have elements of an unknown type")
    return dtype


def _checked(data: StoredBytes, kind: Any, count: Any) -> tuple[StoredBytes, torch.dtype]:
    dtype = _dtype_of(kind)
    if type(count) is not int or count * dtype.itemsize != data.size:
        raise ValueError(f"{data.name} has {data.size} bytes, not {count} elements of {dtype}")
    return data, dtype
