"""Text files that name images, and folders that hold them: read within a budget, or one line."""

import os
import time

import pytest

from taming.data.custom import CustomTest
from taming.data.files import lists
from taming.data.files.lists import find_images, read_class_names, read_lines


def test_lines_are_read_without_blanks_and_byte_order_mark(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffa b.png\r\n\n  \u00e4.png  \nc".encode())
    assert read_lines(tmp_path / "x.txt", "list") == ["a b.png", "\u00e4.png", "c"]


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xfea\0", "is not UTF-8 text"),
    (b"a\n" + b"x" * 70_000, "a line of more than 65536"), (bytes(200_000), "a line of more than 65536"),
])
def test_what_is_no_list_is_one_line(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^image list .*x.txt .*{message}") as caught:
        read_lines(tmp_path / "x.txt", "image list")
    assert "\n" not in str(caught.value)


def test_a_list_of_too_many_lines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "MAX_LINES_MEMORY", 10_000)
    (tmp_path / "x.txt").write_text("ab\n" * 150)
    assert len(read_lines(tmp_path / "x.txt", "list")) == 150
    (tmp_path / "x.txt").write_text("ab\n" * 300)
    with pytest.raises(ValueError, match="too many lines"):
        read_lines(tmp_path / "x.txt", "list")


def test_a_sparse_list_ends_at_once(tmp_path):
    path = tmp_path / "x.txt"
    for size, message in ((1 << 40, "1099511627776 bytes"), (1 << 29, "more than 65536 characters")):
        with path.open("wb") as file:
            file.truncate(size)
        start = time.monotonic()
        with pytest.raises(ValueError, match=message):
            CustomTest(8, path)
        assert time.monotonic() - start < 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_folders_and_devices_are_no_lists(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (tmp_path, "folder"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"^image list file {path} is a {kind}, but must be a file"):
            CustomTest(8, path)
    with pytest.raises(ValueError, match="class name file .* is a pipe"):
        read_class_names(tmp_path / "pipe")


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path, caplog):
    for name in ("a.png", "sub/b.AVIF", "sub/c.HEIC", "d.heic", "e.jxl", "notes.txt", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [str(tmp_path / "a.png"), str(tmp_path / "sub/b.AVIF")]
    assert f"folder {tmp_path}: 2 .heic, 1 .jxl are not read; convert them" in caplog.text
    (tmp_path / "a.png").unlink()
    (tmp_path / "sub/b.AVIF").unlink()
    with pytest.raises(ValueError, match="hold no images .* must be converted first: 2 .heic, 1 .jxl"):
        find_images(tmp_path)
