"""A folder of images, with what belongs to each, into tar shards (`shards.py` reads them)."""

import io
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from taming.data.custom import _class_folders, find_images
from taming.data.shard_index import Index, write_index
from taming.data.shards import PARTS

Sample = dict[str, str | bytes]  # ending -> a file, or what is in it


def pack(
    folder: str | os.PathLike,
    outdir: str | os.PathLike,
    *,
    name: str = "train",
    max_bytes: int = 500_000_000,
    max_samples: int | None = None,
    classes: bool = False,
    captions: bool = False,
    segmentation: str | os.PathLike | None = None,
    depth: str | os.PathLike | None = None,
    seed: int | None = 0,
) -> Iterator[tuple[int, int]]:
    """Write the images below a folder, as they are, into `name`-000000.tar, ... with an index beside each.

    Yields (images packed, images in all) after each one. A shard appears when it is whole.

    Args:
        folder: is searched at any depth.
        outdir: for the shards.
        name: how their names begin.
        max_bytes, max_samples: a shard is closed when it has one of these.
        classes: the first folder below is the class of an image; `classes.txt` names them.
        captions: the text of an image is in the .txt file beside it.
        segmentation, depth: folders of PNGs, named and placed like the images.
        seed: of the order of the images, so that neighbours are a mixture; None: sorted.

    Raises:
        ValueError: no images, a file that is missing beside one, shards of that name in outdir.
    """
    folder, outdir = Path(folder), Path(outdir)
    paths = find_images(folder)
    if max_bytes < 1 or (max_samples is not None and max_samples < 1):
        raise ValueError(f"a shard needs room: max_bytes is {max_bytes}, max_samples {max_samples}")
    if present := sorted(outdir.glob(f"{name}-*.tar")):
        raise ValueError(
            f"{outdir} holds {len(present)} shards {name}-*.tar: remove them, or choose another name"
        )
    numbers = {label: number for number, label in enumerate(_class_folders(folder))} if classes else {}
    others = {PARTS["segmentation"]: segmentation, PARTS["depth"]: depth}
    others = {ending: Path(other) for ending, other in others.items() if other is not None}
    named = [*zip(_names(paths, folder), paths, strict=True)]
    if seed is not None:
        random.Random(seed).shuffle(named)
    outdir.mkdir(parents=True, exist_ok=True)
    if classes:
        (outdir / "classes.txt").write_text("".join(f"{label}\n" for label in numbers), encoding="utf-8")
    shard, written = _Shard(outdir / f"{name}-000000.tar"), 0
    try:
        for count, (key, path) in enumerate(named, 1):
            shard.add(key, _sample(Path(path), folder, numbers, captions, others))
            yield count, len(named)
            if shard.size >= max_bytes or shard.samples == max_samples or count == len(named):
                shard.close()
                written += 1
                if count < len(named):
                    shard = _Shard(outdir / f"{name}-{written:06}.tar")
    finally:
        shard.discard()


def _names(paths: list[str], folder: Path) -> list[str]:
    """Name the samples like their files, but for dots, which would end a name, and for doubles."""
    names, taken = [], set()
    for path in paths:
        relative = Path(path).relative_to(folder)
        stem = relative.stem.replace(".", "_").lstrip("_") or "_"
        name = relative.with_name(stem).as_posix()
        while name in taken:  # a.jpg beside a.png
            name += f"_{relative.suffix.removeprefix('.')}"
        taken.add(name)
        names.append(name)
    return names


def _sample(
    path: Path, folder: Path, numbers: dict[str, int], captions: bool, others: dict[str, Path]
) -> Sample:
    """Say what belongs to an image."""
    relative = path.relative_to(folder)
    sample: Sample = {path.suffix.lower().removeprefix("."): str(path)}
    if numbers:
        if relative.parts[0] not in numbers or len(relative.parts) < 2:
            known = ", ".join([*numbers][:5])
            raise ValueError(f"{path} lies in no class folder: move it into one of {known}")
        sample[PARTS["class_label"]] = str(numbers[relative.parts[0]]).encode()
    if captions:
        sample[PARTS["caption"]] = str(path.with_suffix(".txt"))
    for ending, other in others.items():
        sample[ending] = str(other / relative.with_suffix(".png"))
    for part in sample.values():
        if isinstance(part, str) and not os.path.isfile(part):
            raise ValueError(f"{path} has no {part} that belongs to it")
    return sample


class _Shard:
    """A tar file in the making, and its index."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.part")
        self.tar = tarfile.open(self.partial, "w")
        self.members: list[tuple[str, int, int]] = []
        self.samples = 0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.tar.offset

    def add(self, key: str, sample: Sample) -> None:
        """Append one sample."""
        for ending, part in sample.items():
            data = Path(part).read_bytes() if isinstance(part, str) else part
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size, info.mode = len(data), 0o644
            self.tar.addfile(info, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            self.members.append((info.name, self.tar.offset - padded, len(data)))
        self.samples += 1

    def close(self) -> None:
        """Finish it: now it appears."""
        self.tar.close()
        write_index(self.path, Index(os.path.getsize(self.partial), self.members))
        self.partial.replace(self.path)

    def discard(self) -> None:
        """Leave nothing behind if it was not finished."""
        self.tar.close()
        self.partial.unlink(missing_ok=True)
