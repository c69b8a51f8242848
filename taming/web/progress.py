"""A job while it runs: its progress, the image so far, and whether it is to stop.

B batch, H W pixels, h w latent grid.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from taming.images import image_grid, load_png, to_pil
from taming.inference.loading import decode
from taming.models.cond_transformer import Net2NetTransformer

INTERVAL = 0.25  # seconds between two messages, at least
PREVIEW_SHARE = 0.2  # of the time that decoding the image so far may take
BLANK = 0.7  # light gray, in [-1, 1], where nothing is generated yet


Visitor = str | None  # what gradio calls a visitor


@dataclass(frozen=True)
class Progress:
    """The progress of a job; `image` if there is something new to show."""

    message: str
    image: Image.Image | None = None


class Job:
    """The generation of some images, which can be cancelled before and while it runs."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop it at the next code."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled.is_set()


class Jobs:
    """The job of each visitor, which can also be cancelled while it waits for its turn."""

    def __init__(self) -> None:
        self._jobs: dict[Visitor, tuple[Job, str]] = {}  # with its state: waiting, running, over
        self._lock = threading.Lock()

    def wait(self, visitor: Visitor) -> None:
        """Note that a visitor asks for images; a call that comes after `begin` changes nothing."""
        with self._lock:
            if self._state(visitor) != "running":
                self._jobs[visitor] = Job(), "waiting"

    def begin(self, visitor: Visitor) -> Job:
        """Return the job of a visitor whose turn it is."""
        with self._lock:
            job = self._jobs[visitor][0] if self._state(visitor) == "waiting" else Job()
            self._jobs[visitor] = job, "running"
            return job

    def end(self, visitor: Visitor) -> None:
        """Note that a job is over."""
        with self._lock:
            if visitor in self._jobs:
                self._jobs[visitor] = self._jobs[visitor][0], "over"

    def cancel(self, visitor: Visitor) -> None:
        """Cancel the job of a visitor."""
        with self._lock:
            if visitor in self._jobs:
                self._jobs[visitor][0].cancel()

    def forget(self, visitor: Visitor) -> None:
        """Cancel the job of a visitor who has left."""
        self.cancel(visitor)
        with self._lock:
            self._jobs.pop(visitor, None)

    def _state(self, visitor: Visitor) -> str:
        return self._jobs[visitor][1] if visitor in self._jobs else "over"


class Watch:
    """A callback of the samplers that reports progress and the image so far, and stops a cancelled job.

    Args:
        shape: latent grid (h, w).
        keep: codes (h, w) that are given, or None.
        report: is called with each `Progress`.
    """

    def __init__(
        self, model: Net2NetTransformer, shape: tuple[int, int], keep: Tensor | None, job: Job,
        report: Callable[[Progress], None],
    ):
        self.model, self.shape, self.job, self.report = model, shape, job, report
        self.keep = torch.zeros(shape, dtype=torch.bool) if keep is None else keep.cpu()
        self.total = int((~self.keep).sum())
        self.start = time.monotonic()
        self.reported = self.previewed = self.start
        self.cost = 0.0  # seconds that the last preview took

    def __call__(self, step: int, codes: Tensor) -> bool:
        now, done = time.monotonic(), step + 1
        if self.job.cancelled:
            return False
        if now - self.reported < INTERVAL:
            return True
        rate = done / (now - self.start)
        message = f"{done} of {self.total} codes, {rate * len(codes):.0f} a second, "
        message += f"{(self.total - done) / rate:.0f} s left"
        image = None
        if now - self.previewed >= self.cost / PREVIEW_SHARE:
            image = preview(self.model, self.shape, self.keep, step, codes)
            self.previewed = time.monotonic()
            self.cost = self.previewed - now
        self.reported = time.monotonic()
        self.report(Progress(message, image))
        return True


def preview(
    model: Net2NetTransformer, shape: tuple[int, int], keep: Tensor, step: int, codes: Tensor
) -> Image.Image:
    """Return the images after a step, side by side, gray where nothing is generated yet.

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
    # a decoder normalizes over the whole image: repeating what is there disturbs its colors least
    codes, known = codes.flatten(1).clone(), there.flatten().nonzero()[:, 0].to(codes.device)
    missing = (~there).flatten().nonzero()[:, 0].to(codes.device)
    codes[:, missing] = codes[:, known[torch.arange(len(missing), device=codes.device) % len(known)]]
    images = decode(model, codes.view(-1, *shape))
    factor = model.first_stage_model.factor
    there = there.cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    images = torch.where(there, images, torch.full_like(images, BLANK))
    return to_pil(images[0] if len(images) == 1 else image_grid(images))


def side_by_side(paths: Sequence[Path]) -> Image.Image:
    """Return finished images as `preview` shows them."""
    images = torch.stack([load_png(path) for path in paths])
    return to_pil(images[0] if len(images) == 1 else image_grid(images))
