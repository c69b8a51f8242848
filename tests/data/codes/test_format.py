"""Packed records: any width, any shape, bit for bit; headers that lie, and blocks that are damaged."""

import io
import json
import math
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taming.data.codes import CodeCacheError, CodeDataset, CodeHeader, Field
from taming.data.codes.format import (
    BLOCK,
    MAGIC,
    MAX_HEADER,
    PREFIX,
    SLACK,
    checksums,
    grid_names,
    pack,
    read_header,
    unpack,
)
from taming.data.codes.writer import CodeWriter
from taming.data.sampler import SeededDataset


def header_of(fields, images=10, views=1, **about):
    return CodeHeader(tuple(fields), images, views, "0" * 64, about)


def values_of(header, seed=0):
    rng = np.random.default_rng(seed)
    return {f.name: rng.integers(0, f.values, (header.records, *f.shape)) for f in header.fields}


def write(path, header, values=None, batch_size=4):
    """Write a code cache; return its arrays."""
    values = values_of(header) if values is None else values
    writer = CodeWriter(path, header, batch_size)
    records = pack(header.fields, values)
    for part in range(writer.parts):
        numbers = writer.records_of(part)
        writer.write_part(part, records[numbers.start:numbers.stop])
    writer.merge()
    return values


FIELDS = [
    Field.of("codes", (4, 6), 1000), Field.of("tokens/segmentation", (2, 3), 5, "ab" * 32),
    Field.of("class_label", (), 7),
]

fields = st.builds(
    lambda shape, values: (shape, values),
    st.one_of(st.just(()), st.tuples(st.integers(1, 20)), st.tuples(st.integers(1, 5), st.integers(1, 9))),
    st.one_of(st.integers(1, 40), st.integers(1, 1 << 32), st.sampled_from([2**n for n in range(33)])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(fields, min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 99))
def test_what_is_packed_is_unpacked(found, count, seed):
    rng = np.random.default_rng(seed)
    all_fields = [Field.of(f"codes/{i}", *each) for i, each in enumerate(found)]
    values = {f.name: rng.integers(0, f.values, (count, *f.shape)) for f in all_fields}
    for field in all_fields:
        if count:
            values[field.name][-1] = field.values - 1  # all bits
    records = pack(all_fields, values)
    bits = sum(math.prod(f.shape) * f.bits for f in all_fields)
    assert records.shape == (count, -(-bits // 8)) and records.dtype == np.uint8
    noise = rng.integers(0, 256, SLACK, dtype=np.uint8)
    again = unpack(all_fields, np.concatenate([records.ravel(), noise]), count)
    for field in all_fields:
        assert again[field.name].dtype == np.int64 and np.array_equal(again[field.name], values[field.name])


def test_bits_lie_as_the_format_says():
    """Two codes of 10 bits, the lowest bit first: 1 and 1023 are bits 0 and 10 to 19."""
    records = pack([Field.of("codes", (1, 2), 1024)], {"codes": np.array([[[1, 1023]]])})
    assert records.tolist() == [[1, 0b11111100, 0b1111]]
    assert [Field.of("x", (), k).bits for k in (1, 2, 3, 1024, 1025, 1 << 32)] == [1, 1, 2, 10, 11, 32]


@pytest.mark.parametrize(("array", "message"), [
    (np.full((1, 4, 6), 1000), "codes holds 1000, but its values are 0 to 999"),
    (np.full((1, 4, 6), -1), "codes holds -1"), (np.zeros((1, 6, 4), int), r"codes has the shape \(6, 4\)"),
])
def test_wrong_values_are_not_packed(array, message):
    with pytest.raises(ValueError, match=message):
        pack(FIELDS[:1], {"codes": array})


def test_names_of_grids():
    assert grid_names(1) == ["codes"] and grid_names(2) == ["codes/0", "codes/1"]


@pytest.mark.parametrize("sizes", [[0], [1], [BLOCK], [BLOCK - 1, 3, BLOCK * 2, 5], [7] * 5])
def test_checksums_are_those_of_blocks(sizes):
    pieces = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    found = list(checksums(iter(pieces)))
    whole = b"".join(pieces)
    assert b"".join(piece for piece, _ in found) == whole
    expected = [zlib.crc32(whole[i:i + BLOCK]) for i in range(0, len(whole), BLOCK)]
    assert [checksum for _, checksum in found if checksum is not None] == expected


# ---- files


@pytest.mark.parametrize("fields", [FIELDS, [Field.of("codes", (1, 1), 1)],
                                    [Field.of("codes/0", (2, 2), 512), Field.of("codes/1", (4, 4), 16)]])
def test_a_file_holds_what_was_written(tmp_path, fields):
    header = header_of(fields, 150, 2, class_names=["a", "b"])
    values = write(tmp_path / "x.tcc", header)
    dataset = CodeDataset(tmp_path / "x.tcc")
    assert dataset.code_header == header and len(dataset) == 150 and dataset.class_names == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.tcc"]
    numbers = np.array([5, 299, 0, 5, 150])
    for name, tensor in dataset.read(numbers).items():
        assert tensor.dtype == torch.int64 and np.array_equal(tensor.numpy(), values[name][numbers])
    item = dataset[-1]
    assert all(np.array_equal(item[name].numpy(), values[name][149]) for name in values)
    with pytest.raises(IndexError, match="indices from 150 to 150 of 150 images"):
        dataset[150]
    dataset.check_all()


def test_epochs_read_the_views_in_turn(tmp_path):
    header = header_of(FIELDS, 6, 3)
    codes = write(tmp_path / "x.tcc", header)["codes"]
    dataset = SeededDataset(CodeDataset(tmp_path / "x.tcc"), seed=1)
    batch = dataset.collate_fn(dataset.__getitems__([(0, 5), (1, 2), (2, 0), (4, 2), 3]))
    assert np.array_equal(batch["codes"].numpy(), codes[[5, 6 + 2, 12, 6 + 2, 3]])
    assert np.array_equal(dataset[4, 2]["codes"].numpy(), codes[6 + 2])
    listed = dataset.dataset.collate_fn([dataset[0], dataset[1]])
    assert np.array_equal(listed["codes"].numpy(), codes[:2])


def test_a_copy_in_another_process_reads_the_same_file(tmp_path):
    path = tmp_path / "x.tcc"
    values = write(path, header_of(FIELDS))
    data = pickle.dumps(CodeDataset(path))
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data)[3]["codes"].numpy(), values["codes"][3])
    path.unlink()
    write(path, header_of(FIELDS[:1]))
    with pytest.raises(CodeCacheError, match="was replaced while it was in use"):
        pickle.loads(data)


def test_size_of_the_file(tmp_path):
    """16 x 16 codes of 1,024 and a class of 1,000: at most 1.02 of the fewest bits that hold them."""
    fields = [Field.of("codes", (16, 16), 1024), Field.of("class_label", (), 1000)]
    header = header_of(fields, 2000, class_names=[f"name of class {i}" for i in range(1000)])
    write(tmp_path / "x.tcc", header)
    least = 2000 * (256 * math.log2(1024) + math.log2(1000)) / 8
    assert 1.0 <= (tmp_path / "x.tcc").stat().st_size / least <= 1.06  # names: 27 KB
    header = header_of(fields, 100_000)
    bytes_ = len(header.to_bytes()) + header.records * header.record_bytes * (1 + 4 / BLOCK)
    assert bytes_ / (50 * least) <= 1.005


def test_a_damaged_block_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "x.tcc"
    header = header_of([Field.of("codes", (32, 32), 1 << 16)], 100)  # 2 KB each, 32 in a block
    values = write(path, header)
    data = bytearray(path.read_bytes())
    data[-20 * 2048] ^= 1
    path.write_bytes(data)
    dataset = CodeDataset(path)  # nothing is read yet
    assert np.array_equal(dataset.read(np.arange(64))["codes"].numpy(), values["codes"][:64])
    with pytest.raises(CodeCacheError, match=r"x\.tcc is damaged at record 64 of 100: copy it again"):
        dataset[70]
    with pytest.raises(CodeCacheError, match="is damaged at record 64"):
        CodeDataset(path).check_all()


def test_every_bit_of_a_file_matters(tmp_path):
    """But those of the padding between header and records."""
    path = tmp_path / "x.tcc"
    values = write(path, header_of(FIELDS, 3))
    whole = path.read_bytes()
    length = PREFIX.unpack(whole[:PREFIX.size])[2]
    padding = range(PREFIX.size + length, -(-(PREFIX.size + length) // 64) * 64)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            codes = CodeDataset(path).read(np.arange(3))["codes"].numpy()
        except CodeCacheError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert place in padding and np.array_equal(codes, values["codes"])


def test_a_file_that_is_cut_short_or_longer(tmp_path):
    path = tmp_path / "x.tcc"
    write(path, header_of(FIELDS, 3))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CodeCacheError, match=str(path)):
            CodeDataset(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CodeCacheError, match=rf"is cut short: it has {len(whole) - 1} of {len(whole)} bytes"):
        CodeDataset(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CodeCacheError, match="is longer than its header says"):
        CodeDataset(path)


@pytest.mark.parametrize(("path", "message"), [
    ("none.tcc", "there is no code cache .*none.tcc: make it with `taming encode`"),
    (".", "is a folder"),
])
def test_no_file(tmp_path, path, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        CodeDataset(tmp_path / path)


# ---- headers of strangers


def with_header(content, length=None, version=1):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = PREFIX.pack(MAGIC, version, len(text) if length is None else length, zlib.crc32(text)) + text
    return start + bytes(-len(start) % 64)


def content(**changes):
    field = {"name": "codes", "shape": [2, 2], "values": 16, "bits": 4, "stage": ""}
    field |= {key: changes.pop(key) for key in list(changes) if key in field}
    return {"fields": [field], "images": 1, "views": 1, "tokenizer": "", "about": {}} | changes


HOSTILE = {
    "no JSON": b"{", "nested": b"[" * 100_000, "a list": b"[]", "null": b"null", "not UTF-8": b"\xff" * 10,
    "huge number": b'{"images": 1' + b"0" * 5000 + b"}", "infinite": content(images=1e999),
    "a text": content(images="7"), "true": content(images=True), "no images": content(images=0),
    "negative": content(views=-1), "many images": content(images=1 << 41),
    "many views": content(views=1 << 20),
    "no bits": content(bits=0), "33 bits": content(bits=33), "no values": content(values=0),
    "more values than bits": content(values=17), "no side": content(shape=[0, 4]),
    "three sides": content(shape=[1, 1, 1]), "huge record": content(shape=[1 << 30, 1 << 30]),
    "no fields": content(fields=[]), "no codes": content(name="class_label"),
    "fields of one name": content(fields=content()["fields"] * 2), "many fields": content(
        fields=[content(name=f"codes/{i}")["fields"][0] for i in range(65)]),
    "about": content(about=7), "fields that are none": content(fields=7),
    "huge file": content(images=1 << 39, shape=[1000, 1000]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_one_line(tmp_path, name):
    path = tmp_path / "x.tcc"
    path.write_bytes(with_header(HOSTILE[name]))
    with pytest.raises(CodeCacheError) as caught:
        CodeDataset(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_header_is_bounded(tmp_path):
    path = tmp_path / "x.tcc"
    path.write_bytes(with_header(content(), length=MAX_HEADER + 1))
    with pytest.raises(CodeCacheError, match="a header of 4194305 bytes is not read"):
        CodeDataset(path)
    with pytest.raises(ValueError, match="the header of the code cache would have"):
        header_of(FIELDS, x="x" * MAX_HEADER).to_bytes()
    path.write_bytes(with_header(content(), version=2))
    with pytest.raises(CodeCacheError, match="has version 2 of the format, and 1 is read here"):
        CodeDataset(path)


def test_a_sparse_file_costs_what_is_read_of_it(tmp_path):
    """A terabyte that is not there: opening is quick, and the block that is read has a wrong checksum."""
    path = tmp_path / "x.tcc"
    start = with_header(content(images=1 << 32, shape=[16, 16], values=1024, bits=10))
    data = (1 << 32) * 320
    with path.open("wb") as file:
        file.write(start)
        try:
            file.truncate(len(start) + data + 4 * -(-data // BLOCK))
        except OSError:
            pytest.skip("no such files here")
    with pytest.raises(CodeCacheError, match="is damaged at record"):
        CodeDataset(path)[1 << 31]


def test_a_code_that_the_codebook_lacks_is_found(tmp_path):
    """Its checksums are right, as somebody's may be who means harm: an embedding has no such row."""
    path = tmp_path / "x.tcc"
    start = with_header(content(values=11))
    path.write_bytes(start + b"\xbf\x00" + struct.pack("<I", zlib.crc32(b"\xbf\x00")))
    with pytest.raises(CodeCacheError, match="codes holds 15, but its values are 0 to 10: encode again"):
        CodeDataset(path)[0]


def test_reading_a_header_reads_no_record(tmp_path):
    path = tmp_path / "x.tcc"
    header = header_of(FIELDS, 3)
    write(path, header)

    class Counted(io.FileIO):
        read_bytes = 0

        def read(self, size=-1):
            data = super().read(size)
            self.read_bytes += len(data)
            return data

    with Counted(str(path)) as file:
        found, first = read_header(file, "x")
        assert found == header and file.read_bytes <= first
