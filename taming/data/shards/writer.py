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
from taming.data.shards.index import MAX_MEMBERS, Index, write_index
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

    Yields (images packed, images in all) after each one. A shard appears when it is whole; wrong arguments
    and missing files raise before the first.

    Args:
        folder: folder of images, searched at any depth.
        outdir: folder for the shards.
        name: prefix of their names.
        max_bytes, max_samples: a shard is closed when it reaches one of these.
        classes: take the first folder below `folder` as the class of an image; `classes.txt` gets the names.
        captions: take the text of an image from the .txt file beside it.
        segmentation, depth: folders of PNGs with the relative paths of the images.
        seed: seed of the random order of the images; None: sorted by path.

    Raises:
        FileNotFoundError: `folder` does not exist.
        ValueError: there are no images, or a file beside one is missing; `outdir` is a file, or holds shards
            of that name; `name` is not a file name; an image cannot be read, or a shard cannot be written.
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
    """Raise ValueError if shards of that name cannot be written to a folder."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a name for shards: give one without a folder, such as train")
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
    """Write the shards, and the names of the classes if there are any."""
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
            full = shard.size >= max_bytes or len(shard.members) > MAX_MEMBERS - len(PARTS) - 1
            if full or shard.samples == max_samples or count == total:
                shard.close()
                shard, written = None, written + 1
    except (OSError, ValueError) as error:
        left = f". Remove the {written} shards {outdir / name}-*.tar before the next try" if written else ""
        raise ValueError(f"packing stopped: {error}{left}") from error
    finally:
        if shard:
            shard.discard()


def _names(paths: list[str], folder: Path) -> list[str]:
    """Return names for the samples: those of their files without dots, which end a name, and unique."""
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
    """Return the files that belong to an image."""
    relative = path.relative_to(folder)
    sample: Sample = {path.suffix.lower().removeprefix("."): str(path)}
    if numbers:
        if relative.parts[0] not in numbers or len(relative.parts) < 2:
            known = ", ".join([*numbers][:5])
            raise ValueError(f"{path} is not in a class folder: move it into one of {known}")
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
