"""Limits on what visitors send: files that may be no images or far too large, and endless request bodies.

H W pixels.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image, UnidentifiedImageError

from taming.data.files.errors import BadImage
from taming.data.files.images import read_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # other readers of Pillow start programs
MAX_UPLOAD_PIXELS = 50_000_000  # more than a camera has; 150 MB as RGB

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def read_upload(path: str | Path, max_pixels: int = MAX_UPLOAD_PIXELS) -> Image.Image:
    """Read an uploaded file as an upright RGB image; its header is checked before anything is decoded.

    Raises:
        ValueError: no image, a damaged one, or one of more than `max_pixels` pixels.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            size: tuple[int, int] | None = image.size
    except Image.DecompressionBombError:
        size = None  # Pillow's own limit, which is higher
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{path.name} is not an image that can be read here: take one of {kinds}") from error
    if size is None or size[0] * size[1] > max_pixels:
        found = "far more" if size is None else f"{size[1]}x{size[0]} (height x width)"
        raise ValueError(
            f"{path.name} is too large: its header says {found} pixels, and at most {max_pixels / 1e6:g} "
            "million are read; make it smaller first"
        )
    try:
        return Image.fromarray(read_image(path))
    except BadImage as error:
        raise ValueError(f"{path.name} is a damaged image: {error.__cause__ or error}") from error


def forbid_fetching() -> None:
    """Let gradio, in this process, fetch no file from an address that a visitor sends instead of a file.

    It would do so from here, where other machines may be reached than from the visitor's.
    """
    import safehttpx  # through which gradio fetches; the second checks the address before

    async def fetch(url: object, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"{str(url)[:200]} is not fetched: upload a file")

    safehttpx.get = safehttpx.async_validate_url = fetch


class BodyLimit:
    """ASGI middleware that answers requests with a body of more than `limit` bytes with status 413.

    The limit of gradio on files does not cover other requests, paintings for instance. A visitor who leaves
    while a body is sent, or is rejected then, is not an error of the server, and nothing is logged.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        from starlette.requests import ClientDisconnect

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        received, rejected = int(length) if length.isdigit() else 0, False

        async def reject() -> None:
            nonlocal rejected
            rejected = True
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": f"more than {self.limit} bytes".encode()})

        if received > self.limit:
            return await reject()
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:  # a body in pieces, which named no length
                if not rejected:
                    await reject()
                return {"type": "http.disconnect"}
            return message

        async def unless_rejected(message: Message) -> None:
            if not rejected:
                await send(message)

        with suppress(ClientDisconnect):
            await self.app(scope, counted, unless_rejected)
