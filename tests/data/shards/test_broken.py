"""What is broken or lacking in shards: one clear message each, and never fewer samples without a word."""

import io
import json
import re
import tarfile
import threading
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from taming.data.files.depth import depth_to_rgba
from taming.data.shards import TarShards
from taming.data.shards import index as shard_index
from taming.data.shards.index import ShardError, scan


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGE = png(np.full((8, 8, 3), 90, np.uint8))
IDS = np.arange(64, dtype=np.uint8).reshape(8, 8) % 5
LABELS = png(IDS)
DEPTH = png(depth_to_rgba(np.random.default_rng(0).random((8, 8), dtype=np.float32)))


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path):
    """Four images, in blocks of header and data."""
    return write(tmp_path / "x.tar", {f"{i}.png": IMAGE for i in range(4)})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(shard_index, "_PAUSE", 0.0)


@pytest.fixture
def server():
    """An http server, and the files it has, by path."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path in files
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, format, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", files
    http.shutdown()
    http.server_close()


def message(action, *arguments, **settings) -> str:
    """The message of the ShardError that this raises, which is one line."""
    with pytest.raises(ShardError) as caught:
        action(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- samples


@pytest.mark.parametrize(("ending", "good", "bad"), [
    ("seg.png", LABELS, b""), ("seg.png", LABELS, LABELS[:50]), ("depth.png", DEPTH, b""),
    ("depth.png", DEPTH, DEPTH[:len(DEPTH) // 2]),
], ids=["empty labels", "cut labels", "empty depth", "cut depth"])
def test_a_broken_map_is_one_bad_sample_that_is_named(tmp_path, caplog, ending, good, bad):
    members = {}
    for i in range(4):
        members |= {f"{i}.png": IMAGE, f"{i}.{ending}": bad if i == 2 else good}
    dataset = TarShards(write(tmp_path / "x.tar", members))
    assert [item["file_path_"][-5] for item in dataset] == ["0", "1", "3", "3"]
    assert f"{tmp_path}/x.tar/2.{ending}" in caplog.text and "1 of 4 are bad" in caplog.text
    assert "object at 0x" not in caplog.text


# ---- shards


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("spoil", ["a bit", "the header"])
def test_a_damaged_header_does_not_end_a_shard(shard, number, spoil):
    data = bytearray(shard.read_bytes())
    header = scan(shard).members[number][1] - 512
    if spoil == "a bit":
        data[header + 150] ^= 1  # in its checksum
    else:
        data[header:header + 512] = b"\xff" * 512
    shard.write_bytes(data)
    text = message(TarShards, shard)
    assert f"{shard} is broken" in text and f"end at byte {header}, but data follow at byte {header}" in text
    assert "pack it again" in text


def test_joined_tar_files_are_no_shard(shard):
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() * 2)
    text = message(scan, shard)
    assert f"but data follow at byte {size}: a header is damaged, or tar files were joined" in text


def test_zeros_behind_the_end_are_read_but_many_are_told(shard, caplog):
    members = scan(shard).members
    with shard.open("ab") as file:
        file.truncate(shard.stat().st_size + 500_000)  # a large blocking factor
    assert scan(shard).members == members and not caplog.text
    with shard.open("ab") as file:
        file.truncate(3_000_000)  # room that was made for a download
    assert scan(shard).members == members
    assert f"{shard} ends with" in caplog.text and "fetch it again" in caplog.text
    with shard.open("ab") as file:
        file.write(b"x")
    assert "data follow at byte 3000000" in message(scan, shard)


def test_a_folder_called_like_a_shard_is_named(shard, tmp_path):
    (tmp_path / "y.tar").mkdir()
    assert f"{tmp_path / 'y.tar'} is a folder" in message(TarShards, tmp_path)


@pytest.mark.parametrize(("size", "members"), [
    ("1e999", '[["0.png", 512, 10]]'),
    ("10240", '[["0.png", 1e999, 10]]'),
    ("10240", '[["0.png", 512, 99999]]'),
    ("1" + 20 * "0", '[["0.png", 1' + 19 * "0" + ", 10]]"),
])
def test_numbers_of_an_index_that_cannot_be_are_named(shard, size, members):
    index = shard.with_name("x.tar.json")
    index.write_text(f'{{"size": {size}, "members": {members}}}')
    text = message(TarShards, shard)
    assert f"index {index} is broken" in text and "delete it" in text


# ---- addresses


@pytest.mark.parametrize("fails", [1, 3])
def test_a_transfer_that_breaks_off_is_tried_again(shard, tmp_path, monkeypatch, quick, fails):
    tries = []

    def download(address, path, chunk_size):
        tries.append(address)
        if address.endswith(".json"):
            raise FileNotFoundError(address)
        if len(tries) <= fails:
            raise IncompleteRead(b"", 10)
        shard_index.Path(path).write_bytes(shard.read_bytes())

    monkeypatch.setattr(shard_index, "download", download)
    arguments = "http://host/x.tar", tmp_path / "cache"
    (tmp_path / "cache").mkdir()
    if fails == 3:
        assert "cannot fetch http://host/x.tar: IncompleteRead" in message(shard_index.fetch, *arguments)
        assert len(tries) == 3
    else:
        assert scan(shard_index.fetch(*arguments)).size == shard.stat().st_size


@pytest.mark.parametrize("address", ["http://127.0.0.1:port/x.tar", "http://127.0.0.1:9/a b.tar",
                                     "http://127.0.0.1:9/ä.tar"])
def test_an_address_that_cannot_be_is_named_at_once(tmp_path, address):
    assert f"cannot fetch {address}: " in message(shard_index.fetch, address, tmp_path)


def test_a_shard_of_another_time_than_its_index_is_told_with_both_copies(shard, server, tmp_path, capfd):
    address, files = server
    files["/x.tar"] = shard.read_bytes()
    index = scan(shard)
    files["/x.tar.json"] = json.dumps({"size": index.size + 512, "members": index.members}).encode()
    dataset = TarShards(f"{address}/x.tar", cache_dir=tmp_path / "cache")
    text = message(dataset.__getitem__, 0)
    copy = shard_index.local_copy(f"{address}/x.tar", tmp_path / "cache")
    assert f"shard {address}/x.tar has {index.size} bytes, its index says {index.size + 512}" in text
    assert f"Delete the copies {copy} and {copy}.json" in text and "at the address" in text


@pytest.mark.parametrize("name", ["x.tar", "x.tar.json"])
def test_a_broken_copy_is_told_with_its_address(shard, server, tmp_path, capfd, name):
    address, files = server
    files["/x.tar"] = shard.read_bytes()[:1000]
    if name == "x.tar.json":
        files["/x.tar.json"] = b"{}"
    copy = shard_index.local_copy(f"{address}/x.tar", tmp_path / "cache") + name.removeprefix("x.tar")
    text = message(TarShards, f"{address}/x.tar", cache_dir=tmp_path / "cache")
    assert f"{copy} is broken" in text and f"{copy} is a copy from {address}/{name}: delete it" in text


# ---- keys that samples lack


@pytest.fixture
def lacking_shard(tmp_path):
    """Write a shard of n samples, of which those named by ending have none."""
    def make(n=10, **lacking):
        members = {}
        for i in range(n):
            members[f"{i}.png"] = IMAGE
            members |= {f"{i}.{ending}": b"1" for ending, without in lacking.items() if i not in without}
        return write(tmp_path / "x.tar", members)
    return make


@pytest.mark.parametrize("keys", [None, ["class_label"]])
def test_the_one_sample_that_lacks_a_key_is_skipped(lacking_shard, caplog, keys):
    path = lacking_shard(cls=[3])
    dataset = TarShards(path, keys=keys)
    assert dataset.keys == ("class_label",)
    assert f"1 of 10 samples have no .cls for the key class_label, such as {path}/3: they are" in caplog.text
    assert [item["file_path_"][-5] for item in dataset] == [*"0124456789"]
    assert f"{path}/3 has no .cls for the key class_label" in caplog.text and "1 of 10 are bad" in caplog.text
    assert all(item["class_label"] == 1 for item in dataset)


def test_as_many_as_max_bad_fraction_tolerates_are_skipped(lacking_shard, caplog):
    path = lacking_shard(cls=[3, 4], txt=[4])
    assert TarShards(path, max_bad_fraction=0.2).keys == ("class_label", "caption")
    caplog.clear()
    assert TarShards(path, max_bad_fraction=0.1).keys == ("caption",)
    assert "items hold no class_label: 2 of 10 samples have no .cls" in caplog.text
    assert "raise max_bad_fraction=0.1, or give keys without class_label" in caplog.text
    with pytest.raises(ValueError, match="2 of 10 samples have no .cls for the key class_label, such as"):
        TarShards(path, keys=["class_label"], max_bad_fraction=0.1)


def test_samples_that_lack_different_keys_are_counted_together(lacking_shard, caplog):
    path = lacking_shard(cls=[3], txt=[4])
    dataset = TarShards(path)
    assert dataset.keys == ("class_label",) and len(list(dataset)) == 10
    assert "items hold no caption" in caplog.text


def test_a_key_that_no_sample_has_is_nothing_to_tell(lacking_shard, caplog):
    dataset = TarShards(lacking_shard(n=1))
    assert dataset.keys == () and set(dataset[0]) == {"image", "file_path_"} and not caplog.text


# ---- label ids


def labelled(tmp_path, ids):
    return write(tmp_path / "x.tar", {"0.png": IMAGE, "0.seg.png": png(ids)})


def test_ids_are_given_as_asked_for(tmp_path):
    path = labelled(tmp_path, IDS)
    for n_labels, dtype in ((5, np.uint8), (256, np.uint8), (257, np.int32)):
        given = TarShards(path, n_labels=n_labels, segmentation_ids=True)[0]["segmentation"]
        assert given.dtype == dtype and np.array_equal(given, IDS)
    onehot = TarShards(path, n_labels=5)[0]["segmentation"]
    assert onehot.dtype == np.float32 and np.array_equal(onehot, np.eye(5)[IDS])
    expected = re.escape(f"{path}/0.seg.png holds label ids from 0 to 4, but n_labels=4")
    with pytest.raises(ValueError, match=expected):
        TarShards(path, n_labels=4, segmentation_ids=True)[0]


def test_ids_are_shifted(tmp_path):
    ids = IDS.copy()
    ids[0, 0] = 255  # unlabeled
    path = labelled(tmp_path, ids)
    expected = IDS + 1
    expected[0, 0] = 0
    given = TarShards(path, n_labels=6, segmentation_ids=True, shift_segmentation=True)[0]["segmentation"]
    assert np.array_equal(given, expected)
    onehot = TarShards(path, n_labels=6, shift_segmentation=True)[0]["segmentation"]
    assert np.array_equal(onehot.argmax(-1), expected)
    assert np.array_equal(TarShards(path)[0]["segmentation"], ids)  # as they are


@pytest.mark.parametrize("setting", ["segmentation_ids", "shift_segmentation"])
def test_settings_of_ids_need_their_number(tmp_path, setting):
    with pytest.raises(ValueError, match="need n_labels: set it"):
        TarShards(labelled(tmp_path, IDS), **{setting: True})


@pytest.mark.parametrize("content, what", [(b"t\xfcr\n", "is no UTF-8 text"), (b"\n", "is empty")])
def test_names_of_classes_that_cannot_be_read_are_told_with_their_file(shard, content, what):
    (shard.parent / "classes.txt").write_bytes(content)
    file = shard.parent / "classes.txt"
    with pytest.raises(ValueError, match=f"^class name file {re.escape(str(file))} {what}"):
        TarShards(shard)
