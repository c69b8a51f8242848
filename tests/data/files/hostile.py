"""Files that are small and cost much to read, or whose headers lie; and a budget for what reads them."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
LONG = pytest.mark.skipif("TAMING_FUZZ" not in os.environ, reason="set TAMING_FUZZ for the long forms")
MEMORY, SECONDS = 2.0, 20.0  # GB, importing torch included; of one core, for each file

_CHILD = """
import importlib, json, os, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, torchvision
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))  # end here, rather than end the machine
module, name = sys.argv[1].split(":")
read = getattr(importlib.import_module(module), name)
for path in sys.argv[2:]:
    start = time.process_time()
    try:
        value = read(path)
        said = f"read {getattr(value, 'shape', type(value).__name__)}"
    except (ValueError, OSError) as error:
        said = str(error)
    print(json.dumps([path, said, time.process_time() - start]), flush=True)
# getrusage would count the process that started this one, too
hwm = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps(int(hwm[0].split()[1]) / 1e6))
"""


def read_within_budget(reader: str, paths: Sequence[Path]) -> dict[str, str]:
    """Read files in a process of their own, within the budget: {name: what was said}.

    `reader` is `module:function` of one path. Everything but ValueError and OSError fails, so do messages of
    several lines, and those that blame the memory.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("measures memory as Linux tells it")
    words = [sys.executable, "-c", _CHILD, reader, *map(str, paths)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120 + len(paths) * SECONDS)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-1500:])
    *rows, peak = map(json.loads, done.stdout.splitlines())
    assert peak < MEMORY, f"{peak:.1f} GB"
    for path, said, seconds in rows:
        assert seconds < SECONDS, (path, seconds)
        assert "\n" not in said and "MemoryError" not in said, (path, said)
    return {Path(path).name: said for path, said, _ in rows}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, channels: int = 4, rows: int | None = None, chunks: bytes = b"") -> bytes:
    """A black PNG with `rows` of its rows; `chunks` come before the pixels."""
    kind = {1: 0, 3: 2, 4: 6}[channels]
    packer, row = zlib.compressobj(1), bytes(1 + width * channels)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def tags(count: int, kind: int, values: int, order: str = "<") -> bytes:
    """A TIFF directory in a file: `count` tags of `values` values of a type, all in the same bytes."""
    entries = b"".join(struct.pack(f"{order}HHII", 300 + n, kind, values, 8) for n in range(count))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", count) + entries + bytes(4)


def jpeg_with(segments: bytes, image: bytes) -> bytes:
    return image[:2] + segments + image[2:]


def jpeg_segments(marker: int, data: bytes) -> bytes:
    """A segment, or as many as the data need; each begins with the EXIF header."""
    parts = [data[start:start + 65000] for start in range(0, len(data), 65000)]
    return b"".join(struct.pack(">BBH", 0xFF, marker, 8 + len(p)) + b"Exif\0\0" + p for p in parts)


def with_scans(image: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    last = image.rindex(b"\xff\xda")
    return image[:-2] + image[last:-2] * count + b"\xff\xd9"


def hostile_images() -> dict[str, bytes]:
    small = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    jpeg = encoded(small, "JPEG")
    webp = bytearray(encoded(small, "WEBP", lossless=True))
    size = webp.index(b"VP8L") + 9
    webp[size:size + 4] = struct.pack("<I", struct.unpack("<I", webp[size:size + 4])[0] | (1 << 28) - 1)
    jp2 = encoded(small, "JPEG2000")
    sixteen, many = struct.pack(">I", 16), struct.pack(">I", 40_000)
    jp2 = jp2.replace(sixteen * 2, many * 2)
    bmp = bytearray(encoded(Image.new("P", (4, 1)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 80_000_000, 1)
    bmp[30:34] = struct.pack("<I", 1)  # run-length encoded
    bmp[struct.unpack("<I", bmp[10:14])[0]:] = b"\0\x02\0\xff" * 4 + b"\0\x01"  # far down, four times
    gif = encoded(small.convert("P"), "GIF")
    head = 13 + (6 << (gif[10] & 7) if gif[10] & 0x80 else 0)
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * 80_000 + b"\0"
    tile = tags(2, 4, 1).replace(struct.pack("<HHII", 300, 4, 1, 8), struct.pack("<HHII", 322, 4, 1, 1 << 16))
    tile = tile.replace(struct.pack("<HHII", 301, 4, 1, 8), struct.pack("<HHII", 323, 4, 1, 1 << 16))
    tiff = encoded(small, "TIFF", compression="tiff_deflate")
    return {
        "too_large.png": png(12_000, 12_000),
        "claims.png": png(60_000, 60_000, rows=1),
        "wide.png": png(1 << 20, 1, rows=1),
        "chunks.png": png(16, 16, chunks=png_chunk(b"teSt", b"") * 200_000),
        "exif.png": png(16, 16, chunks=png_chunk(b"eXIf", tags(4000, 1, 1 << 20) + bytes(1 << 20))),
        "claims.webp": bytes(webp),
        "claims.jp2": jp2,
        "claims.bmp": bytes(bmp),
        "scans.jpg": with_scans(encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True), 20_000),
        "exif.jpg": jpeg_with(jpeg_segments(0xE1, tags(4000, 1, 1 << 20) + bytes(1 << 20)), jpeg),
        "comment.gif": gif[:head] + comment + gif[head:],
        "tags.tif": tags(4000, 1, 1 << 20) + bytes(1 << 20),
        "numbers.tif": tags(1, 3, 10_000_000).replace(
            struct.pack("<HH", 300, 3), struct.pack("<HH", 258, 3)) + bytes(20_000_000),
        "directories.tif": tiff + tags(100, 1, 1) * 2000,
        "tile.tif": tile + bytes(64),
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n",
    }
