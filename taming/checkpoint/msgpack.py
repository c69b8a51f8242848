"""Read the structure of files that flax writes: msgpack with arrays, whose data stay in the file.

Only what trees of arrays are made of is read, within limits; nothing is executed.

Source of the format: github.com/msgpack/msgpack/blob/master/spec.md; arrays are its extension type 1 in flax,
which holds another msgpack list: shape, name of the type, data.
"""

import math
import struct
from typing import Any, BinaryIO

import torch

from taming.checkpoint.pickles import StoredBytes, StoredTensor

MAX_DEPTH = 50
MAX_VALUES = 200_000  # a network of 1,000 layers has 20,000
MAX_TEXT = 1 << 12  # bytes of a name
ARRAY = 1  # flax's number for arrays among extension types
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}
NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h",
    0xD2: ">i", 0xD3: ">q",
}
LENGTHS = {1: ">B", 2: ">H", 4: ">I"}  # bytes of a length -> how it is read
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read_arrays(file: BinaryIO, size: int) -> dict[str, StoredTensor]:
    """Return the arrays of a tree by their names with dots, `encoder.conv_in.kernel`, from an open file.

    Args:
        file: at its start.
        size: its length in bytes.

    Raises:
        ValueError, EOFError: it is damaged, or holds something else than trees of arrays and numbers.
    """
    reader = _Reader(file, size)
    tree = reader.value(0)
    if file.tell() != size:
        raise ValueError(f"{size - file.tell()} bytes follow on the end of its tree")
    found: dict[str, StoredTensor] = {}
    _flatten(tree, "", found)
    if not found:
        raise ValueError("there are no arrays in it")
    return found


def _flatten(tree: Any, prefix: str, found: dict[str, StoredTensor]) -> None:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, StoredTensor):
            found[prefix + key] = value
        elif "__msgpack_chunked_array__" in (value if isinstance(value, dict) else ()):
            raise ValueError(f"the array {prefix}{key} is in pieces, as arrays above 1 GiB are")
        else:
            _flatten(value, f"{prefix}{key}.", found)


class _Reader:
    """Reads one value after the other; data of arrays and bytes are passed over."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.count = file, size, 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError("it ends within its tree")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        """Read one value: numbers, texts, lists, dicts with texts as keys, `StoredBytes`, `StoredTensor`."""
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} levels")
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code < 0x90:
            return self.mapping(code & 0x0F, depth)
        if code < 0xA0:
            return self.items(code & 0x0F, depth)
        if code < 0xC0:
            return self.text(code & 0x1F)
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBERS:
            return self.number(NUMBERS[code])
        if code in (0xC4, 0xC5, 0xC6):
            return self.pass_over(self.number(LENGTHS[1 << code - 0xC4]))
        if code in (0xC7, 0xC8, 0xC9):
            return self.extension(self.number(LENGTHS[1 << code - 0xC7]), depth)
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << code - 0xD4, depth)
        if code in (0xD9, 0xDA, 0xDB):
            return self.text(self.number(LENGTHS[1 << code - 0xD9]))
        if code in (0xDC, 0xDD):
            return self.items(self.number(LENGTHS[2 << code - 0xDC]), depth)
        if code in (0xDE, 0xDF):
            return self.mapping(self.number(LENGTHS[2 << code - 0xDE]), depth)
        raise ValueError(f"it has the byte {code:#x}, which begins no value")

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise ValueError(f"a name in it has {length} bytes")
        return self.take(length).decode()

    def items(self, length: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise ValueError(f"{key!r} in it is not a name, or is there twice")
            found[key] = self.value(depth + 1)
        return found

    def pass_over(self, length: int) -> StoredBytes:
        start = self.file.tell()
        if start + length > self.size:
            raise EOFError("it ends within its data")
        self.file.seek(length, 1)
        return StoredBytes(f"the data at byte {start}", start, length)

    def extension(self, length: int, depth: int) -> Any:
        """Read an array; other types, complex and single numbers, are passed over."""
        kind, start = self.number(">b"), self.file.tell()
        if kind != ARRAY:
            return self.pass_over(length)
        content = self.value(depth + 1)
        if self.file.tell() != start + length or not isinstance(content, list) or len(content) != 3:
            raise ValueError("an array in it is not a list of shape, type and data")
        shape, name, data = content
        dtype = DTYPES.get(name if isinstance(name, str) else "")
        fits = isinstance(shape, list) and len(shape) <= 64 and isinstance(data, StoredBytes)
        if dtype is None or not fits:
            raise ValueError(f"an array in it has a type unknown here, {str(name)[:40]!r}, or such a shape")
        if not all(type(side) is int and 0 <= side for side in shape):
            raise ValueError("an array in it has sides that are not whole numbers")
        if math.prod(shape) * dtype.itemsize != data.size:
            raise ValueError(f"an array in it has {data.size} bytes, which do not fit its shape")
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return StoredTensor(data, dtype, 0, tuple(shape), tuple(strides))
