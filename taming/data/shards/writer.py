"""Pack a folder of images, with what belongs to each, into tar shards, which `dataset.py` reads."""

import io
import os
import random
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from glob import escape
from pathlib import Path

from taming.data.files.images import MAX_FILE
from taming.data.files.lists import class_folders, find_images
from taming.data.shards import PARTS
from taming.data.shards.index import Index, write_index
from taming.util import read_bytes

Sample = dict[str, str | bytes]  # ending -> a file, or what is in it


def pack(
    folder: str | os.PathLike,
    outdir: str | os.PathLike,
    *,
    name: str = "train",
    max_bytes: float = 500_000_000,
    max_samples: int | None = None,
    classes: bool = False,
    captions: bool = False,
    segmentation: str | os.PathLike | None = None,
    depth: str | os.PathLike | None = None,
    seed: int | None = 0,
) -> Iterator[tuple[int, int]]:
    """Write the images below a folder, as they are, into `name`-000000.tar, ... with an index beside each.

    Yields (images packed, images in all) after each one. A shard appears when it is whole; what is wrong with
    the arguments, or missing beside an image, is said before the first.

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
        FileNotFoundError: no such folder.
        ValueError: no images, a file that is missing beside one, shards of that name in outdir, no such name,
            an outdir that is a file, or an image that cannot be read or a shard that cannot be written.
    """
    folder, outdir = Path(folder), Path(outdir)
    paths = find_images(folder)
    if not max_bytes >= 1 or (max_samples is not None and max_samples < 1):  # nan fails, too
        raise ValueError(f"a shard needs room: max_bytes is {max_bytes}, max_samples {max_samples}")
    _check_free(outdir, name)
    numbers = {label: number for number, label in enumerate(class_folders(folder))} if classes else {}
    given = {PARTS["segmentation"]: segmentation, PARTS["depth"]: depth}
    others = {ending: Path(other) for ending, other in given.items() if other is not None}
    for path in paths:
        _sample(Path(path), folder, numbers, captions, others)
    named = [*zip(_names(paths, folder), paths, strict=True)]
    if seed is not None:
        random.Random(seed).shuffle(named)
    samples = ((key, _sample(Path(path), folder, numbers, captions, others)) for key, path in named)
    return _write(samples, len(named), outdir, name, [*numbers], max_bytes, max_samples)


def _check_free(outdir: Path, name: str) -> None:
    """Raise ValueError if shards of that name cannot be put there."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no name for shards: give one without a folder, such as train")
    for parent in (outdir, *outdir.parents):
        if parent.is_file():
            raise ValueError(f"{parent} is a file, but shards need a folder {outdir}: name another")
    if present := sorted(outdir.glob(f"{escape(name)}-*.tar")):
        raise ValueError(
            f"{outdir} holds {len(present)} shards {name}-*.tar: remove them, or choose another name"
        )


def _write(
    samples: Iterator[tuple[str, Sample]], total: int, outdir: Path, name: str, labels: list[str],
    max_bytes: float, max_samples: int | None,
) -> Iterator[tuple[int, int]]:
    """Write the shards, and the names of the classes where there are any."""
    shard, written = None, 0
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        if labels:
            text = "".join(f"{label}\n" for label in labels)
            (outdir / "classes.txt").write_text(text, encoding="utf-8")
        for count, (key, sample) in enumerate(samples, 1):
            shard = shard or _Shard(outdir / f"{name}-{written:06}.tar")
            shard.add(key, sample)
            yield count, total
            if shard.size >= max_bytes or shard.samples == max_samples or count == total:
                shard.close()
                shard, written = None, written + 1
    except (OSError, ValueError) as error:
        left = f". Remove the {written} shards {outdir / name}-*.tar before the next try" if written else ""
        raise ValueError(f"packing stopped: {error}{left}") from error
    finally:
        if shard:
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
            data = read_bytes(part, "part", max_bytes=MAX_FILE) if isinstance(part, str) else part
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
        with suppress(OSError):  # it writes the end, for which the disk may have no room
            self.tar.close()
        self.partial.unlink(missing_ok=True)
