"""The helpers of 2021: same calls and results, without hidden downloads."""

import errno
import hashlib
import http.server
import os
import stat
import threading

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming.util import (
    KeyNotFoundError,
    ProgressBar,
    atomic_write,
    count_params,
    download,
    get_ckpt_path,
    md5_hash,
    open_file,
    pick_device,
    read_bytes,
    read_text,
    retrieve,
)
from tests.tiny import FullDisk

BODY = b"0123456789" * 500


class Site(http.server.BaseHTTPRequestHandler):
    """Serves BODY, a body that ends early, and redirects."""

    def do_GET(self):
        if self.path.startswith("/to"):
            self.send_response(302)
            self.send_header("Location", "/file" if self.path == "/to-file" else "ftp://127.0.0.1/x")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) + (100 if self.path == "/short" else 0)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_args):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", ["/file", "/to-file"])
def test_download_writes_the_file_and_shows_a_bar(site, tmp_path, capsys, page):
    path = tmp_path / "new" / "weights.bin"
    download(site + page, str(path), chunk_size=64)
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == ["weights.bin"]
    assert "weights.bin: 100%" in capsys.readouterr().err


def test_download_that_fails_keeps_what_was_there(site, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError):
        download(site + "/short", path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["weights.bin"]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "weights.bin"])
def test_download_takes_web_addresses_only(tmp_path, url):
    with pytest.raises(ValueError, match="only http and https"):
        download(url, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_download_follows_no_redirect_off_the_web(site, tmp_path):
    with pytest.raises(ValueError, match="cannot download ftp://127.0.0.1/x"):
        download(site + "/to-ftp", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_md5_hash(tmp_path):
    (tmp_path / "x").write_bytes(BODY)
    assert md5_hash(tmp_path / "x") == hashlib.md5(BODY).hexdigest()
    (tmp_path / "empty").touch()
    assert md5_hash(str(tmp_path / "empty")) == "d41d8cd98f00b204e9800998ecf8427e"


def test_get_ckpt_path_finds_or_explains_and_never_downloads(tmp_path, monkeypatch):
    found = get_ckpt_path("vgg_lpips", str(tmp_path), check=True)  # the package's file is the one of 2021
    heads = torch.load(found, map_location="cpu", weights_only=True)
    assert set(heads) == {f"lin{i}.model.1.weight" for i in range(5)}
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match="pip install lpips"):
            get_ckpt_path("vgg_lpips", tmp_path)
    (tmp_path / "vgg.pth").write_bytes(b"x")
    assert get_ckpt_path("vgg_lpips", tmp_path) == str(tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="d507d7349b931f0638a25a48a722f98a"):
        get_ckpt_path("vgg_lpips", tmp_path, check=True)
    with pytest.raises(ValueError, match="vgg_lpips"):
        get_ckpt_path("inception", tmp_path)


def test_retrieve_walks_dicts_and_lists():
    tree = {"a": {"b": [10, {"c": 11}]}}
    assert retrieve(tree, "a/b/0") == 10
    assert retrieve(tree, "a.b.1.c", splitval=".") == 11
    assert retrieve(tree, "a/x", default=5) == 5
    assert retrieve(tree, "a/b/9", default=5, pass_success=True) == (5, False)
    assert retrieve(tree, "a/b/0", pass_success=True) == (10, True)
    assert retrieve(OmegaConf.create(tree), "a/b/1/c") == 11


@pytest.mark.parametrize("key", ["a/x", "a/b/9", "a/b/x", "a/b/0/y", "z"])
def test_retrieve_says_how_far_it_came(key):
    with pytest.raises(KeyNotFoundError, match="Key not found: .*\nVisited: .*\nCause:") as caught:
        retrieve({"a": {"b": [10]}}, key)
    assert caught.value.keys == key.split("/")
    assert caught.value.visited == key.split("/")[:-1]


def test_retrieve_expands_callables_in_place():
    calls = []
    tree = {"a": lambda: calls.append(1) or {"b": lambda: 3}, "l": [lambda: 4]}
    with pytest.raises(KeyNotFoundError, match="callable"):
        retrieve(tree, "a/b", expand=False)
    assert callable(retrieve(tree, "a", expand=False))
    assert retrieve(tree, "a/b") == 3
    assert retrieve(tree, "a/b") == 3
    assert calls == [1] and tree["a"] == {"b": 3}
    assert retrieve(tree, "l/0") == 4 and tree["l"] == [4]


def test_count_params_counts_tied_weights_once():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2, bias=False))
    model[1].weight = model[0].weight
    assert count_params(model) == (8, 8)
    model[0].bias.requires_grad_(False)
    model.register_buffer("x", torch.ones(100))
    assert count_params(model) == (6, 8)


def test_a_device_is_found_or_rejected_in_a_sentence():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"no device {name} here .*: choose cpu"):
            pick_device(name)



def test_atomic_write_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.name == f".file.txt.{os.getpid()}.part"
    assert path.read_text() == "new"
    with pytest.raises(OSError, match="disk"), atomic_write(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]  # no partial file is left


def test_atomic_write_flushes_the_file_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    path, flushed = tmp_path / "file", []

    def fsync(descriptor):
        flushed.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as partial:
        partial.write_bytes(b"x")
    assert flushed == [("file", False), ("folder", True)]


@pytest.mark.parametrize("write", [
    lambda file: file.write(b"x" * 100_000),
    lambda file: torch.save(torch.zeros(100_000), file),  # raises an error of its own
], ids=["bytes", "torch"])
def test_atomic_write_names_a_full_disk(tmp_path, write):
    path = tmp_path / "file.bin"
    path.write_text("old")
    with pytest.raises(OSError) as caught, atomic_write(path):
        write(FullDisk())
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    with pytest.raises(RuntimeError, match="os error 28"), atomic_write(path):
        raise RuntimeError("os error 28")  # anything else passes
    with pytest.raises(OSError, match="No space"), atomic_write(path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it


# ---- files within a budget


def test_files_are_read_up_to_their_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("\ufeffä\n".encode())
    assert read_bytes(path, max_bytes=6) == path.read_bytes() and read_text(path, max_bytes=6) == "ä\n"
    with open_file(path) as file:
        assert file.read(3) == b"\xef\xbb\xbf"
    with pytest.raises(ValueError, match=f"^notes {path} has 6 bytes, more than 5 are not read"):
        read_text(path, "notes", max_bytes=5)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"^notes {path} is not UTF-8 text .*: save it as UTF-8"):
        read_text(path, "notes", max_bytes=5)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs a file of unknown size")
def test_a_file_of_unknown_size_is_read_up_to_its_limit():
    text = read_bytes("/proc/version", max_bytes=10_000)
    assert text == open("/proc/version", "rb").read() and os.path.getsize("/proc/version") == 0
    with pytest.raises(ValueError, match="/proc/version has more than 5 bytes"):
        read_bytes("/proc/version", max_bytes=5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, kind in (("pipe", "pipe"), ("link", "pipe"), (".", "folder"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"is a {kind}, but must be a file"):
            open_file(tmp_path / name)


def test_progress_is_a_line_now_and_then_in_a_file_and_a_bar_on_a_terminal(capsys, monkeypatch):
    now = [0.0]
    with ProgressBar(total=40, unit="image", desc="samples") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        bar.start_t = bar.last_print_t = 0.0
        for second in range(1, 41):
            now[0] = float(second)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("| ")[1].split()[0] for line in lines] == ["10/40", "20/40", "30/40", "40/40", "40/40"]
    assert all(line.startswith("samples: ") and "\r" not in line for line in lines)
    with ProgressBar(total=3, disable=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ProgressBar(total=3, mininterval=0) as bar:
        bar.update(3)
    shown = capsys.readouterr().err
    assert shown.count("\r") >= 2 and shown.count("\n") == 1 and "3/3" in shown
