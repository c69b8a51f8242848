"""Checks of image files before Pillow opens them: what is small in the file and large, or slow, in memory.

Pillow limits the pixels and the texts of an image. Here are limits for the rest of what it reads: tags that
name the same bytes thousands of times, the scans of a JPEG, comments of a GIF that are copied repeatedly.
"""

import re
import zlib
from typing import Literal

Order = Literal["little", "big"]

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF: dict[bytes, tuple[Order, int]] = {  # header -> byte order, bytes of an offset (8 in BigTIFF)
    b"II*\0": ("little", 4), b"MM\0*": ("big", 4), b"II+\0": ("little", 8), b"MM\0+": ("big", 8),
}
_UNITS = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of a value, by its type in TIFF
_BYTES = (1, 2, 7)  # types that Pillow keeps as bytes; it makes Python numbers of the others
_MARKER = re.compile(rb"\xff+([^\x00\xff])")  # of JPEG; 0xff 0x00 is a byte of the image

MAX_DIRECTORIES = 1000  # of tags, in a file; photos have a few
MAX_TAGS = 4096  # in a directory
MAX_NUMBERS = 1 << 21  # in the tags of a directory
MAX_CHUNKS = 1 << 17  # of a PNG
MAX_SCANS = 100  # of a JPEG; usual ones have 1 to 14
MAX_BLOCKS = 1 << 14  # of up to 255 bytes, before the first frame of a GIF
MAX_EXIF = 1 << 16  # bytes of EXIF data in a JPEG, or in a text of a PNG


def check_header(data: bytes) -> bytes:
    """Return the bytes of an image file; those of a PNG without its texts and its colour profile.

    Raises:
        ValueError: the file takes far more memory or time than its pixels need.
    """
    if data.startswith(_PNG):
        return _without_texts(data)
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    else:  # WebP and AVIF hold EXIF data somewhere
        _check_tags(data, 0, len(data))
    return data


def _check_tags(data: bytes, begin: int, end: int) -> None:
    """Check the first directory of each TIFF file that is a part of the data; EXIF data are such files."""
    directories = 0
    for header, (order, width) in _TIFF.items():
        start = data.find(header, begin, end)
        while start >= 0:
            _check_directory(data, start, order, width)
            directories += 1
            if directories > MAX_DIRECTORIES:
                raise ValueError(f"more than {MAX_DIRECTORIES} directories of tags")
            start = data.find(header, start + len(header), end)


def _check_directory(data: bytes, base: int, order: Order, width: int) -> None:
    """Check a directory of tags; `base` is where its offsets count from, `width` how many bytes they have."""
    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start:start + size], order)

    head, size = (8, 20) if width == 8 else (2, 12)  # bytes of the count, and of a tag
    place = base + number(base + width, width)
    tags, place = number(place, head), place + head
    total = numbers = 0
    for index in range(tags):
        start = place + index * size
        if start >= len(data):
            break
        if index == MAX_TAGS:
            raise ValueError(f"{tags} tags, more than {MAX_TAGS}")
        kind, values = number(start + 2, 2), number(start + 4, width)
        unit = _UNITS[kind] if kind < len(_UNITS) else 0
        total += values * unit
        numbers += values if kind not in _BYTES and unit else 0
    if total > len(data) + MAX_EXIF or numbers > MAX_NUMBERS:
        raise ValueError(f"tags with {numbers} numbers and {total} bytes in a file of {len(data)} bytes")


def _without_texts(data: bytes) -> bytes:
    """Leave out the texts and the colour profile of a PNG, which nothing here reads and Pillow limits.

    A short text that can say how the image is turned is kept.
    """
    kept, start, left_out = [slice(0, len(_PNG))], len(_PNG), False
    for _ in range(MAX_CHUNKS):
        kind = data[start + 4:start + 8]
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        text = data[start + 8:end - 4] if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") else None
        if text is not None and not _is_orientation(kind, text):
            left_out = True
        else:
            if kind == b"eXIf":
                _check_tags(data, start, end)
            kept.append(slice(start, end))
        start = end
        if kind == b"IEND" or start >= len(data):
            return b"".join(data[part] for part in kept) if left_out else data
    raise ValueError(f"more than {MAX_CHUNKS} chunks")


def _is_orientation(kind: bytes, text: bytes) -> bool:
    """Say whether a text of a PNG is short and may hold the orientation."""
    key, _, value = text[:MAX_EXIF].partition(b"\0")
    if len(text) > MAX_EXIF:
        return False
    if kind == b"zTXt" and key == b"Raw profile type exif":
        unpack = zlib.decompressobj()
        try:
            unpack.decompress(value[1:], MAX_EXIF)
        except zlib.error:
            return False
        return not unpack.unconsumed_tail
    if kind == b"iTXt":
        return key == b"XML:com.adobe.xmp" and value[:1] == b"\0"  # 0: not compressed
    return kind == b"tEXt" and key == b"Raw profile type exif"


def _check_jpeg(data: bytes) -> None:
    """Check the EXIF data of a JPEG, and count its scans, each of which takes the time of the whole image."""
    scans, exif, components, place = 0, 0, 0, 2
    while match := _MARKER.search(data, place):
        marker, place = match[1][0], match.end()
        if marker == 0xD9:  # the end of the image; others can follow in the file
            return
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # these have no length
            continue
        if marker in (0xC0, 0xC1):  # neither progressive nor lossless
            components = data[place + 7] if place + 7 < len(data) else 0
        if marker == 0xE1 and data.startswith(b"Exif\0\0", place + 2):
            exif += int.from_bytes(data[place:place + 2], "big")
            if exif > MAX_EXIF:
                raise ValueError(f"more than {MAX_EXIF} bytes of EXIF data")
        if marker == 0xDA:
            if not scans:
                _check_tags(data, 0, place)
                if components and data[place + 2:place + 3] == bytes([components]):
                    return  # one scan holds all components
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"more than {MAX_SCANS} scans")
        place += int.from_bytes(data[place:place + 2], "big")


def _check_gif(data: bytes) -> None:
    """Count the blocks of comments and the like before the first frame of a GIF."""
    place = 13 + (6 << (data[10] & 7) if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = 0
    while place < len(data) and data[place] not in b",;":
        extension = data[place] == ord("!")
        place += 2 if extension else 1
        while extension and place < len(data) and (length := data[place]):
            place, blocks = place + 1 + length, blocks + 1
        place, blocks = place + extension, blocks + 1
        if blocks > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} blocks before the first frame")
