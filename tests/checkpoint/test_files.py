"""Files of tensors: what was written is what is read, and a changed byte is found."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from taming.checkpoint import load_model, read_checkpoint, save_exported, write_checkpoint
from taming.checkpoint.files import SAFETENSORS_DTYPES
from tests.checkpoint.test_load import CONFIG

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.float8_e4m3fn,
]


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every type and form that weights have."""
    found = {str(dtype): (torch.rand(3, 5) * 2).to(dtype) for dtype in DTYPES}
    shared = torch.randn(4, 6)
    return found | {
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 6).t(),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part": torch.randn(9, 9)[2:5, 3:],
        "shared": shared, "its row": shared[1], "expanded": torch.randn(3, 1).expand(3, 7),
        "parameter": nn.Parameter(torch.randn(2)),
    }


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found.to(torch.complex128), expected.detach().to(torch.complex128))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("form", ["zip", "old"])
def test_all_kinds_of_tensors_are_read_as_torch_reads_them(tmp_path, form, mmap):
    state = tensors()
    if form == "old":
        state = {key: value for key, value in state.items() if value.dtype not in DTYPES[11:]}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=form == "zip")
    found = read_checkpoint(tmp_path / "x.ckpt", mmap=mmap)["state_dict"]
    expected = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert_same(found[key], value)
    assert found["its row"].untyped_storage().data_ptr() == found["shared"].untyped_storage().data_ptr()


@pytest.mark.parametrize("mmap", [False, True])
def test_safetensors_of_others_are_read_as_that_library_reads_them(tmp_path, mmap):
    state = {key: value.detach().clone().contiguous() for key, value in tensors().items()}
    save_file(state, tmp_path / "x.safetensors", metadata={"from": "elsewhere"})
    found = read_checkpoint(tmp_path / "x.safetensors", mmap=mmap)["state_dict"]
    assert list(found) == list(load_file(tmp_path / "x.safetensors"))
    for key, value in state.items():
        assert_same(found[key], value)


def test_an_export_is_an_ordinary_safetensors_file(tmp_path):
    module = nn.Module()
    for number, dtype in enumerate(SAFETENSORS_DTYPES.values()):
        module.register_buffer(f"b{number}", torch.rand(3, 4).to(dtype))
    folder = save_exported(module, CONFIG, tmp_path)
    found = load_file(folder / "model.safetensors")
    for key, value in module.state_dict().items():
        assert_same(found[key], value)
        assert_same(read_checkpoint(folder / "model.safetensors")["state_dict"][key], value)


def test_only_the_tensors_that_are_wanted_are_read(tmp_path):
    content = {"state_dict": {"a": torch.ones(3)}, "optimizer_states": [torch.ones(4, 5).t()], "epoch": 3}
    torch.save(content, tmp_path / "x.ckpt")
    found = read_checkpoint(tmp_path / "x.ckpt", tensors=("state_dict",))
    assert torch.equal(found["state_dict"]["a"], torch.ones(3)) and found["epoch"] == 3
    assert found["optimizer_states"][0].is_meta and found["optimizer_states"][0].shape == (5, 4)
    assert read_checkpoint(tmp_path / "x.ckpt", tensors=())["state_dict"]["a"].is_meta
    assert torch.equal(read_checkpoint(tmp_path / "x.ckpt")["optimizer_states"][0], torch.ones(5, 4))


# ---- checksums


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("form", ["export", "last.ckpt"])
def test_a_flipped_byte_in_a_tensor_is_found(tmp_path, form):
    source = nn.Linear(40, 30)
    config = {"model": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 30}}}
    if form == "export":
        file = save_exported(source, config, tmp_path / form) / "model.safetensors"
    else:
        file = tmp_path / form
        write_checkpoint({"state_dict": source.state_dict(), "config": config}, file)
    for tensor in (source.weight, source.bias):
        place = file.read_bytes().index(tensor.detach().numpy().tobytes())
        for position in (place, place + tensor.nbytes // 2, place + tensor.nbytes - 1):
            flip(file, position)
            with pytest.raises(ValueError, match=rf"{file.name} .*the checksum of .* is wrong.*get it again"):
                load_model(tmp_path / form)
            flip(file, position)
    assert torch.equal(load_model(tmp_path / form)[0].weight, source.weight)


def test_names_types_and_shapes_are_part_of_an_exports_checksums(tmp_path):
    module = nn.Module()
    module.register_buffer("one", torch.ones(2, 3))
    module.register_buffer("two", torch.zeros(2, 3))
    file = save_exported(module, CONFIG, tmp_path) / "model.safetensors"
    data = file.read_bytes()
    head = data.index(b'"one"')
    assert data.count(b'"crc32":') == 1
    file.write_bytes(data.replace(b'"crc32":', b'"crc33":'))
    with pytest.raises(ValueError, match="its checksums are gone"):
        read_checkpoint(file)
    for old, new in ((b'"one"', b'"two"'), (b'"two"', b'"one"'), (b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]")):
        start = data.index(old, head)
        file.write_bytes(data[:start] + new + data[start + len(old):])
        with pytest.raises(ValueError, match="model.safetensors is truncated, damaged or"):
            read_checkpoint(file)


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    for name in ("x.ckpt", "x.safetensors"):
        assert torch.equal(read_checkpoint(tmp_path / name)["state_dict"]["a"], torch.ones(3))


def test_the_checksums_are_those_of_zlib(tmp_path):
    """Others can verify an export: the CRC-32 of name, type and shape, and then of the data."""
    file = save_exported(nn.Linear(3, 2), CONFIG, tmp_path) / "model.safetensors"
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    sums = json.loads(json.loads(file.read_bytes()[8:8 + length])["__metadata__"]["crc32"])
    bias = load_file(file)["bias"]
    assert sums["bias"] == zlib.crc32(bias.numpy().tobytes(), zlib.crc32(b"bias torch.float32 [2]"))


# ---- files that are not what they seem


def write_zip(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in {"x/data.pkl": program, **(entries or {})}.items():
            archive.writestr(name, data)
    return path


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """14 MB once became 9.5 GB."""
    zeros = {"x/data/0": bytes(1 << 22)}
    file = write_zip(tmp_path / "x.ckpt", pickle.dumps({}, 2), zeros, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 14
    with pytest.raises(ValueError, match=r"x\.ckpt .*data\.pkl is compressed, which torch.save never does"):
        read_checkpoint(file)


@pytest.mark.parametrize("name", ["x.zip", "x.ckpt"])
def test_other_zip_files_are_told(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("photo.jpg", b"123")
    with pytest.raises(ValueError, match="not a checkpoint: a zip file, but not one of torch.save"):
        read_checkpoint(tmp_path / name)


def test_entries_that_lie_are_told(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(64)}}, tmp_path / "x.ckpt")
    data = (tmp_path / "x.ckpt").read_bytes()
    listed = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    for offset, value in ((24, 100), (42, 3), (20, 100)):  # size, place, compressed size
        changed = data[:listed + offset] + struct.pack("<I", value) + data[listed + offset + 4:]
        (tmp_path / "y.ckpt").write_bytes(changed)
        with pytest.raises(ValueError, match=r"y\.ckpt is truncated, damaged or not a checkpoint"):
            read_checkpoint(tmp_path / "y.ckpt")


@pytest.mark.parametrize("header, message", [
    (b"[" * 1_000_000, "recursion"), (b"[1]", "damaged"), (b'{"a": 1}', "damaged"), (b"\xff\xfe", "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not fit its shape"),
    (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "F99"),
    (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "damaged"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "does not fit"),
    (b'{"a": {"dtype": "F32", "shape": [25000000], "data_offsets": [0, 100000000]}}', "it has .* bytes, not"),
    (b'{"__metadata__": {"crc32": "[1]"}, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', ""),
    (b'{"a": {"dtype": "F32", "shape": [' + b"1, " * 99 + b'1], "data_offsets": [0, 4]}}', "100 dimensions"),
])
def test_headers_that_lie_are_told(tmp_path, header, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=rf"(?s)x\.safetensors is truncated, damaged.*{message}|{message}"):
        read_checkpoint(file)


def test_a_header_without_end_is_told(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="its header would have 4611686018427387904 bytes"):
        read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("step, expected", [("7", 7), (5, 5), ("9" * 5000, None), ("-1", None), (None, None)])
def test_a_step_that_is_no_number_is_left_out(tmp_path, step, expected):
    header = json.dumps({
        "__metadata__": {"step": step}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert read_checkpoint(tmp_path / "x.safetensors").get("batches_seen") == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("read", [read_checkpoint, load_model])
def test_pipes_and_devices_are_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.ckpt")
    for path in (tmp_path / "pipe.ckpt", Path("/dev/zero")):
        with pytest.raises(ValueError, match="pipe or a device"):
            read(path)


def test_a_folder_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        read_checkpoint(tmp_path)
