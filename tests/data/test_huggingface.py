"""Images of parquet files: what was put in comes out; bad rows are skipped, wrong columns are named."""

import io

import numpy as np
import pytest
from PIL import Image

from taming.data.huggingface import HuggingFaceImages, _files_of_split, _parquet_files


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install datasets"):
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


def test_columns_are_checked(parquet, tmp_path):
    with pytest.raises(ValueError, match="no column image; it has picture, kind, texts: set image_column"):
        HuggingFaceImages(parquet, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="column kind .* not images"):
        HuggingFaceImages(parquet, image_column="kind", cache_dir=tmp_path / "cache")
    resized = HuggingFaceImages(tmp_path, size=4, image_column="picture", cache_dir=tmp_path / "cache")
    assert resized[1]["image"].shape == (4, 4, 3) and set(resized[1]) == {"image", "file_path_"}
