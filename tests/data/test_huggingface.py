"""Images of parquet files: what was put in comes out; bad rows are skipped, wrong columns are named."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from taming.data.huggingface import HuggingFaceImages, _files_of_split, _parquet_files


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'pip install "taming\[data\]", or pip install datasets'):
        HuggingFaceImages("x.parquet")


def test_files_by_split(tmp_path):
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    files = _parquet_files(str(tmp_path))
    assert files == [str(tmp_path / f"{name}.parquet") for name in names]
    assert _files_of_split(files, "train") == files[:2] and _files_of_split(files, "validation") == files[2:]
    assert _files_of_split(["a.parquet", "b.parquet"], "train") == ["a.parquet", "b.parquet"]
    with pytest.raises(ValueError, match="is of the split 'test'; there are: train, validation"):
        _files_of_split(files, "test")
    assert _parquet_files(str(tmp_path / "train-*.parquet")) == files[:2]
    assert _parquet_files("cifar10") == []
    with pytest.raises(FileNotFoundError, match="none.parquet does not exist"):
        _parquet_files(str(tmp_path / "none.parquet"))


def png(seed: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


@pytest.fixture
def library():
    return pytest.importorskip("datasets")


@pytest.fixture
def parquet(library, tmp_path):
    """Three good rows and, last, a broken one."""
    columns = {
        "picture": [{"bytes": png(i)[0], "path": None} for i in range(3)] + [{"bytes": b"no", "path": None}],
        "kind": [0, 1, 1, 0],
        "texts": [["a", "b"], ["c"], ["d"], ["e"]],
    }
    features = library.Features({
        "picture": library.Image(), "kind": library.ClassLabel(names=["cat", "dog"]),
        "texts": library.List(library.Value("string")),
    })
    path = tmp_path / "table.parquet"
    library.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def test_rows_of_a_file(parquet, tmp_path, caplog):
    dataset = HuggingFaceImages(
        parquet, image_column="picture", label_column="kind", caption_column="texts",
        cache_dir=tmp_path / "cache", max_bad_fraction=0.3, coord=True,
    )
    assert len(dataset) == 4
    items = [dataset[i] for i in range(4)]
    for i, item in enumerate(items[:3]):
        assert item["image"].dtype == np.float32
        assert np.array_equal(np.rint((item["image"] + 1) * 127.5), png(i)[1])
        assert item["file_path_"] == f"{parquet}[train], row {i}" and item["coord"].shape == (8, 12, 1)
    assert [(item["class_label"], item["human_label"], item["caption"]) for item in items[:3]] == [
        (0, "cat", "a"), (1, "dog", "c"), (1, "dog", "d"),
    ]
    assert np.array_equal(items[3]["image"], items[0]["image"]) and "row 3" in caplog.text  # skipped


def test_a_row_without_its_file_or_with_an_unknown_label_is_skipped(library, tmp_path, caplog):
    import pyarrow.parquet

    Image.fromarray(png(0)[1]).save(tmp_path / "0.png")
    features = library.Features({"image": library.Image(), "kind": library.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("0.png", "gone.png", "0.png")]
    # The library itself would write neither such a path nor such a label.
    table = pyarrow.table({"image": cells, "kind": [0, 0, 2]}, features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    dataset = HuggingFaceImages(
        tmp_path, label_column="kind", cache_dir=tmp_path / "cache", max_bad_fraction=0.9
    )
    assert [dataset[i]["file_path_"][-5:] for i in range(3)] == ["row 0"] * 3
    assert "row 1: FileNotFoundError" in caplog.text and "gone.png" in caplog.text
    assert "row 2 has the label 2, but there are 2 class names" in caplog.text


@pytest.mark.parametrize("spoil, reason", [
    (lambda data: b"", "file size is 0 bytes"),
    (lambda data: data[:len(data) // 2], "magic bytes not found"),
    (lambda data: data[:20] + b"\xff" * 300 + data[320:], "."),
])
def test_a_broken_file_is_named(parquet, tmp_path, spoil, reason):
    broken = tmp_path / "x-broken.parquet"
    broken.write_bytes(spoil(parquet.read_bytes()))
    message = rf"parquet file {broken} cannot be read: fetch it again, or leave it out \(.*{reason}.*\)$"
    with pytest.raises(ValueError, match=message) as caught:
        HuggingFaceImages(tmp_path, image_column="picture", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_files_without_rows_or_of_other_columns_are_named(library, tmp_path):
    empty = library.Dataset.from_dict({"image": []}, library.Features({"image": library.Image()}))
    empty.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="parquet files .*a.parquet hold no rows"):
        HuggingFaceImages(tmp_path, cache_dir=tmp_path / "cache")
    library.Dataset.from_dict({"image": [png(0)[0]]}).to_parquet(tmp_path / "a.parquet")
    library.Dataset.from_dict({"other": [1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="a.parquet, .*b.parquet cannot be read: see whether all have the"):
        HuggingFaceImages(tmp_path, cache_dir=tmp_path / "cache")


def test_columns_are_checked(parquet, tmp_path):
    with pytest.raises(ValueError, match="no column image; it has picture, kind, texts: set image_column"):
        HuggingFaceImages(parquet, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="column kind .* not images"):
        HuggingFaceImages(parquet, image_column="kind", cache_dir=tmp_path / "cache")
    resized = HuggingFaceImages(tmp_path, size=4, image_column="picture", cache_dir=tmp_path / "cache")
    assert resized[1]["image"].shape == (4, 4, 3) and set(resized[1]) == {"image", "file_path_"}


def test_rows_that_lead_elsewhere_or_hold_no_text_are_bad_samples(library, tmp_path, caplog):
    import pyarrow.parquet

    (tmp_path / "table").mkdir()
    Image.fromarray(png(0)[1]).save(tmp_path / "table/0.png")
    Image.fromarray(png(1)[1]).save(tmp_path / "outside.png")
    (tmp_path / "table/link.png").symlink_to(tmp_path / "outside.png")
    names = ["table/0.png", "outside.png", "table/../outside.png", "table/link.png", "table", "table/0.png"]
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in names]
    captions = pyarrow.array([b"a"] * 5 + [b"\xff\xfe"]).view(pyarrow.string())  # no UTF-8
    table = pyarrow.table({"image": pyarrow.array(cells), "text": captions, "kind": [1 << 40, 0, 0, 0, 0, 0]})
    features = library.Features({
        "image": library.Image(), "text": library.Value("string"), "kind": library.Value("int64"),
    })
    pyarrow.parquet.write_table(table.cast(features.arrow_schema), tmp_path / "table/x.parquet")
    settings = {"caption_column": "text", "cache_dir": tmp_path / "cache", "max_bad_fraction": 0.9}
    dataset = HuggingFaceImages(tmp_path / "table", **settings)
    assert [dataset[i]["file_path_"][-5:] for i in range(6)] == ["row 0"] * 6
    outside = f"ValueError: {tmp_path}/table/link.png is not below {tmp_path}/table"
    assert outside in caplog.text and caplog.text.count("is not below") == 3
    assert "is a folder, but must be a file" in caplog.text
    assert "cannot read row" in caplog.text and "UnicodeDecodeError" in caplog.text
    labelled = HuggingFaceImages(tmp_path / "table", label_column="kind", **settings)
    with pytest.raises(ValueError, match="row 0 has the label 1099511627776, which is not a class number"):
        labelled.load_sample(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_parquet_file(library, tmp_path):
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="parquet file .*x.parquet is a pipe, but must be a file"):
        HuggingFaceImages(tmp_path, cache_dir=tmp_path / "cache")


def test_a_group_of_rows_that_is_too_large_is_not_decoded(parquet, tmp_path, monkeypatch):
    import pyarrow.parquet

    described = pyarrow.parquet.read_metadata(parquet).row_group(0)
    size = sum(described.column(i).total_uncompressed_size for i in range(described.num_columns))
    monkeypatch.setattr("taming.data.huggingface.MAX_GROUP", size)
    assert len(HuggingFaceImages(parquet, image_column="picture", cache_dir=tmp_path / "cache")) == 4
    monkeypatch.setattr("taming.data.huggingface.MAX_GROUP", size - 1)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=rf"row group 0 has {size} bytes, more than {size - 1} are not"):
        HuggingFaceImages(parquet, image_column="picture", cache_dir=tmp_path / "cache")


def test_a_file_that_decompresses_to_gigabytes_is_named_at_once(library, tmp_path):
    """1.2 GB of zeros in one group, in a file of a few kilobytes."""
    import pyarrow as pa
    import pyarrow.parquet

    zeros = pa.array([bytes(1 << 20)], pa.binary())
    table = pa.table({"image": pa.chunked_array([zeros] * 1200)})
    pyarrow.parquet.write_table(
        table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False, row_group_size=1200
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="bomb.parquet: row group 0 has 12.* bytes, more than 1073741824"):
        HuggingFaceImages(tmp_path / "bomb.parquet", cache_dir=tmp_path / "cache")


def test_metadata_that_are_too_large_are_named(parquet, tmp_path):
    data = parquet.read_bytes()
    parquet.write_bytes(data[:-8] + (1 << 31).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="table.parquet has 2147483648 bytes of metadata, more than"):
        HuggingFaceImages(parquet, image_column="picture", cache_dir=tmp_path / "cache")
