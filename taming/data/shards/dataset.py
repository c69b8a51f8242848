"""Data sets in tar shards: few large files instead of millions of small ones, on disk or behind http(s).

A sample consists of the files with one name up to the first dot: `a/0001.jpg`, `a/0001.cls`, `a/0001.txt`, as
in the webdataset format. Shards are read in place, at any position, so that orders, sharding over processes
and resuming are those of every other data set (`ResumableBatchSampler`): no sample is read twice or omitted.
Nothing is executed or unpickled: files of other kinds than those below are ignored.

N samples, H W pixels of the crop, L labels.
"""

import io
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taming.data.base import FaultTolerantDataset
from taming.data.files.depth import read_depth
from taming.data.files.errors import BadSample
from taming.data.files.images import MAX_FILE, read_transformed
from taming.data.files.label_maps import check_same_size, encode_ids, read_ids, validate_ids
from taming.data.files.lists import EXTENSIONS, read_lines
from taming.data.shards.index import Index, ShardError, expand, fetch, index_of, is_address, local_copy
from taming.data.transforms.joint import JointParams, Size
from taming.util import open_file

logger = logging.getLogger(__name__)

IMAGES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
# What a sample can hold beside its image, by the key of items: the ending of the member.
PARTS = {"class_label": "cls", "caption": "txt", "segmentation": "seg.png", "depth": "depth.png"}
MAX_TEXT = 1 << 20  # bytes of a label or a caption
MAX_CLASS = 1 << 31
_OPEN = 64  # shards that a process keeps open


class TarShards(FaultTolerantDataset):
    """Images in tar shards: items {"image": (H, W, 3) float32 in [-1, 1], "file_path_": str}, and as found

        class_label: int, of `.cls`, a number in a text file; with names also "human_label", str.
        caption: str, of `.txt`.
        segmentation: ids (H, W) of `.seg.png`, or with `n_labels` one-hot (H, W, L) float32, or with
            `segmentation_ids` ids again, checked, as SegmentedImages gives them.
        depth: (H, W, 1) float32 in [-1, 1], of `.depth.png`, packed as in `taming.data.files.depth`.
        coord: if asked for, as ImagePaths gives it.

    `scripts/make_shards.py` packs a folder. With an index beside a shard (`x.tar.json`, which that command
    writes) its headers need not be read; an index for another size of the shard is ignored.

    Args:
        shards: a folder, a file, an http(s) address, or a list of these; files and addresses may have
            number ranges, `train-{000..146}.tar`, and files wildcards.
        size, random_crop: see FaultTolerantDataset.
        keys: what items hold besides the image, of class_label, caption, segmentation and depth. Samples that
            lack one are bad samples. By default a key is used if no more samples lack it than
            max_bad_fraction tolerates, or one.
        n_labels: number of labels: ids are checked, and become one-hot vectors.
        segmentation_ids, shift_segmentation: as SegmentedImages; they need n_labels.
        classes_from: text file with a class name a line; by default `classes.txt` beside the first shard.
        mixed_shards: number of shards that are shuffled together and read at a time, for slow disks and for
            addresses; by default all, the best mixture.
        cache_dir: folder for shards from addresses; each is downloaded as a whole when it is first needed.
        options: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: a broken shard, an address without cache_dir, no images, one of `keys` that too many
            samples lack.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        size: Size = None,
        random_crop: bool | None = None,
        *,
        keys: Sequence[str] | None = None,
        n_labels: int | None = None,
        segmentation_ids: bool = False,
        shift_segmentation: bool = False,
        classes_from: str | os.PathLike | None = None,
        mixed_shards: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size, random_crop, **options)
        self.shards = expand(shards)
        if cache_dir is None and any(map(is_address, self.shards)):
            raise ValueError(f"{self.shards[0]} is an address: set cache_dir to a folder for the shards")
        if mixed_shards is not None and mixed_shards < 1:
            raise ValueError(f"mixed_shards is {mixed_shards}; give at least 1, or null for all")
        if n_labels is None and (segmentation_ids or shift_segmentation):
            raise ValueError("segmentation_ids and shift_segmentation need n_labels: set it, to check ids")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.mixed_shards = mixed_shards
        self.n_labels, self.segmentation_ids = n_labels, segmentation_ids
        self.shift_segmentation = shift_segmentation
        self._sizes: list[int] = []  # bytes, of each shard
        self._names: bytes  # of the samples, one after the other, UTF-8
        self._ends: np.ndarray  # (N + 1,) where they begin and end in it
        self._shard: np.ndarray  # (N,) the number of each one's shard
        self._where: dict[str, np.ndarray]  # (N, 2) offset and size of a part in bytes; size -1: none
        self._image: np.ndarray  # (N,) number of the image's ending in IMAGES
        self._collect()
        self.keys = self._chosen(keys)
        self.class_names = _class_names(classes_from, self.shards[0])
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()  # by shard, the last used last

    def __len__(self) -> int:
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # another process opens its own

    def permutation(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random order of an epoch, (N,), in which `mixed_shards` shards are mixed at a time."""
        if self.mixed_shards is None:
            return rng.permutation(len(self))
        order = rng.permutation(len(self.shards))
        windows = [order[i:i + self.mixed_shards] for i in range(0, len(order), self.mixed_shards)]
        members = [np.flatnonzero(np.isin(self._shard, window)) for window in windows]
        return np.concatenate([rng.permutation(indices) for indices in members])

    def load_sample(self, index: int) -> dict[str, Any]:
        name = self._name(index)
        for key in self.keys:
            if self._where[key][index, 1] < 0:
                raise BadSample(f"{name} has no .{PARTS[key]} for the key {key}")
        path = f"{name}.{IMAGES[self._image[index]]}"
        pixels, params = read_transformed(path, self.transform, self._part(index, "image", path))
        item = self.image_item(pixels, params) | {"file_path_": path}
        for key in self.keys:
            part = self._part(index, key, f"{name}.{PARTS[key]}")
            item |= self._decode(key, part, params)
        return item

    def _name(self, index: int) -> str:
        start, end = self._ends[index:index + 2]
        return f"{self.shards[self._shard[index]]}/{self._names[start:end].decode()}"

    def _decode(self, key: str, part: "_Member", params: JointParams) -> dict[str, Any]:
        """Turn the bytes of a part into what items hold."""
        if key == "depth":
            plane = read_depth(part)
            check_same_size("depth", str(part), plane, params)
            return {"depth": params.plane(plane)[..., None]}
        if key == "segmentation":
            ids = read_ids(part)
            check_same_size("segmentation", str(part), ids, params)
            if self.n_labels is None:
                return {"segmentation": params.mask(ids)}
            ids = params.mask(validate_ids(ids, part, self.n_labels, self.shift_segmentation))
            return {"segmentation": encode_ids(ids, self.n_labels, self.segmentation_ids)}
        try:
            text = part.getvalue().decode().strip()
            if key == "caption":
                return {"caption": text}
            number = int(text)
        except ValueError as error:  # UnicodeDecodeError is one
            raise BadSample(f"{part} holds no {'number' if key == 'class_label' else 'text'}") from error
        count = len(self.class_names)
        if not 0 <= number < (count or MAX_CLASS):
            known = f"there are {count} class names" if count else f"classes are 0 to {MAX_CLASS - 1}"
            raise BadSample(f"{part} says class {number}, but {known}")
        return {"class_label": number} | ({"human_label": self.class_names[number]} if count else {})

    # ---- bytes

    def _part(self, index: int, key: str, name: str) -> "_Member":
        """Read a part of a sample."""
        number = int(self._shard[index])
        offset, size = map(int, self._where[key][index])
        most = MAX_TEXT if key in ("class_label", "caption") else MAX_FILE
        if size > most:
            raise BadSample(f"{name} has {size} bytes, more than {most} are not read")
        data = os.pread(self._file(number).fileno(), size, offset)
        if len(data) < size:
            raise BadSample(f"{name}: the shard ends early; fetch or pack it again")
        return _Member(data, name)

    def _file(self, number: int) -> BinaryIO:
        """Open a shard, which is fetched if it is an address."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        path = self.shards[number]
        if is_address(path):
            assert self.cache_dir is not None
            path = fetch(path, self.cache_dir, self._sizes[number])
        self._files[number] = open_file(path, "shard")
        if len(self._files) > _OPEN:
            self._files.popitem(last=False)[1].close()
        return self._files[number]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            file.close()

    # ---- the index

    def _collect(self) -> None:
        """Read the index of every shard, or else its headers."""
        names: list[bytes] = []
        shard, image = [np.empty(0, np.int32)], [np.empty(0, np.int8)]
        where = [np.empty((0, 1 + len(PARTS), 2), np.int64)]
        unread: set[str] = set()
        for number, path in enumerate(self.shards):
            index = index_of(path, self.cache_dir)
            self._sizes.append(index.size)
            kinds, places = [], []
            for name, parts in _samples_of(index, path).items():
                ending = next((ending for ending in parts if ending in IMAGES), None)
                unread |= set(parts) - {*PARTS.values(), ending}
                if ending is None:
                    continue
                names.append(name.encode())
                kinds.append(IMAGES.index(ending))
                places.append([parts[ending], *(parts.get(part, (0, -1)) for part in PARTS.values())])
            if places:
                shard.append(np.full(len(places), number, np.int32))
                image.append(np.array(kinds, np.int8))
                where.append(np.array(places, np.int64))
        if not names:
            more = " ..." if len(self.shards) > 1 else ""
            raise ValueError(f"{self.shards[0]}{more} holds no images ({', '.join(IMAGES)})")
        if unread:
            endings = ", .".join(sorted(ending[:20] for ending in unread)[:20])
            logger.info("members of %s are not read: .%s", self.shards[0], endings)
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])
        self._shard, self._image = np.concatenate(shard), np.concatenate(image)
        self._where = dict(zip(("image", *PARTS), np.concatenate(where).swapaxes(0, 1), strict=True))

    def _chosen(self, keys: Sequence[str] | None) -> tuple[str, ...]:
        """Return the keys of `keys`, or of all, that few enough samples lack; log what is missing."""
        chosen: list[str] = []
        bad = np.zeros(len(self), bool)  # (N,) the samples that lack a chosen key
        for key in PARTS if keys is None else keys:
            if key not in PARTS:
                raise ValueError(f"keys name {key!r}; choose from {', '.join(PARTS)}")
            lacks = self._where[key][:, 1] < 0
            count, skipped, total = lacks.sum(), (bad | lacks).sum(), len(self)
            if keys is None and count == total:
                continue
            state = f"{count} of {total} samples have no .{PARTS[key]} for the key {key}"
            if count:
                state += f", such as {self._name(int(lacks.argmax()))}"
            share = self.max_bad_fraction
            if skipped == total or (skipped > 1 and skipped > share * total):
                state += f": add them, or raise max_bad_fraction={share}, or give keys without {key}"
                if keys is not None:
                    raise ValueError(state)
                logger.warning("items hold no %s: %s", key, state)
                continue
            if count:
                logger.warning("%s: they are skipped; to have them, give keys without %s", state, key)
            chosen.append(key)
            bad |= lacks
        return tuple(chosen)


class _Member(io.BytesIO):
    """The bytes of a file in a shard; `str` is its name, for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name = name

    def __str__(self) -> str:
        return self._name

    __repr__ = __str__  # which messages of Pillow use


def _samples_of(index: Index, shard: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Group the members of a shard: {name of the sample: {ending: (offset, size)}}."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member, offset, size in index.members:
        folder, _, base = member.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not stem or not dot:  # hidden files, and files without an ending
            continue
        parts = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if parts.setdefault(ending.lower(), (offset, size)) != (offset, size):
            raise ShardError(f"shard {shard} is broken: it holds {member} twice; pack it again")
    return samples


def _class_names(classes_from: str | os.PathLike | None, first_shard: str) -> list[str]:
    """Read the names of the classes; none if no file is given and there is none beside the first shard."""
    if classes_from is None:
        if is_address(first_shard):
            return []
        classes_from = Path(local_copy(first_shard)).with_name("classes.txt")
        if not classes_from.is_file():
            return []
    return read_lines(classes_from, "class name file")
