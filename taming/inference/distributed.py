"""One job of many pictures, done by one process or by several that torchrun starts.

Processes never talk: which pictures are whose follows from their number, and one that waits for others looks
for their files, which appear whole or not at all.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from taming.util import pick_device

PNG_END = b"IEND\xaeB`\x82"
PATIENCE = 0.2  # seconds between two looks for files


def share() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says: (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(name: str | None) -> torch.device:
    """The device of that name; of several GPUs, where none is named by number, the one of this process."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def own_batches(count: int, batch_size: int, is_there: Callable[[int], bool]) -> list[list[int]]:
    """The numbers, of 0..count-1, that this process is to draw, in batches, without those that are there.

    Whole batches are dealt to the processes in turn, so that a picture is drawn beside the same ones however
    many processes there are, and comes out the same to the last bit. They depend on nothing that other
    processes may have written meanwhile. Where there are fewer batches than processes, they are made smaller.
    """
    rank, world = share()
    batch_size = min(batch_size, -(-count // world))
    starts = range(rank * batch_size, count, world * batch_size) if count else ()
    batches = ([i for i in range(s, min(s + batch_size, count)) if not is_there(i)] for s in starts)
    return [batch for batch in batches if batch]


def is_drawn(path: Path, note: Mapping[str, str]) -> bool:
    """Whether that very picture is there; another one in its place is an error, not overwritten.

    What breaks off, or is no PNG, does not count.
    """
    if not is_whole(path):
        return False
    with Image.open(path) as image:
        found = {key: value for key, value in image.info.items() if isinstance(value, str)}
    keys = [key for key in dict.fromkeys((*note, *found)) if found.get(key) != note.get(key)]
    if keys:
        other = ", ".join(f"{key} {found.get(key, 'unknown')}" for key in keys)
        raise ValueError(f"{path} was drawn with {other}: delete it, or choose another --outdir")
    return True


def is_whole(path: Path) -> bool:
    """Whether a PNG file is there, to its end."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return file.read() == PNG_END


def say(text: str) -> None:
    """Print, in the first process only."""
    if share()[0] == 0:
        print(text, flush=True)


def wait_for(paths: Sequence[Path]) -> None:
    """Return when all these files are there; torchrun ends this process where another one fails."""
    for path in paths:
        while not is_whole(path):
            time.sleep(PATIENCE)


class TokenBar(tqdm):
    """A progress bar of codes drawn, with their number per second and the time left; of the first process.

    It is a sampler's callback.

    Args:
        pictures: how many are to be drawn.
    """

    def __init__(self, pictures: int):
        super().__init__(total=0, unit="token", unit_scale=True, disable=pictures == 0 or share()[0] != 0)
        self.pictures = pictures

    def next_batch(self, size: int, codes: int) -> None:
        """So many pictures follow, of so many codes each; those behind them have as many, as far as known."""
        if not self.disable:
            self.total = self.n + self.pictures * codes
            self.refresh()
        self.pictures -= size

    def __call__(self, step: int, codes: Tensor) -> None:
        self.update(len(codes))
