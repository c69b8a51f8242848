"""Data sets of the Hugging Face library: local parquet files, or a name on the hub. H W pixels."""

import glob
import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from taming.data.base import FaultTolerantDataset
from taming.data.files.errors import BadSample, file_errors
from taming.data.files.images import MAX_FILE, read_transformed
from taming.data.transforms.joint import Size
from taming.util import open_file

PARQUET = ".parquet"
MAX_FOOTER = 1 << 26  # bytes of the description of a file's columns and groups of rows
MAX_GROUP = 1 << 30  # bytes of a group of rows, decompressed; a group is read whole
_ROWS = 16  # that are converted at a time: few, since each can be as large as a page of the file, 2 GB


class HuggingFaceImages(FaultTolerantDataset):
    """Images of a table: items {"image": (H, W, 3) float32 in [-1, 1], "file_path_": str}, and as asked for

        class_label: int; "human_label", str, where the table names its classes.
        caption: str; of a list of captions the first.

    Rows are read at any position, so orders, sharding over processes and resuming are those of every other
    data set. A row of a local file that holds the path of an image instead of its bytes is read if the path
    leads below the folder of a parquet file. Needs the package `datasets`, the extra `data`.

    Args:
        path: a parquet file, a folder of these, a pattern, or a name on the hub, such as "cifar10"; what
            exists here is never looked for there.
        split: of a name on the hub, "train" or "validation[:10%]" for instance; of files too, if they are
            named like train-00000-of-00010.parquet.
        size, random_crop: see FaultTolerantDataset.
        image_column, label_column, caption_column: where the table has these; no label and no caption if
            None.
        name: configuration of the data set on the hub.
        revision: of the data set on the hub: a branch, tag or commit.
        cache_dir: where the library puts what it downloads and converts.
        options: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: no such files, and no such name.
        ValueError: the package is not installed; a file is broken or has no rows; a column that the table
            lacks, or that holds something else.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        size: Size = None,
        random_crop: bool | None = None,
        *,
        image_column: str = "image",
        label_column: str | None = None,
        caption_column: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size, random_crop, **options)
        self.source = f"{os.fspath(path)}[{split}]"
        self.columns = {"image": image_column, "class_label": label_column, "caption": caption_column}
        _library()
        files = _parquet_files(os.fspath(path))
        self.folders = sorted({os.path.dirname(os.path.realpath(file)) for file in files})
        table = _load(os.fspath(path), files, split, name, revision, cache_dir)
        wanted = [column for column in self.columns.values() if column is not None]
        missing = [column for column in wanted if column not in table.column_names]
        if missing:
            raise ValueError(
                f"{self.source} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}: "
                "set image_column, label_column or caption_column"
            )
        self.class_names = list(getattr(table.features.get(label_column), "names", None) or [])
        self.table = _undecoded(table.select_columns(wanted), image_column, self.source)

    def __len__(self) -> int:
        return len(self.table)

    def load_sample(self, index: int) -> dict[str, Any]:
        place = f"{self.source}, row {index}"
        with file_errors(place, "row", BadSample):
            row = self.table[index]
        cell = row[self.columns["image"]]
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise BadSample(f"{place} holds no image")
        data = cell.get("bytes")
        with file_errors(place):
            file = io.BytesIO(data) if data else self._open(cell["path"])
        with file:
            pixels, params = read_transformed(place, self.transform, file)
        return self.image_item(pixels, params) | {"file_path_": place} | self._words(row, place)

    def _open(self, path: str) -> BinaryIO:
        """Open the file that a row names; one of a local table must not lead elsewhere."""
        real = os.path.realpath(path)
        if self.folders and not any(os.path.commonpath([real, folder]) == folder for folder in self.folders):
            raise ValueError(f"{path} is not below {', '.join(self.folders)}")
        return open_file(real, "image", max_bytes=MAX_FILE)

    def _words(self, row: dict[str, Any], place: str) -> dict[str, Any]:
        """Label and caption of a row, as asked for."""
        words: dict[str, Any] = {}
        if label := self.columns["class_label"]:
            if not isinstance(row[label], int | np.integer) or not 0 <= row[label] < 1 << 31:
                raise BadSample(f"{place} has the label {row[label]!r}, which is not a class number")
            words["class_label"] = number = int(row[label])
            if number >= (count := len(self.class_names)) > 0:
                raise BadSample(f"{place} has the label {number}, but there are {count} class names")
            if self.class_names:
                words["human_label"] = self.class_names[number]
        if caption := self.columns["caption"]:
            text = row[caption]
            text = text[0] if isinstance(text, Sequence) and not isinstance(text, str) and text else text
            if not isinstance(text, str):
                raise BadSample(f"{place} has no caption in {caption}")
            words["caption"] = text
        return words


def _load(
    path: str, files: list[str], split: str, name: str | None, revision: str | None,
    cache_dir: str | os.PathLike | None,
) -> Any:
    """Open the table: of local files without the network, else of the hub."""
    datasets = _library()
    cache = None if cache_dir is None else os.fspath(cache_dir)
    if files:
        chosen = _files_of_split(files, split)
        for file in chosen:
            _check_sizes(file)
        try:
            return datasets.load_dataset(
                "parquet", data_files={"train": chosen}, split="train", cache_dir=cache, batch_size=_ROWS
            )
        except Exception as error:  # DatasetsError, Arrow's own, MemoryError for a size that a file claims
            raise ValueError(_why_unreadable(chosen, error)) from error
    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, cache_dir=cache)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"no parquet file {path} is here (working directory: {os.getcwd()}), and the hub cannot be asked "
            f"for a data set of that name, or has none: {error}"
        ) from error


def _check_sizes(file: str) -> None:
    """Check, before anything is decoded, that a parquet file can be read in little memory.

    What its metadata claim is all that can be checked here; a broken file is left to the library, which says
    what is wrong with it.

    Raises:
        ValueError: the metadata or a group of rows are too large.
    """
    from pyarrow.parquet import ParquetFile

    with open_file(file, "parquet file") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 8))
        length = int.from_bytes(stream.read(4), "little")
        if stream.read(4) == b"PAR1" and length > MAX_FOOTER:
            raise ValueError(
                f"parquet file {file} has {length} bytes of metadata, more than {MAX_FOOTER} are not read"
            )
    try:
        metadata = ParquetFile(file, thrift_string_size_limit=MAX_FOOTER).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    except Exception:  # the library reads the same, and its error is made a message
        return
    for number, group in enumerate(columns):
        claimed = [column.total_uncompressed_size for column in group]
        if min(claimed, default=0) < 0 or sum(claimed) > MAX_GROUP:
            raise ValueError(
                f"parquet file {file}: row group {number} has {sum(claimed)} bytes, more than "
                f"{MAX_GROUP} are not read at once: write the file with smaller groups (row_group_size=1000)"
            )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            'this needs the package datasets: pip install "taming[data]", or pip install datasets'
        ) from error
    return datasets


def _parquet_files(path: str) -> list[str]:
    """List the parquet files that a path stands for, sorted; none if it is a name on the hub."""
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "**", f"*{PARQUET}"), recursive=True))
        if not found:
            raise FileNotFoundError(f"folder {path} holds no {PARQUET} files")
        return found
    found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
    if not found and path.endswith(PARQUET):
        raise FileNotFoundError(f"parquet file {path} does not exist (working directory: {os.getcwd()})")
    return found


def _why_unreadable(files: list[str], error: Exception) -> str:
    """Return a message that names the broken file, found by reading all, or else the library's reason."""
    from pyarrow.parquet import ParquetFile

    more = " ..." if len(files) > 5 else ""
    what, remedy = f"parquet files {', '.join(files[:5])}{more}", "see whether all have the same columns"
    reason, rows = error.__cause__ or error, 0
    for file in files:
        try:
            with ParquetFile(file) as table:
                rows += sum(len(batch) for batch in table.iter_batches(_ROWS))
        except Exception as found:
            what, remedy, reason = f"parquet file {file}", "fetch it again, or leave it out", found
            break
    else:
        if not rows:
            return f"{what} hold no rows: give others"
    # The reason can have many lines, and bytes of the file.
    text = "".join(letter if letter.isprintable() else " " for letter in str(reason))
    return f"{what} cannot be read: {remedy} ({' '.join(text.split())[:300]})"


def _files_of_split(files: list[str], split: str) -> list[str]:
    """Choose those named after a split, `train-00000-of-00010.parquet`; all if none is named after any."""
    names = {file: os.path.basename(file).removesuffix(PARQUET).split("-")[0] for file in files}
    chosen = [file for file in files if names[file] == split]
    if chosen or not set(names.values()) & {"train", "validation", "test"}:
        return chosen or files
    raise ValueError(
        f"none of {len(files)} parquet files is of the split {split!r}; there are: "
        f"{', '.join(sorted(set(names.values())))}"
    )


def _undecoded(table: Any, column: str, source: str) -> Any:
    """Have the library give the bytes of images: they are decoded here, once it is known how large."""
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, dict) and {"bytes", "path"} & set(feature):
        return table
    if str(getattr(feature, "dtype", "")) in ("binary", "large_binary"):
        return table.cast_column(column, datasets.Image(decode=False))
    raise ValueError(f"column {column} of {source} holds {feature}, not images")
