"""A drawing while it runs: how far it is, what it looks like so far, and whether it is to stop.

B batch, H W pixels, h w latent grid.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from taming.images import from_uint8, image_grid, to_pil
from taming.inference.decoding import decode
from taming.models.cond_transformer import Net2NetTransformer

EVERY = 0.25  # seconds between two words of progress, at least
SHARE = 0.2  # of the time that looking at the picture so far may take
UNDRAWN = 0.7  # light gray, in [-1, 1]


@dataclass(frozen=True)
class Progress:
    """How far a drawing is; `image` where there is something new to be seen."""

    message: str
    image: Image.Image | None = None


class Job:
    """One drawing, which can be cancelled before and while it runs."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Have it stop at the next code."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it is to stop."""
        return self._cancelled.is_set()


class Jobs:
    """The drawing of each visitor, so that it can be cancelled, while it waits for its turn as well."""

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[Job, str]] = {}  # with its state: waiting, running, over
        self._lock = threading.Lock()

    def wait(self, visitor: str) -> None:
        """A visitor asks for a drawing; it may come here after that has begun, which changes nothing."""
        with self._lock:
            if self._state(visitor) != "running":
                self._jobs[visitor] = Job(), "waiting"

    def begin(self, visitor: str) -> Job:
        """It is the visitor's turn."""
        with self._lock:
            job = self._jobs[visitor][0] if self._state(visitor) == "waiting" else Job()
            self._jobs[visitor] = job, "running"
            return job

    def end(self, visitor: str) -> None:
        """The drawing is over."""
        with self._lock:
            if visitor in self._jobs:
                self._jobs[visitor] = self._jobs[visitor][0], "over"

    def cancel(self, visitor: str) -> None:
        """Stop what a visitor waits for."""
        with self._lock:
            if visitor in self._jobs:
                self._jobs[visitor][0].cancel()

    def forget(self, visitor: str) -> None:
        """A visitor has left."""
        self.cancel(visitor)
        with self._lock:
            self._jobs.pop(visitor, None)

    def _state(self, visitor: str) -> str:
        return self._jobs[visitor][1] if visitor in self._jobs else "over"


class Watch:
    """The callback of a sampler: tells of progress, shows the picture so far, and asks whether to go on."""

    def __init__(
        self, model: Net2NetTransformer, shape: tuple[int, int], keep: Tensor | None, job: Job,
        tell: Callable[[Progress], None],
    ):
        self.model, self.shape, self.job, self.tell = model, shape, job, tell
        self.keep = torch.zeros(shape, dtype=torch.bool) if keep is None else keep.cpu()
        self.total = int((~self.keep).sum())
        self.start = time.monotonic()
        self.told = self.shown = self.start
        self.cost = 0.0  # seconds that the last look took

    def __call__(self, step: int, codes: Tensor) -> bool:
        now, done = time.monotonic(), step + 1
        if self.job.cancelled:
            return False
        if now - self.told < EVERY:
            return True
        rate = done / (now - self.start)
        message = f"{done} of {self.total} codes, {rate * len(codes):.0f} a second, "
        message += f"{(self.total - done) / rate:.0f} s left"
        image = None
        if now - self.shown >= self.cost / SHARE:
            image = so_far(self.model, self.shape, self.keep, step, codes)
            self.shown = time.monotonic()
            self.cost = self.shown - now
        self.told = time.monotonic()
        self.tell(Progress(message, image))
        return True


def so_far(
    model: Net2NetTransformer, shape: tuple[int, int], keep: Tensor, step: int, codes: Tensor
) -> Image.Image:
    """The pictures after a step, side by side, gray where nothing is drawn yet.

    `codes` is what a callback of the sampler sees: the grid (B, h, w), or the codes so far (B, step + 1) in
    the permuter's order.
    """
    if codes.ndim == 2:
        count = shape[0] * shape[1]
        codes = F.pad(codes, (0, count - codes.shape[1]))
        there = (torch.arange(count, device=codes.device) <= step).long()[None]
        codes, there = (model.permuter(each, reverse=True).view(-1, *shape) for each in (codes, there))
        there = there[0].bool()
    else:
        order = (~keep).flatten().cumsum(0).view(shape)  # raster order, as the window goes
        there = keep | (order <= step + 1)
    # a decoder normalises over the whole picture: what is there, repeated, disturbs its colours least
    codes, drawn = codes.flatten(1).clone(), there.flatten().nonzero()[:, 0].to(codes.device)
    missing = (~there).flatten().nonzero()[:, 0].to(codes.device)
    codes[:, missing] = codes[:, drawn[torch.arange(len(missing), device=codes.device) % len(drawn)]]
    images = decode(model, codes.view(-1, *shape))
    factor = model.first_stage_model.factor
    there = there.cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    images = torch.where(there, images, torch.full_like(images, UNDRAWN))
    return to_pil(images[0] if len(images) == 1 else image_grid(images))


def side_by_side(paths: Sequence[Path]) -> Image.Image:
    """Finished pictures as `so_far` shows them."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return pictures[0] if len(pictures) == 1 else to_pil(image_grid(torch.stack([*map(from_pil, pictures)])))


def from_pil(picture: Image.Image) -> Tensor:
    """A picture as an image (3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(picture.convert("RGB")))).permute(2, 0, 1)
