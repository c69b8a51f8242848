"""A code cache as a data set: memory-mapped, checked as it is read, unpacked a batch at a time.

B items, h w latent grid, M tokens.
"""

import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.codes.format import BLOCK, SLACK, CodeCacheError, CodeHeader, read_header, unpack
from taming.data.items import make_batch
from taming.util import open_file

Pair = tuple[int, int]  # (epoch, index)


class CodeDataset(Dataset):
    """The codes of images, which `taming encode` wrote, for any prior: no image is read or encoded.

    Batches hold, int64:
        codes: (B, h, w); of a tokenizer with several grids instead codes/0 (B, h, w), codes/1, ...
        tokens/KEY: (B, h, w) or (B, M), the tokens of the condition of the batch's entry KEY.
        class_label, or other labels: (B,).

    Epoch e reads view e % views of each image, so that the first epochs are those of training from images
    with the seed of the cache. Opening reads the header alone. A block of records is compared with its
    checksum when it is first read. The file is mapped: replace it as a whole, do not write into it.

    Args:
        path: the file.

    Attributes:
        code_header: what the file holds.
        class_names: of "class_label", if the encoded data set knew them.

    Raises:
        FileNotFoundError: there is no such file.
        CodeCacheError: it is not a whole code cache; when it is read, a block is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self.code_header = self._open()
        names = self.code_header.about.get("class_names")
        self.class_names = [str(name) for name in names] if isinstance(names, list) else []

    def _open(self) -> CodeHeader:
        if not os.path.exists(self.path):
            raise FileNotFoundError(f"there is no code cache {self.path}: make it with `taming encode`")
        with open_file(self.path, "code cache") as file:
            header, first = read_header(file, self.path)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = np.frombuffer(mapped, np.uint8)
        size = header.records * header.record_bytes
        self._data = whole[first:first + size]
        self._records = self._data.reshape(header.records, header.record_bytes)
        self._checksums = whole[first + size:].view("<u4")
        self._checked = np.zeros(len(self._checksums), bool)  # of each block
        return header

    def __len__(self) -> int:
        return self.code_header.images

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "code_header": self.code_header, "class_names": self.class_names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__ |= state
        if self._open() != self.code_header:
            raise CodeCacheError(f"code cache {self.path} was replaced while it was in use: start again")

    def __getitem__(self, key: int | Pair) -> dict[str, Tensor]:
        """Return one item, by its index, or by (epoch, index)."""
        return {name: value[0] for name, value in self.get_batch([key]).items()}

    def get_batch(self, keys: Sequence[int | Pair]) -> dict[str, Tensor]:
        """Return the batch of these items; loaders of `SeededDataset` call it."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        epochs, indices = np.array(pairs, np.int64).reshape(-1, 2).T
        images, views = self.code_header.images, self.code_header.views
        if len(indices) and not -images <= indices.min() <= indices.max() < images:
            raise IndexError(f"indices from {indices.min()} to {indices.max()} of {images} images")
        return self.read(epochs % views * images + indices % images)

    def read(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of the records with these numbers, which are not negative.

        Raises:
            CodeCacheError: a damaged block.
        """
        self._check(numbers)
        count, size = len(numbers), self.code_header.record_bytes
        records = np.empty(count * size + SLACK, np.uint8)
        np.take(self._records, numbers, axis=0, out=records[:count * size].reshape(count, size), mode="clip")
        try:
            arrays = unpack(self.code_header.fields, records, count)
        except ValueError as error:
            raise CodeCacheError(f"code cache {self.path} is wrong: {error}: encode again") from error
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @staticmethod
    def collate_fn(items: Any) -> dict[str, Any]:
        """Return a batch as it is; make one of a list of items."""
        return items if isinstance(items, dict) else make_batch(items)

    def _check(self, numbers: np.ndarray) -> None:
        """Compare the blocks of records with their checksums, unless that was done before."""
        size = self.code_header.record_bytes
        first, last = numbers * size // BLOCK, (numbers * size + size - 1) // BLOCK
        span = np.arange((last - first).max(initial=0) + 1)
        blocks = np.minimum(first[:, None] + span, last[:, None])
        for block in np.unique(blocks[~self._checked[blocks]]).tolist():
            data = self._data[block * BLOCK:(block + 1) * BLOCK]
            if zlib.crc32(data.data) != self._checksums[block]:
                place = f"record {block * BLOCK // size} of {self.code_header.records}"
                raise CodeCacheError(
                    f"code cache {self.path} is damaged at {place}: copy it again, or make it again with "
                    "`taming encode`"
                )
            self._checked[block] = True

    def check_all(self) -> None:
        """Compare the whole file with its checksums.

        Raises:
            CodeCacheError: a damaged block.
        """
        step = max(1, BLOCK // self.code_header.record_bytes)
        for start in range(0, self.code_header.records, step):
            self._check(np.arange(start, min(start + step, self.code_header.records)))
