"""The format of a code cache, `.tcc`: a header, packed records, checksums.

    0    8 bytes   MAGIC
    8    uint32    version, 1
    12   uint32    bytes of the header
    16   uint32    CRC-32 of the header
    20             the header, JSON in UTF-8; zeros up to a multiple of ALIGNMENT
                   R bytes for each record, one record after the other
                   uint32 CRC-32 of each BLOCK bytes of records; the last block may be shorter

Numbers are little-endian. A record holds the fields of one image, one after the other, as a stream of bits,
the lowest bit first, with zeros up to a whole byte. A field is an array of numbers of `bits` bits each: 1,024
codes take 10 bits. Records are ordered by view, then by image: view v of image i is number v * images + i.

B records, R bytes of a record.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC = b"\x8aTCC\r\n\x1a\n"  # a transfer as text would change it
VERSION = 1
PREFIX = struct.Struct("<8sIII")
ALIGNMENT = 64  # bytes
BLOCK = 1 << 16  # bytes of records that share a checksum
SLACK = 8  # bytes behind packed records that `unpack` may touch

CODES = "codes"  # name of the codes; of several grids "codes/0", "codes/1", ..., in the tokenizer's order
TOKENS = "tokens/"  # before the key of a condition whose tokens are stored

MAX_HEADER = 1 << 22  # bytes; 20,000 names of classes take less than one
MAX_NUMBERS = 1 << 22  # in a record
MAX_FIELDS = 64
MAX_RECORDS = 1 << 40
MAX_VIEWS = 1 << 16


class CodeCacheError(ValueError):
    """A code cache cannot be used; the message names the file."""


class Field(NamedTuple):
    """An array that every record holds.

    Attributes:
        name: key of batches: `CODES`, `TOKENS` and the key of a condition, or the key of a label.
        shape: of one image: (h, w), (M,), or () for a label.
        values: how many different numbers there are, 0 to values - 1.
        bits: of a number, 1 to 32.
        stage: content hash of the condition stage that made tokens.
    """

    name: str
    shape: tuple[int, ...]
    values: int
    bits: int
    stage: str = ""

    @classmethod
    def of(cls, name: str, shape: Sequence[int], values: int, stage: str = "") -> "Field":
        """Make a field with the fewest bits that hold its values."""
        return cls(name, tuple(shape), values, max(1, (values - 1).bit_length()), stage)


@dataclass(frozen=True)
class CodeHeader:
    """What a code cache holds, and of what.

    Attributes:
        fields: what every record holds, in its order.
        images: number of images; records are `views` times as many.
        views: how often each image was encoded, with other crops and flips each time.
        tokenizer: content hash of the tokenizer; see `taming.checkpoint.content_hash`.
        about: for people, and for pictures: "class_names", "source", "seed", ...
    """

    fields: tuple[Field, ...]
    images: int
    views: int
    tokenizer: str
    about: Mapping[str, Any]

    @property
    def records(self) -> int:
        """Number of records."""
        return self.images * self.views

    @property
    def record_bytes(self) -> int:
        """R, bytes of a record."""
        return -(-sum(math.prod(field.shape) * field.bits for field in self.fields) // 8)

    @property
    def grids(self) -> list[Field]:
        """The fields that hold codes of the image, one for each level of the tokenizer."""
        return [field for field in self.fields if field.name.partition("/")[0] == CODES]

    def field(self, name: str) -> Field | None:
        """Return the field of that name, or None."""
        return next((field for field in self.fields if field.name == name), None)

    def to_bytes(self) -> bytes:
        """Return the beginning of the file, up to the first record.

        Raises:
            ValueError: more than MAX_HEADER bytes.
        """
        content = {
            "fields": [field._asdict() for field in self.fields], "images": self.images, "views": self.views,
            "tokenizer": self.tokenizer, "about": self.about,
        }
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > MAX_HEADER:
            raise ValueError(f"the header of the code cache would have {len(text)} bytes, over {MAX_HEADER}")
        start = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        return start + bytes(-len(start) % ALIGNMENT)


def grid_names(count: int) -> list[str]:
    """Return the names of the fields of so many grids."""
    return [CODES] if count == 1 else [f"{CODES}/{level}" for level in range(count)]


def read_header(file: BinaryIO, name: str) -> tuple[CodeHeader, int]:
    """Read the header of an open file; return it and the place of the first record. No record is read.

    Raises:
        CodeCacheError: no code cache, one of another version, a damaged header, or another size than the
            header says.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(PREFIX.size)
    again = "copy it again, or make it again with `taming encode`"
    if not start.startswith(MAGIC):
        raise CodeCacheError(f"{name} is not a code cache: make one with `taming encode`")
    if len(start) < PREFIX.size:
        raise CodeCacheError(f"code cache {name} ends after {size} bytes: {again}")
    _, version, length, checksum = PREFIX.unpack(start)
    if version != VERSION:
        raise CodeCacheError(
            f"code cache {name} has version {version} of the format, and {VERSION} is read here: "
            "encode again, or update taming"
        )
    if length > MAX_HEADER:
        raise CodeCacheError(f"code cache {name}: a header of {length} bytes is not read: {again}")
    text = file.read(length)
    if len(text) < length or zlib.crc32(text) != checksum:
        raise CodeCacheError(f"code cache {name}: the header is damaged: {again}")
    try:
        header = _parse(text)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CodeCacheError(
            f"code cache {name}: the header is wrong ({type(error).__name__}: {reason}): {again}"
        ) from error
    first = -(-(PREFIX.size + length) // ALIGNMENT) * ALIGNMENT
    data = header.records * header.record_bytes
    wanted = first + data + 4 * -(-data // BLOCK)
    if size != wanted:
        what = "is cut short: it" if size < wanted else "is longer than its header says: it"
        raise CodeCacheError(f"code cache {name} {what} has {size} of {wanted} bytes: {again}")
    return header, first


def _parse(text: bytes) -> CodeHeader:
    """Make a header of JSON, within limits of all its numbers."""
    content = json.loads(text)
    fields = tuple(
        Field(str(f["name"]), tuple(map(_whole, f["shape"])), _whole(f["values"]), _whole(f["bits"]),
              str(f["stage"]))
        for f in content["fields"]
    )
    header = CodeHeader(
        fields, _whole(content["images"]), _whole(content["views"]), str(content["tokenizer"]),
        dict(content["about"]),
    )
    if not 1 <= len(fields) <= MAX_FIELDS or len({field.name for field in fields}) < len(fields):
        raise ValueError(f"{len(fields)} fields, or two of one name")
    for field in fields:
        if not 1 <= field.bits <= 32 or not 1 <= field.values <= 1 << field.bits:
            raise ValueError(f"{field.values} values in {field.bits} bits")
        if len(field.shape) > 2 or any(side < 1 for side in field.shape):
            raise ValueError(f"the shape {field.shape}")
    if sum(math.prod(field.shape) for field in fields) > MAX_NUMBERS:
        raise ValueError(f"more than {MAX_NUMBERS} numbers in a record")
    if not 1 <= header.views <= MAX_VIEWS or not 1 <= header.records <= MAX_RECORDS:
        raise ValueError(f"{header.images} images in {header.views} views")
    if not header.grids:
        raise ValueError("no codes")
    return header


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{str(value)[:50]} is not a whole number")
    return value


# ---- records


def pack(fields: Sequence[Field], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pack arrays (B, *shape) of all fields into records, uint8 (B, R).

    Raises:
        ValueError: another shape than the field's, or a number that it does not have.
    """
    streams = []
    for field in fields:
        array, count = np.asarray(values[field.name]), math.prod(field.shape)
        if array.shape[1:] != field.shape:
            raise ValueError(f"{field.name} has the shape {array.shape[1:]}, the code cache {field.shape}")
        for extreme in (array.min(), array.max()) if array.size else ():
            if not 0 <= extreme < field.values:
                raise ValueError(f"{field.name} holds {extreme}, but its values are 0 to {field.values - 1}")
        numbers = np.ascontiguousarray(array.reshape(len(array), count), "<u4")  # (B, n)
        octets = numbers[..., None].view(np.uint8)  # (B, n, 4)
        bits = np.unpackbits(octets, axis=-1, count=field.bits, bitorder="little")  # (B, n, bits)
        streams.append(bits.reshape(len(array), count * field.bits))
    return np.packbits(np.concatenate(streams, axis=1), axis=1, bitorder="little")


def unpack(fields: Sequence[Field], records: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Unpack records into arrays (B, *shape), int64, by the names of the fields.

    The places of numbers within bytes repeat after at most 8 of them, so that every eighth number, of all
    records, is read, shifted and masked at once.

    Args:
        fields: what a record holds.
        records: uint8 (B * R + SLACK,), the records and some bytes that do not matter.
        count: B.

    Raises:
        ValueError: a number that its field does not have.
    """
    if not count:
        return {field.name: np.empty((0, *field.shape), np.int64) for field in fields}
    size = (len(records) - SLACK) // count  # R
    arrays, start = {}, 0  # bit of the record where the field begins
    for field in fields:
        n, bits = math.prod(field.shape), field.bits
        array = np.empty((count, n), np.int64)
        period = 8 // math.gcd(bits, 8)  # numbers
        for j in range(min(period, n)):
            first, shift = divmod(start + j * bits, 8)
            word = "<u4" if shift + bits <= 32 else "<u8"
            shape, strides = (count, -(-(n - j) // period)), (size, bits * period // 8)
            view: np.ndarray = np.ndarray(shape, word, records, first, strides)
            array[:, j::period] = (view >> shift) & ((1 << bits) - 1)
        if field.values < 1 << bits and (most := array.max()) >= field.values:
            raise ValueError(f"{field.name} holds {most}, but its values are 0 to {field.values - 1}")
        arrays[field.name] = array.reshape(count, *field.shape)
        start += n * bits
    return arrays


def checksums(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, int | None]]:
    """Cut a stream of bytes into pieces; yield them, the last one of a block with its checksum."""
    room, checksum = BLOCK, 0
    for piece in pieces:
        for start in range(0, len(piece), BLOCK):
            rest = memoryview(piece)[start:start + BLOCK]
            while rest:
                part, rest = rest[:room], rest[room:]
                checksum, room = zlib.crc32(part, checksum), room - len(part)
                yield bytes(part), None if room else checksum
                if not room:
                    room, checksum = BLOCK, 0
    if room < BLOCK:
        yield b"", checksum
