"""Write a code cache: in parts, by one process or several, and at last as one file.

A part is a range of records, in a file of its own that appears whole. The header alone decides which records
a part has, so that any number of processes continue an interrupted start, and write the same bytes as one.
"""

import hashlib
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from taming.data.codes.format import CodeCacheError, CodeHeader, checksums, read_header
from taming.util import atomic_write, open_file, read_bytes

MAX_PARTS = 4096
LEAST_RECORDS = 64  # of a part


class CodeWriter:
    """Writes parts of a code cache beside its place, in the folder FILE.parts, and merges them.

    Args:
        path: the file.
        header: what it will hold.
        batch_size: records that are encoded together; a part consists of whole batches.

    Raises:
        ValueError: `path` is another file, or the folder holds parts of another header.
    """

    def __init__(self, path: Path, header: CodeHeader, batch_size: int) -> None:
        self.path, self.header = path, header
        self.folder = path.with_name(f"{path.name}.parts")
        least = max(LEAST_RECORDS, -(-header.records // MAX_PARTS))
        self.part_records = -(-least // batch_size) * batch_size
        self._start = header.to_bytes()
        self._identity = hashlib.sha256(self._start + struct.pack("<Q", self.part_records)).digest()
        self.is_done()  # or raises

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.header.records // self.part_records)

    def records_of(self, part: int) -> range:
        """Return the numbers of the records of a part."""
        start = part * self.part_records
        return range(start, min(start + self.part_records, self.header.records))

    def is_done(self) -> bool:
        """Tell whether the file is there.

        Raises:
            ValueError: another file is there.
        """
        if not self.path.exists():
            return False
        with open_file(self.path, "code cache") as file:
            try:
                found, _ = read_header(file, str(self.path))
            except CodeCacheError as error:
                raise ValueError(f"{error}; or delete it, or choose another --outdir") from None
        if found != self.header:
            names = ("fields", "images", "views", "tokenizer", "about")
            changed = [name for name in names if getattr(found, name) != getattr(self.header, name)]
            raise ValueError(
                f"{self.path} holds other codes ({', '.join(changed)} differ): delete it, or choose another "
                "--outdir"
            )
        return True

    def has_part(self, part: int) -> bool:
        """Tell whether a part is there, whole.

        Raises:
            ValueError: it is a part of other codes.
        """
        return self._part(part) is not None

    def write_part(self, part: int, records: np.ndarray) -> None:
        """Write the records of a part, uint8 (B, R)."""
        expected = len(self.records_of(part)), self.header.record_bytes
        assert records.shape == expected, (records.shape, expected)
        data = records.tobytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._place(part)) as partial:
            partial.write_bytes(self._identity + struct.pack("<I", zlib.crc32(data)) + data)

    def merge(self) -> None:
        """Write the file, which appears whole, and remove the parts, all of which must be there.

        Raises:
            ValueError: a part is missing or damaged.
        """
        for left in self.path.parent.glob(f".{self.path.name}.*.part"):  # of a start that was killed
            left.unlink(missing_ok=True)
        table = []
        with atomic_write(self.path) as partial:
            with partial.open("wb") as file:
                file.write(self._start)
                for piece, checksum in checksums(self._all_parts()):
                    file.write(piece)
                    table += [] if checksum is None else [checksum]
                file.write(np.array(table, "<u4").tobytes())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all_parts(self) -> Iterator[bytes]:
        for part in range(self.parts):
            data = self._part(part)
            if data is None:
                raise ValueError(f"{self._place(part)} is missing or damaged: start the command again")
            yield data

    def _place(self, part: int) -> Path:
        return self.folder / f"{part:06d}.part"

    def _part(self, part: int) -> bytes | None:
        """Return the records of a part; None if it is missing or damaged."""
        path, length = self._place(part), len(self._identity) + 4
        if not path.exists():
            return None
        size = len(self.records_of(part)) * self.header.record_bytes
        content = read_bytes(path, "part of a code cache", max_bytes=max(length + size, path.stat().st_size))
        if content[:length - 4] != self._identity:
            raise ValueError(
                f"{self.folder} holds parts of other codes (another model, data, or options): delete it, or "
                "choose another --outdir"
            )
        data = content[length:]
        whole = len(data) == size and zlib.crc32(data) == int.from_bytes(content[length - 4:length], "little")
        return data if whole else None
