"""2021's helpers of data sets: batches with annotations, archives, downloads by hand, square crops."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import taming.data.utils as tdu
from taming.data.helper_types import Annotation

NOTE = Annotation(0.5, "1", (0.0, 0.0, 1.0, 0.5), 3, "9")


def test_annotations_stay_lists_at_any_depth():
    items = [
        {"notes": [NOTE] * n, "nested": {"pair": ([NOTE], n)}, "x": np.full(2, n), "s": "ab"} for n in (1, 2)
    ]
    batch = tdu.custom_collate(items)
    assert batch["notes"] == [[NOTE], [NOTE, NOTE]]
    assert batch["nested"]["pair"][0] == [[NOTE], [NOTE]]
    assert batch["nested"]["pair"][1].tolist() == [1, 2]
    assert batch["x"].tolist() == [[1, 1], [2, 2]] and list(batch["s"]) == ["ab", "ab"]
    assert tdu.custom_collate([{"notes": []}, {"notes": [NOTE]}])["notes"] == [[], [NOTE]]
    assert tdu.custom_collate([{"notes": []}, {"notes": []}])["notes"] == [[], []]


@pytest.mark.parametrize("items", [
    [1, 2], [1.5, 2.5], ["a", "b"], [np.float32(1), np.float32(2)], [torch.ones(2), torch.zeros(2)],
    [(1, "a"), (2, "b")], [{"a": [1, 2], "b": {"c": 3}}] * 3, [["a"], ["b"]],
])
def test_everything_else_is_torch_s_default(items):
    assert str(tdu.custom_collate(items)) == str(default_collate(items))


def test_archives_are_unpacked_beside_themselves_and_nowhere_else(tmp_path):
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            info = tarfile.TarInfo(f"{name}/x.txt")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("c.zip.d/x.txt", "hi")
    for name in ("a.tar", "b.tar.gz", "c.zip"):
        if name != "c.zip":
            (tmp_path / name).rename(tmp_path / f"0{name}")
        tdu.unpack(str(tmp_path / (name if name == "c.zip" else f"0{name}")))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("x.txt"))
    assert found == ["a.tar/x.txt", "b.tar.gz/x.txt", "c.zip.d/x.txt"]
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../evil.txt"))
    with pytest.raises(tarfile.FilterError):
        tdu.unpack(str(tmp_path / "evil.tar"))
    with pytest.raises(NotImplementedError, match=r"x\.rar is not an archive"):
        tdu.unpack("x.rar")


def test_folders_are_prepared_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tdu.get_root("set")
    assert root == "data/set" and not tdu.is_prepared(root)
    tdu.mark_prepared(root)
    assert tdu.is_prepared(root) and tdu.get_root("set") == root


def test_a_file_is_asked_for_until_it_is_there(tmp_path, monkeypatch, capsys):
    asked = []

    def answer(prompt):
        asked.append(prompt)
        if len(asked) == 2:
            (tmp_path / "x.zip").touch()

    monkeypatch.setattr("builtins.input", answer)
    assert tdu.prompt_download("x.zip", "somewhere", str(tmp_path)) == str(tmp_path / "x.zip")
    assert len(asked) == 2 and "download x.zip from somewhere" in capsys.readouterr().out
    (tmp_path / "content").mkdir()
    assert tdu.prompt_download("y.zip", "somewhere", str(tmp_path), "content") == str(tmp_path / "y.zip")
    assert len(asked) == 2


def test_downloads_go_through_the_one_function_of_the_package(tmp_path, monkeypatch):
    fetched = {}
    monkeypatch.setattr(tdu, "download", lambda url, path: fetched.update({url: path}))
    folder = str(tmp_path)
    assert tdu.download_urls({"a": "http://x/1", "b": "http://x/2"}, folder) == {
        "a": f"{folder}/a", "b": f"{folder}/b"
    }
    assert fetched == {"http://x/1": f"{folder}/a", "http://x/2": f"{folder}/b"}


def test_the_hook_moves_a_bar_to_the_bytes_so_far():
    class Bar:
        n, total = 0, None

        def update(self, by):
            self.n += by

    bar = Bar()
    hook = tdu.reporthook(bar)
    hook(3, 10, 100)
    hook(5, 10)
    assert (bar.n, bar.total) == (50, 100)


def test_a_square_is_cropped_around_a_box():
    x = np.arange(20 * 30).reshape(20, 30)
    assert np.array_equal(tdu.quadratic_crop(x, (10, 6, 18, 12)), x[5:13, 10:18])
    assert tdu.quadratic_crop(x[..., None], (10, 6, 18, 12), alpha=0.5).shape == (4, 4, 1)
    corner = tdu.quadratic_crop(x, (0, 0, 4, 4), alpha=2.0)  # reaches 2 pixels beyond the corner
    assert corner.shape == (8, 8) and np.array_equal(corner[2:, 2:], x[:6, :6])
    assert np.array_equal(corner[1], corner[3]) and np.array_equal(corner[:, 0], corner[:, 4])
    assert tdu.quadratic_crop(x, (5, 5, 5, 5)).shape == (2, 2)
