"""Tar shards give what the folder gives, each sample exactly once; broken ones are named; nothing is run."""

import io
import json
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from taming.config import instantiate_from_config
from taming.data.custom import CustomClassTest
from taming.data.datamodule import DataModuleFromConfig, WrappedDataset
from taming.data.files.depth import depth_to_rgba
from taming.data.sampler import ResumableBatchSampler, SeededDataset
from taming.data.shards import TarShards
from taming.data.shards.index import expand, scan
from taming.data.shards.writer import pack

IMAGES = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in two class folders, each with a caption, a label map and a depth map."""
    root = tmp_path_factory.mktemp("data")
    for i in range(IMAGES):
        rng = np.random.default_rng(i)
        name = f"{'ab'[i % 2]}/{i:02}"
        for part in ("images", "labels", "depth"):
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 5, (12, 16), np.uint8)).save(root / "labels" / f"{name}.png")
        depth = rng.random((12, 16), dtype=np.float32) * 80
        Image.fromarray(depth_to_rgba(depth)).save(root / "depth" / f"{name}.png")
        (root / "images" / f"{name}.txt").write_text(f"number {i}\n")
    return root


@pytest.fixture(scope="module")
def shards(folder):
    out = folder / "shards"
    steps = list(pack(
        folder / "images", out, max_samples=5, classes=True, captions=True, segmentation=folder / "labels",
        depth=folder / "depth",
    ))
    assert steps == [(count, IMAGES) for count in range(1, IMAGES + 1)]
    return out


def names(items) -> list[str]:
    return [item["file_path_"].rpartition("/")[2] for item in items]


# ---- what is in them


def test_shards_hold_what_the_folder_holds(folder, shards):
    assert [path.name for path in sorted(shards.glob("*.tar"))] == [f"train-{i:06}.tar" for i in range(5)]
    dataset = TarShards(shards, 8)
    plain = CustomClassTest(8, folder / "images", folder / "images")
    plain = {item["file_path_"].rpartition("/")[2]: item for item in (plain[i] for i in range(len(plain)))}
    assert len(dataset) == IMAGES and sorted(names(dataset)) == sorted(plain)
    assert names(dataset) != sorted(plain)  # mixed
    for item in dataset:
        expected = plain[item["file_path_"].rpartition("/")[2]]
        assert np.array_equal(item["image"], expected["image"]) and item["image"].dtype == np.float32
        assert item["class_label"] == expected["class_label"]
        assert item["human_label"] == expected["human_label"]
        number = int(expected["file_path_"][-6:-4])
        assert item["caption"] == f"number {number}"
        assert item["segmentation"].shape == (8, 8) and item["segmentation"].max() < 5
        assert item["depth"].shape == (8, 8, 1) and -1 <= item["depth"].min() < item["depth"].max() <= 1


def test_maps_move_with_their_image(folder, shards):
    dataset = TarShards(shards, crop_size=8, random_crop=True, flip=True, coord=True, n_labels=5)
    torch.manual_seed(0)
    item = dataset[4]
    name = item["file_path_"].rpartition("/")[2]
    label = "ab"[item["class_label"]]
    ids = np.asarray(Image.open(folder / "labels" / label / name))
    one_hot = item["segmentation"]
    assert one_hot.shape == (8, 8, 5) and (one_hot.sum(-1) == 1).all()
    top, left = divmod(round(float(item["coord"][0, 0, 0]) * 12 * 16), 16)
    cuts = [m[top:top + 8, left:left + 8] for m in (ids, ids[:, ::-1])]
    assert any(np.array_equal(one_hot.argmax(-1), cut) for cut in cuts)


def test_any_tar_of_the_format_is_read(tmp_path):
    """Members in any order, of folders and of unknown kinds, as others pack them; without an index."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "JPEG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (
            ("set/0.5.cls", b"1"), ("set/0.JPG", picture.getvalue()), ("set/0.pkl", pickle.dumps(print)),
            ("set/1.jpg", picture.getvalue()), ("set/0.cls", b"3\n"), ("set/1.cls", b"4"),
            (".hidden.jpg", b""),
            ("__index__", b"no ending"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = TarShards(tmp_path / "x.tar", 8)
    assert [item["class_label"] for item in dataset] == [3, 4]
    assert [item["file_path_"] for item in dataset] == [f"{tmp_path}/x.tar/set/{i}.jpg" for i in (0, 1)]
    assert set(dataset[0]) == {"image", "file_path_", "class_label"}


def test_the_index_says_what_a_look_into_the_shard_says(shards, tmp_path):
    for path in shards.glob("*.tar"):
        content = json.loads((path.parent / f"{path.name}.json").read_text())
        assert scan(path) == (content["size"], [tuple(member) for member in content["members"]])


def test_an_index_that_does_not_fit_is_not_used(shards, tmp_path):
    for source, target in (("0", "0"), ("1", "0")):  # the index of another shard
        suffix = ".tar" if source == "0" else ".tar.json"
        data = (shards / f"train-00000{source}{suffix}").read_bytes()
        (tmp_path / f"train-00000{target}{suffix}").write_bytes(data)
    content = json.loads((tmp_path / "train-000000.tar.json").read_text())
    (tmp_path / "train-000000.tar.json").write_text(json.dumps(content | {"size": content["size"] + 512}))
    assert len(TarShards(tmp_path)) == 5
    assert all(item["image"].shape == (12, 16, 3) for item in TarShards(tmp_path))


# ---- exactly once


def shares(dataset, epoch: int, processes: int, workers: int) -> list[list[int]]:
    """What each worker of each process loads in an epoch, as a DataLoader deals batches."""
    loaded = []
    for rank in range(processes):
        stream = ResumableBatchSampler(dataset, 2, rank=rank, world_size=processes, drop_last=False)
        stream.start, stream.stop = epoch * len(stream), (epoch + 1) * len(stream)
        batches = list(stream)
        loaded += [[i for batch in batches[w::workers] for _, i in batch] for w in range(workers)]
    return loaded


@pytest.mark.parametrize("mixed_shards", [None, 2])
def test_two_processes_with_two_workers_see_every_sample_exactly_once(shards, mixed_shards):
    dataset = TarShards(shards, mixed_shards=mixed_shards)
    epochs = [shares(dataset, epoch, 2, 2) for epoch in range(3)]
    for loaded in epochs:
        assert sorted(index for share in loaded for index in share) == list(range(IMAGES))
        assert min(map(len, loaded)) >= 4
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] == shares(dataset, 0, 2, 2)


def test_a_loader_with_two_workers_sees_every_sample_exactly_once(shards):
    config = {"target": "taming.data.shards.TarShards", "params": {"shards": str(shards), "size": 8}}
    data = DataModuleFromConfig(4, train=config, num_workers=2, drop_last=False)
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = ([name for batch in loader for name in batch["file_path_"]] for _ in range(2))
    assert len(first) == IMAGES and sorted(first) == sorted(set(first)) == sorted(second)
    assert first != second


def test_an_order_continues_where_it_was_left(shards):
    dataset = TarShards(shards, 8, random_crop=True, flip=True, crop_size=6, mixed_shards=2)
    stream = ResumableBatchSampler(dataset, 4)
    stream.stop = 9
    whole = list(stream)
    stream = ResumableBatchSampler(TarShards(shards, mixed_shards=2), 4)
    stream.start, stream.stop = 3, 9
    assert list(stream) == whole[3:]
    seeded = SeededDataset(dataset, 0)
    assert np.array_equal(seeded[whole[3][0]]["image"], seeded[whole[3][0]]["image"])


def test_few_shards_are_read_at_a_time(shards):
    dataset = TarShards(shards, mixed_shards=2)
    order = dataset.permutation(np.random.default_rng(0))
    assert sorted(order) == list(range(IMAGES))
    stream, wrapped = ResumableBatchSampler(dataset, 4), ResumableBatchSampler(WrappedDataset(dataset), 4)
    stream.stop = wrapped.stop = len(stream)
    assert list(wrapped) == list(stream)
    visited = dataset._shard[order]
    spans = [np.ptp(np.flatnonzero(visited == shard)) for shard in range(5)]
    assert max(spans) < 10 and max(spans) >= 5  # two shards of at most five, and they are mixed
    assert order.tolist() != dataset.permutation(np.random.default_rng(1)).tolist()


def test_a_copy_for_another_process_opens_its_own_files(shards):
    dataset = TarShards(shards, 8)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert dataset._files and not copy._files
    assert np.array_equal(copy[0]["image"], dataset[0]["image"])


# ---- behind addresses


@pytest.fixture
def server(shards):
    requested = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requested.append(self.path)

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", requested
    http.shutdown()
    http.server_close()


def test_shards_behind_an_address_are_fetched_once_when_they_are_needed(shards, server, tmp_path, capfd):
    address, requested = server
    pattern = f"{address}/train-{{000000..000004}}.tar"
    dataset = TarShards(pattern, 8, cache_dir=tmp_path / "cache", classes_from=shards / "classes.txt")
    assert len(dataset) == IMAGES and not any(path.endswith(".tar") for path in requested)
    local = TarShards(shards, 8)
    for index in (0, 1, 21):
        assert np.array_equal(dataset[index]["image"], local[index]["image"])
        assert dataset[index]["human_label"] == local[index]["human_label"]
    assert sorted(path for path in requested if path.endswith(".tar")) == [
        "/train-000000.tar", "/train-000004.tar",
    ]
    del requested[:]
    again = TarShards(pattern, 8, cache_dir=tmp_path / "cache")
    assert np.array_equal(again[0]["image"], local[0]["image"]) and not requested


def test_without_an_index_a_shard_is_fetched_to_look_into_it(server, shards, tmp_path, capfd):
    address, requested = server
    (shards / "lone.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    try:
        assert len(TarShards(f"{address}/lone.tar", cache_dir=tmp_path)) == 5
    finally:
        (shards / "lone.tar").unlink()
    with pytest.raises(FileNotFoundError, match="nothing.tar does not exist"):
        TarShards(f"{address}/nothing.tar", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="is an address: set cache_dir"):
        TarShards(f"{address}/lone.tar")


# ---- names, and what is broken


def test_names_of_shards(shards, tmp_path):
    paths = [str(shards / f"train-00000{i}.tar") for i in range(5)]
    assert paths == expand(shards) == expand(f"{shards}/train-*.tar")
    assert paths == expand(f"{shards}/train-{{000000..000004}}.tar")
    assert expand([paths[1], paths[0]]) == [paths[1], paths[0]]
    assert expand("https://x.y/{08..10}/{1..2}.tar")[1:3] == ["https://x.y/08/2.tar", "https://x.y/09/1.tar"]


@pytest.mark.parametrize("pattern", ["pipe:cat x.tar", "pipe: x |", "| cat", "s3://x/x.tar", "file:///x"])
def test_commands_and_other_addresses_are_refused(pattern):
    with pytest.raises(ValueError, match="are not allowed.*no command is run"):
        TarShards(pattern)


def damaged(shards, tmp_path, change):
    path = tmp_path / "broken.tar"
    path.write_bytes(change((shards / "train-000000.tar").read_bytes()))
    return path


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: b"no tar file at all", "broken.tar is broken"),
    (lambda data: b"", "broken.tar is broken"),
    (lambda data: data[:5000], "broken.tar is broken"),
    (lambda data: data[:len(data) // 1024 * 512 + 100], "broken.tar is broken"),
    (lambda data: __import__("gzip").compress(data), "must not be compressed"),
])
def test_a_broken_shard_is_one_clear_message(shards, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        TarShards(damaged(shards, tmp_path, change))
    assert "\n" not in str(caught.value) and "pack it again" in str(caught.value)


def test_a_shard_cut_between_two_members_is_noticed(shards, tmp_path):
    last = scan(shards / "train-000000.tar").members[-1]
    end = last[1] + -(-last[2] // 512) * 512
    with pytest.raises(ValueError, match="it is cut off at byte"):
        TarShards(damaged(shards, tmp_path, lambda data: data[:end]))


def test_a_bad_sample_is_skipped_and_counted(shards, tmp_path, caplog):
    where = dict((name, (offset, size)) for name, offset, size in scan(shards / "train-000000.tar").members)
    first = next(name for name in where if name.count(".") == 1 and name.endswith(".png"))

    def spoil(data):
        offset, size = where[first]
        return data[:offset + 8] + bytes(size - 8) + data[offset + size:]

    dataset = TarShards(damaged(shards, tmp_path, spoil), keys=[], max_bad_fraction=0.3)
    assert len(dataset) == 5 and len(names(dataset)) == 5
    assert f"broken.tar/{first}" in caplog.text and "1 of 5 are bad" in caplog.text


def test_bad_arguments_are_named(folder, shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no shard .*none-0.tar"):
        TarShards(tmp_path / "none-0.tar")
    with pytest.raises(ValueError, match="'mask'; choose from class_label"):
        TarShards(shards, keys=["mask"])
    with pytest.raises(ValueError, match="mixed_shards is 0"):
        TarShards(shards, mixed_shards=0)
    with pytest.raises(ValueError, match="named twice, such as .*000001"):
        TarShards([shards, shards / "train-000001.tar"])
    with pytest.raises(ValueError, match="n_labels=2 allows 0 to 1"):
        TarShards(shards, n_labels=2)[0]
    list(pack(folder / "labels", tmp_path / "plain"))
    with pytest.raises(ValueError, match="22 of 22 samples have no .cls for the key class_label"):
        TarShards(tmp_path / "plain", keys=["class_label"])
    with pytest.raises(ValueError, match="does not accept 'shard'"):
        instantiate_from_config({"target": "taming.data.shards.TarShards", "params": {"shard": "x"}})


# ---- packing


def test_packing_twice_gives_the_same_bytes_and_does_not_overwrite(folder, tmp_path):
    for name in ("a", "b"):
        list(pack(folder / "images", tmp_path / name, max_bytes=20_000))
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 4
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    with pytest.raises(ValueError, match="remove them, or choose another name"):
        list(pack(folder / "images", tmp_path / "a"))
    steps = pack(folder / "images", tmp_path / "c")
    next(steps)
    steps.close()  # interrupted
    assert list((tmp_path / "c").iterdir()) == []


def test_dots_and_doubles_in_names(tmp_path):
    for name in ("a.b.png", "a_b.png", "a.b.jpg"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    list(pack(tmp_path / "in", tmp_path / "out", seed=None))
    assert [member[0] for member in scan(tmp_path / "out" / "train-000000.tar").members] == [
        "a_b.jpg", "a_b_png.png", "a_b_png_png.png",
    ]


def test_what_is_missing_beside_an_image_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"\.png has no .*nowhere"):
        list(pack(folder / "images", tmp_path / "out", depth=tmp_path / "nowhere"))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="x.png is not in a class folder: move it into one of a"):
        list(pack(tmp_path, tmp_path / "out", classes=True))


def test_packed_shards_have_no_more_members_than_are_read(folder, tmp_path, monkeypatch):
    from taming.data.shards import writer

    monkeypatch.setattr(writer, "MAX_MEMBERS", 11)
    list(pack(folder / "images", tmp_path, captions=True))
    counts = [len(scan(path).members) for path in sorted(tmp_path.glob("*.tar"))]
    assert max(counts) <= 11 and sum(counts) == 2 * IMAGES and len(TarShards(tmp_path)) == IMAGES
