"""Reading checkpoints: those of 2020-21, and those that hold code, damage or something else."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming.checkpoint import read_checkpoint, save_exported

LEGACY = Path(__file__).parents[1] / "golden" / "legacy_lightning_1_0.ckpt"


class RunsCommand:
    """A pickle that would write a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluates(RunsCommand):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def save(path: Path, **extra) -> Path:
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), **extra}, path)
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_legacy_file_is_read_with_nothing_but_plain_values(mmap):
    allowed = torch.serialization.get_safe_globals()
    content = read_checkpoint(LEGACY, mmap=mmap)
    assert (content["epoch"], content["global_step"]) == (7, 12345)
    assert content["hyper_parameters"] == {"n_embed": 48}
    (name, state), = content["callbacks"].items()
    assert name == "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert state["monitor"] == "val/rec_loss"
    assert content["state_dict"]["quantize.embedding.weight"].shape[0] == 48
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # the permission has ended


def test_omegaconf_numpy_and_paths_in_old_files_become_plain(tmp_path):
    hyper = OmegaConf.create({"a": [1, {"b": 2.5}], "c": "text", "d": None})
    score = numpy.float64(0.25)
    save(tmp_path / "x.ckpt", hparams=hyper, kind=type(hyper), score=score, at=Path("/a/b"))
    content = read_checkpoint(tmp_path / "x.ckpt")
    assert content["hparams"] == {"a": [1, {"b": 2.5}], "c": "text", "d": None}
    assert content["kind"] == "omegaconf.dictconfig.DictConfig"
    assert content["score"] == 0.25 and type(content["score"]) is float
    assert content["at"] == "/a/b"


def test_bare_state_dict_is_taken(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "bare.pth")
    assert list(read_checkpoint(tmp_path / "bare.pth")["state_dict"]) == ["weight", "bias"]


@pytest.mark.parametrize("payload, name", [(RunsCommand, "posix.system"), (Evaluates, "builtins.eval")])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "zip, protocol 4", "bare pickle", "old"])
def test_code_is_refused_and_does_not_run(tmp_path, payload, name, form):
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    content = {"state_dict": {"weight": torch.ones(2)}, "x": payload(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(payload(marker)))
    elif form == "old":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(content, path, pickle_protocol=4 if form.endswith("4") else 2)
    name = name.replace("posix", os.name)
    expected = f"evil.ckpt asks for {name}, which"
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(path)
    assert not marker.exists()


def test_code_beside_a_legacy_class_is_refused(tmp_path):
    """The permission for stand-ins is for those names only, and reaches no attribute of a real object."""
    marker = tmp_path / "marker"
    hyper = OmegaConf.create({"a": 1})
    save(tmp_path / "x.ckpt", hyper_parameters=hyper, y=Evaluates(marker))
    with pytest.raises(ValueError, match="asks for builtins.eval, which"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not marker.exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:40], "truncated"),
        (lambda data: data[:2000] + data[2500:], "truncated"),
        (lambda data: b"<!DOCTYPE html><title>404</title>", "is not a checkpoint"),
        (lambda data: pickle.dumps({"a": 1}), "is not a checkpoint"),
    ],
)
def test_damaged_and_foreign_files_give_one_clear_error(tmp_path, damage, message):
    path = save(tmp_path / "x.ckpt", more=torch.ones(64, 64))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_other_contents_give_one_clear_error(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="not a checkpoint.*a Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")
    torch.save({"optimizer": {}, "epoch": 1}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="no state_dict.*optimizer; epoch"):
        read_checkpoint(tmp_path / "dict.pt")
    with pytest.raises(FileNotFoundError, match="missing.ckpt"):
        read_checkpoint(tmp_path / "missing.ckpt")


def test_truncated_safetensors_give_one_clear_error(tmp_path):
    config = {"model": {"target": "torch.nn.Linear"}}
    file = save_exported(nn.Linear(3, 2), config, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        read_checkpoint(file)


def program(path: Path, body: bytes, entries: dict[str, bytes] | None = None) -> Path:
    """A zip file as torch writes it, around the instructions of a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"x/data.pkl": b"\x80\x02" + body + b".", **(entries or {})}.items():
            archive.writestr(name, data)
    return path


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


TENSOR = (
    b"}" + text(b"state_dict") + b"}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
    + b"K\x04tQ%s\x89ccollections\nOrderedDict\n)RtRss"
)


@pytest.mark.parametrize("place, message", [
    (b"K\0J\xff\xff\xff\xff\x85K\1\x85", "at least 0"), (b"K\3K\4\x85J\xff\xff\xff\xff\x85", "at least 0"),
    (b"K\0K\5\x85K\1\x85", "does not lie within its 16 bytes"), (b"K\4K\1\x85K\1\x85", "does not lie within"),
    (b"K\0G?\xf0\0\0\0\0\0\0\x85K\1\x85", "whole numbers"), (b"K\0K\1\x85K\1K\1\x86", "1 dimensions and 2"),
    (b"K\0]K\1\x85", "must be tuples"),
])
def test_tensors_that_lie_about_their_place_are_told(tmp_path, place, message):
    file = program(tmp_path / "x.ckpt", TENSOR.replace(b"%s", place), {"x/data/0": bytes(16)})
    with pytest.raises(ValueError, match=rf"x\.ckpt is truncated, damaged.*{message}"):
        read_checkpoint(file)
    fine = program(tmp_path / "y.ckpt", TENSOR.replace(b"%s", b"K\0K\4\x85K\1\x85"), {"x/data/0": bytes(16)})
    assert torch.equal(read_checkpoint(fine)["state_dict"]["a"], torch.zeros(4))


@pytest.mark.parametrize("body, message", [
    (b"]" * 2_100_000, "more than 2,000,000 instructions"),
    (b"X" + struct.pack("<I", 2**32 - 1) + b"a", "damaged"),
    (b"Nr\xff\xff\xff\xff", "holds a NoneType"),
    (b"c_codecs\nencode\nq\0" + text(b"a" * 2**20) + b"q\1" + text(b"latin1") + b"q\2h\1h\2\x86q\3](" +
     b"h\0h\3R" * 2000 + b"e", "copies strings or lists again and again"),
    (b"cpathlib\nPosixPath\n(" + text(b"a" * 2**16) + b"q\1" + b"h\1" * 20_000 + b"tR", "again and again"),
    (b"N" + b"\x85" * 1000, "not a checkpoint"),
    (b"}" + text(b"state_dict") + b"}" + text(b"a") + b"N" + b"\x85" * 1000 + b"ss", "more than 200 levels"),
    (b"}" + text(b"state_dict") + b"}" + text(b"a") + b"]q\1h\1ass", "contains itself"),
    (b"0", "takes more from the stack"), (b"\x82\x01", "instruction EXT1"), (b"P1\n", "instruction PERSID"),
])
def test_programs_that_would_take_long_or_much_are_told(tmp_path, body, message):
    with pytest.raises(ValueError, match=rf"x\.ckpt .*{message}") as caught:
        read_checkpoint(program(tmp_path / "x.ckpt", body))
    assert len(str(caught.value).splitlines()) == 1
