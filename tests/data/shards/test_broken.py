"""What is broken or lacking in shards: one clear message each, and never fewer samples without a word."""

import io
import json
import os
import re
import tarfile
import threading
from contextlib import suppress
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from taming.data.files.depth import depth_to_rgba
from taming.data.shards import TarShards
from taming.data.shards import index as shard_index
from taming.data.shards.index import ShardError, expand, scan
from tests.data.files.hostile import LONG as LONG_FORM
from tests.data.files.hostile import read_within_budget


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

    def download(address, path, chunk_size, max_bytes):
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


@pytest.mark.parametrize("content, what", [(b"t\xfcr\n", "is not UTF-8 text"), (b"\n", "is empty")])
def test_names_of_classes_that_cannot_be_read_are_told_with_their_file(shard, content, what):
    (shard.parent / "classes.txt").write_bytes(content)
    file = shard.parent / "classes.txt"
    with pytest.raises(ValueError, match=f"^class name file {re.escape(str(file))} {what}"):
        TarShards(shard)


# ---- what a stranger's shard can claim


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header of a tar file; `size` is its field, as it is."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(size: int) -> bytes:
    """A number in a header beyond the octal ones."""
    return ((1 << 95) + size if size >= 0 else (1 << 96) + size).to_bytes(12, "big")


END = bytes(1024)
LONG = header(b"x.png", b"%011o" % 8192, b"x")
HOSTILE_SHARDS = {
    "long_name.tar": (header(b"x.png", binary(1 << 40), b"L") + END, "a header has 1099511627776 bytes"),
    "long_pax.tar": (header(b"x.png", b"%011o" % (1 << 32), b"x") + END, "a header has 4294967296 bytes"),
    "member.tar": (header(b"x.png", binary(1 << 50)) + END, "unexpected end|Invalid argument"),
    "negative.tar": (header(b"x.png", binary(-512)) + END, "has -512 bytes|cannot"),
    "negative_name.tar": (header(b"x.png", binary(-512), b"L") + END, "a header has -512 bytes"),
    "digits.tar": (LONG + b"1" * 8192 + END, "more than 100 digits"),
    "nested.tar": ((header(b"x", b"%011o" % 8, b"g") + b"8 a=bcd\n".ljust(512, b"\0")) * 3000 + END, ""),
    "name.tar": (header(b"x", b"%011o" % 5000, b"L") + (b"y" * 4990).ljust(5120, b"\0")
                 + header(b"x.png", b"%011o" % 0) + END, "the name of a file has 4990 characters"),
    "empty.tar": (b"", "empty file"),
}
HOSTILE_INDICES = {
    "deep": "[" * 100_000, "deep_members": '{"size": 10240, "members": ' + "[" * 100_000,
    "digits": '{"size": ' + "9" * 10_000 + ', "members": []}',
    "name": '{"size": 10240, "members": [["' + "n" * 5000 + '.png", 512, 10]]}',
    "list": "[]", "null": "null", "empty": "", "text": "\ufeff{", "no members": '{"size": 10240}',
    "pairs": '{"size": 10240, "members": [["0.png", 512]]}', "words": '{"size": 10240, "members": "0.png"}',
    "negative": '{"size": 10240, "members": [["0.png", -512, 10]]}',
    "many": '{"size": 10240, "members": [' + '["0.png",512,0],' * 300_000 + '["0.png",512,0]]}',
}


def test_hostile_shards_are_refused_within_the_budget(tmp_path):
    for name, (data, _) in HOSTILE_SHARDS.items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "sparse.tar").open("wb") as file:
        file.truncate(1 << 42)
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    for name, content in HOSTILE_INDICES.items():
        write(tmp_path / f"index_{name}.tar", {"0.png": IMAGE})
        (tmp_path / f"index_{name}.tar.json").write_text(content)
    write(tmp_path / "index_pipe.tar", {"0.png": IMAGE})
    os.mkfifo(tmp_path / "index_pipe.tar.json")
    said = read_within_budget("taming.data.shards:TarShards", sorted(tmp_path.glob("*.tar")))
    for name, (_, reason) in HOSTILE_SHARDS.items():
        assert re.search(f"^shard {tmp_path / name} is broken: .*({reason})", said[name]), (name, said[name])
    assert "bytes follow its end" in said["sparse.tar"]
    assert "is a pipe, but must be a file" in said["pipe.tar"] and "is a device" in said["zero.tar"]
    for name in (*HOSTILE_INDICES, "pipe"):
        text = said[f"index_{name}.tar"]
        remedy = "pack several smaller shards" if name == "many" else "delete it"
        assert text.startswith(f"index {tmp_path}/index_{name}.tar.json ") and remedy in text, text


def test_a_shard_of_too_many_members_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tar", {f"{i}.png": IMAGE for i in range(10)})
    monkeypatch.setattr(shard_index, "MAX_MEMBERS", 10)
    index = scan(path)
    assert len(index.members) == 10
    monkeypatch.setattr(shard_index, "MAX_MEMBERS", 9)
    assert "it has more than 9 members: pack several smaller shards" in message(scan, path)
    shard_index.write_index(path, index)
    assert f"index {path}.json has more than 9 members" in message(TarShards, path)


@LONG_FORM
@pytest.mark.slow
def test_a_shard_of_too_many_members_is_refused_within_the_budget(tmp_path):
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(header(b"x.txt", b"%011o" % 0) * 250_001 + END)
    said = read_within_budget("taming.data.shards:TarShards", [tmp_path / "x.tar"])
    assert "it has more than 250000 members: pack several smaller shards" in said["x.tar"]


@pytest.mark.parametrize("key, ending", [("image", "png"), ("class_label", "cls"), ("caption", "txt")])
def test_an_index_that_claims_huge_parts_makes_bad_samples(tmp_path, caplog, key, ending):
    """The shard is sparse, so that they lie within it."""
    path = write(tmp_path / "x.tar", {f"{i}.{e}": IMAGE if e == "png" else b"1" for i in range(3)
                                      for e in ("png", "cls", "txt")})
    members = scan(path).members
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    lying = [(n, o, 1 << 41) if n == f"1.{ending}" else (n, o, s) for n, o, s in members]
    (tmp_path / "x.tar.json").write_text(json.dumps({"size": 1 << 42, "members": lying}))
    dataset = TarShards(path, max_bad_fraction=0.4)
    assert [item["file_path_"][-5] for item in dataset] == ["0", "2", "2"]
    assert f"1.{ending} has {1 << 41} bytes, more than" in caplog.text and "1 of 3 are bad" in caplog.text


def test_labels_that_are_no_classes_are_bad_samples(tmp_path, caplog):
    labels = {0: b"7", 1: b"-1", 2: b"9" * 30, 3: b"9" * 10_000, 4: b"1.5", 5: b"\xff", 6: b"2147483647"}
    members = {}
    for i, label in labels.items():
        members |= {f"{i}.png": IMAGE, f"{i}.cls": label}
    dataset = TarShards(write(tmp_path / "x.tar", members), max_bad_fraction=0.8)
    assert [item["class_label"] for item in dataset] == [7] + [2147483647] * 6
    assert f"{tmp_path}/x.tar/1.cls says class -1, but classes are 0 to 2147483647" in caplog.text


@pytest.mark.parametrize("pattern", [
    "x-{0..999999999}.tar", "x-{0..9999}-{0..9999}.tar", "http://host/{0..99999}{0..99999}.tar",
    "{0..1000000}", "{000000000000000000..999999999999999999}.tar",
])
def test_ranges_that_stand_for_too_many_shards_are_refused(pattern):
    expected = f"shards {pattern}: the ranges stand for more than 1000000 shards"
    with pytest.raises(ValueError, match=re.escape(expected)):
        expand(pattern)


def test_ranges_are_written_out_in_order():
    assert expand("http://h/{08..10}-{1..2}.tar") == [
        f"http://h/{a}-{b}.tar" for a in ("08", "09", "10") for b in (1, 2)]
    with pytest.raises(FileNotFoundError, match="there is no shard"):
        expand("x-{0..999999}.tar")
    with pytest.raises(ValueError, match="runs backwards"):
        expand("x-{5..4}.tar")


def test_names_that_are_no_text_and_of_any_length_are_kept(tmp_path):
    names = ["a", "b" * 600, "\udcff\udcfe", "\u00e4/\u00f6"]
    dataset = TarShards(write(tmp_path / "x.tar", {f"{name}.png": IMAGE for name in names}))
    stems = [item["file_path_"].removeprefix(f"{tmp_path}/x.tar/") for item in dataset]
    assert stems == ["a.png", "b" * 600 + ".png", "\\udcff\\udcfe.png", "\u00e4/\u00f6.png"]


@pytest.mark.parametrize("what", ["x.tar", "x.tar.json"])
def test_a_server_that_sends_without_end_is_left(shard, tmp_path, monkeypatch, quick, capfd, what):
    """The limit is the size that the index says, or what an index may have."""
    index = scan(shard)
    sent = []

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/x.tar.json" and what == "x.tar":
                body = json.dumps({"size": index.size, "members": index.members}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    sent.append(self.wfile.write(bytes(1 << 16)))

        def log_message(self, format, *args):
            pass

    monkeypatch.setattr(shard_index, "MAX_INDEX", 1 << 20)
    monkeypatch.setattr(shard_index, "_PIECE", 1 << 16)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{http.server_port}/x.tar"
    try:
        text = message(lambda: TarShards(address, cache_dir=tmp_path / "cache")[0])
    finally:
        http.shutdown()
        http.server_close()
    most = index.size if what == "x.tar" else 1 << 20
    assert f"cannot fetch http://127.0.0.1:{http.server_port}/{what}: " in text
    assert f"sends more than {most} bytes" in text and sum(sent) < 1 << 28
    assert not [path for path in (tmp_path / "cache").iterdir() if path.stat().st_size > 10_000]
