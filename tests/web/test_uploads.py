"""What strangers send: files that are not images, damaged ones, bombs, endless bodies."""

import asyncio
import struct
import zlib

import pytest
from PIL import Image

from taming.web.uploads import BodyLimit, read_upload


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size, by its header, with next to nothing in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.mark.parametrize("content, message", [
    (b"", "is not an image that can be read here"),
    (b"not an image", "is not an image that can be read here: take one of PNG, JPEG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would start ghostscript
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    (png_header(8000, 8000), "its header says 8000x8000 (height x width) pixels, and at most 50 million"),
    (png_header(60000, 60000), "is too large: its header says far more pixels, and at most 50"),
    (png_header(64, 64), "is a damaged image"),
], ids=["empty", "text", "postscript", "svg", "large", "larger than Pillow allows", "cut off"])
def test_what_is_refused(tmp_path, content, message):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^upload\.png is ") as caught:
        read_upload(path)
    assert message in str(caught.value)


def test_a_bomb_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(8000, 8000))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="8000x8000"):
        read_upload(path)


def test_images_of_all_modes_come_upright_as_rgb(tmp_path):
    for mode, color in (("L", 128), ("RGBA", (1, 2, 3, 255)), ("P", 0), ("I;16", 65535), ("1", 1)):
        Image.new(mode, (6, 4), color).save(tmp_path / "a.png")
        assert (read_upload(tmp_path / "a.png").mode, read_upload(tmp_path / "a.png").size) == ("RGB", (6, 4))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=turned)
    assert read_upload(tmp_path / "a.jpg").size == (4, 6)


LEAVES = b"the visitor has gone"


def answer(pieces: list[bytes], headers: list[tuple[bytes, bytes]], limit: int) -> tuple[int | None, int]:
    """Status, none for who left before the body ended, and the bytes that the application has got."""
    requests = pytest.importorskip("starlette.requests", reason="it comes with gradio")
    sent, got = [], 0

    async def app(scope, receive, send):
        nonlocal got
        async for piece in requests.Request(scope, receive).stream():
            got += len(piece)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    waiting = list(pieces)

    async def receive():
        if waiting and waiting[0] == LEAVES:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    asyncio.run(BodyLimit(app, limit)({"type": "http", "headers": headers}, receive, send))
    return sent[0]["status"] if sent else None, got


def test_large_bodies_are_refused_whether_they_say_so_or_not():
    assert answer([b"12345"], [(b"content-length", b"5")], 10) == (200, 5)
    assert answer([b"1" * 20], [(b"content-length", b"20")], 10) == (413, 0)
    assert answer([b"1" * 6] * 5, [], 10) == (413, 6)
    assert answer([b"1" * 5] * 2, [(b"content-length", b"many")], 10) == (200, 10)


def test_who_leaves_amid_a_body_is_no_error():
    assert answer([b"123", LEAVES], [(b"content-length", b"9")], 10) == (None, 3)
