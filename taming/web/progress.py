"""A job while it runs: its progress, the image so far, and whether it is to stop.

B batch, H W pixels, h w latent grid.
"""

import math
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
from taming.models.tokenizer import Grid, Size, as_list
from taming.sampling.masked import UNDECIDED

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
        shape: latent grid (h, w), or both grids of two levels.
        keep: codes (h, w) that are given, or None; of two levels those of the coarser grid.
        report: is called with each `Progress`.
    """

    def __init__(
        self, model: Net2NetTransformer, shape: Grid, keep: Tensor | None, job: Job,
        report: Callable[[Progress], None],
    ):
        self.model, self.job, self.report = model, job, report
        self.shape = shape
        self.keep = torch.zeros(as_list(shape)[0], dtype=torch.bool) if keep is None else keep.cpu()
        self.total = sum(int((~_kept(self.keep, grid)).sum()) for grid in as_list(shape))
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
    model: Net2NetTransformer, shape: Grid, keep: Tensor, step: int, codes: Tensor
) -> Image.Image | None:
    """Return the images after a step, side by side, gray where nothing is generated yet.

    `codes` is what a callback of the sampler sees: the grid (B, h, w), or the codes so far (B, step + 1) in
    the permuter's order, or of two levels those of both grids, or all of them (B, N). There is nothing to see
    of the finer grid before its first code, so that the result is None. A masked prior has `UNDECIDED` in
    place of codes that are to come.
    """
    masked = bool((codes == UNDECIDED).any())
    grids: list[Size] = as_list(shape)
    count = sum(math.prod(grid) for grid in grids)
    if codes.ndim == 2 and len(grids) == 1:
        there = (torch.arange(count, device=codes.device) <= step).long()[None]
        codes = model.permuter(F.pad(codes, (0, count - codes.shape[1])), reverse=True)
        there = model.permuter(there, reverse=True)[0].bool()
    else:  # raster order of each grid, as the window goes
        codes = F.pad(codes.flatten(1), (0, count - codes[0].numel()))
        kept = torch.cat([_kept(keep, grid).flatten() for grid in grids])
        there = kept | ((~kept).cumsum(0) <= step + 1)
    if masked:
        there, codes = (codes != UNDECIDED).all(0), codes.clamp(min=0)
    filled, start = [], 0
    for grid in grids:
        end = start + math.prod(grid)
        there_here = there[start:end]
        known = there_here.nonzero()[:, 0].to(codes.device)
        if len(known) == 0:
            return None
        # a decoder normalizes over the whole image: repeating what is there disturbs its colors least
        own, missing = codes[:, start:end].clone(), (~there_here).nonzero()[:, 0].to(codes.device)
        own[:, missing] = own[:, known[torch.arange(len(missing), device=codes.device) % len(known)]]
        filled.append(own.view(-1, *grid))
        start = end
    images = decode(model, filled if len(grids) > 1 else filled[0])
    if not model.first_stage_model.spatial:  # each code may describe any part of the image
        there_here = torch.ones_like(there_here)
    there = there_here.view(1, 1, *grids[-1]).float().cpu()
    visible = F.interpolate(there, size=(images.shape[2], images.shape[3]))[0] > 0
    images = torch.where(visible, images, torch.full_like(images, BLANK))
    return to_pil(images[0] if len(images) == 1 else image_grid(images))


def _kept(keep: Tensor, grid: Size) -> Tensor:
    """Return which codes of a grid stay, where those of the coarsest grid say it, (h, w) bool."""
    return F.interpolate(keep[None, None].float(), size=grid)[0, 0] > 0


def side_by_side(paths: Sequence[Path]) -> Image.Image:
    """Return finished images as `preview` shows them."""
    images = torch.stack([load_png(path) for path in paths])
    return to_pil(images[0] if len(images) == 1 else image_grid(images))
