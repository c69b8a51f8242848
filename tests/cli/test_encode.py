"""`taming encode`: exactly the codes of encoding on the fly, written by any number of processes, in any
number of starts; and training from them."""

import dataclasses
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from taming.checkpoint import load_model, read_checkpoint, save_exported
from taming.checkpoint.content_hash import content_hash
from taming.cli import command, encode
from taming.config import load_config
from taming.data.codes import CodeDataset, Field, writer
from taming.data.codes.format import pack
from taming.inference.dataset import batch_of, build_dataset
from taming.models.code_cache import stage_hash
from taming.training.command import main
from tests.tiny import curves, resume, train, write_transformer, write_vqgan

ROOT = Path(__file__).parents[2]
CROPS = ["data.params.train.params.size=48", "data.params.train.params.crop_size=32",
         "data.params.train.params.random_crop=true"]


def from_cache(split, file):
    """Words that put a code cache in place of a split of the data."""
    dataset = f"{{target: taming.data.codes.CodeDataset, params: {{path: {file}}}}}"
    return [f"data.params.{split}=null", f"data.params.{split}={dataset}"]


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    return train(write_vqgan(folder), folder / "logs", "vq", "--max_steps", 2)


@pytest.fixture(scope="module")
def config(vqgan, tmp_path_factory):
    """The configuration of a class-conditional transformer over that VQGAN."""
    return write_transformer(tmp_path_factory.mktemp("transformer"), vqgan)


def run(*words, status=0):
    assert command("encode")([*map(str, words), "--device", "cpu", "--num-workers", "0"]) == status


@pytest.fixture
def process(monkeypatch):
    """Take a process's place among some, as torchrun tells it."""
    def take(rank, world):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))
    return take


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(writer, "LEAST_RECORDS", 4)


# ---- exact


def test_the_codes_of_a_tokenizer_are_those_of_encoding_on_the_fly(vqgan, tmp_path):
    run(vqgan, "-o", tmp_path / "x.tcc", "--batch-size", 4, "--views", 3, *CROPS)
    cached = CodeDataset(tmp_path / "x.tcc")
    model, config, _ = load_model(vqgan)
    section = OmegaConf.merge(config, OmegaConf.from_dotlist(CROPS)).data
    dataset = build_dataset(section, "train", seed=23)
    assert cached.code_header.tokenizer == content_hash(model) and cached.code_header.about["seed"] == 23
    views = []
    for epoch in range(4):
        keys = [(epoch % 3, i) for i in range(8)]
        batches = [dataset.collate_fn(dataset.__getitems__(keys[i:i + 4])) for i in (0, 4)]
        codes = torch.cat([model.encode_codes(model.get_images(batch)) for batch in batches])
        found = cached.get_batch([(epoch, i) for i in range(8)])
        assert torch.equal(found["codes"], codes)
        assert found["class_label"].tolist() == [i % 16 for i in range(8)]
        views.append(codes)
    assert not torch.equal(views[0], views[1]) and torch.equal(views[0], views[3])
    assert len(cached) == 8 and len(cached.class_names) == 16
    names = [(field.name, field.shape, field.values, field.bits) for field in cached.code_header.fields]
    assert names == [("codes", (8, 8), 8, 3), ("class_label", (), 16, 4)]


def test_the_hash_of_a_tokenizer_is_that_of_its_weights(vqgan, config, tmp_path):
    """In a checkpoint with a discriminator, in safetensors, and inside of a transformer."""
    model, its_config, _ = load_model(vqgan)
    exported = load_model(save_exported(model, its_config, tmp_path / "exported"))[0]
    inside = encode.load(str(config), "cpu")[0].first_stage_model
    assert content_hash(model) == content_hash(exported) == content_hash(inside)
    assert any(key.startswith("loss.") for key in model.state_dict())
    before = content_hash(model)
    model.loss.discriminator.main[0].weight.data += 1
    model.to(memory_format=torch.channels_last)
    assert content_hash(model) == before
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.bias"):
        tensor = model.state_dict()[name]
        kept = tensor.clone()
        tensor += 1e-3
        assert content_hash(model) != before, name
        tensor.copy_(kept)


def test_training_from_a_cache_is_training_from_images(config, tmp_path, capsys):
    """The same losses to the last bit, over two epochs of random crops; validation, pictures and resuming."""
    run(config, "-o", tmp_path / "t.tcc", "--batch-size", 2, "--views", 2, *CROPS)
    run(config, "-o", tmp_path / "v.tcc", "--batch-size", 2, "--split", "validation")
    yaml = tmp_path / "cached.yaml"
    own = [*from_cache("train", tmp_path / "t.tcc"), *from_cache("validation", tmp_path / "v.tcc")]
    OmegaConf.save(load_config(config, own), yaml)
    words = "--max_epochs", 2
    images = train(config, tmp_path / "logs", "images", *words, *CROPS)
    codes = train(yaml, tmp_path / "logs", "codes", *words)
    columns = [name for name in curves(images)[0] if "loss" in name]
    assert columns
    rows = [
        [{key: row[key] for key in row if "loss" in key} for row in curves(each)] for each in (images, codes)
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 8
    sheets = sorted(path.relative_to(codes) for path in codes.rglob("sheet_*.png"))
    assert sheets == sorted(path.relative_to(images) for path in images.rglob("sheet_*.png"))
    strips = [Image.open(each / sheets[0]).info["strips"] for each in (images, codes)]
    assert strips == ["inputs, " + strips[1], "reconstructions, conditioning, samples_half, samples"]
    resume(codes, "--max_epochs", 3)
    assert len(curves(codes)) > len(curves(images))


def test_a_resumed_run_is_checked_when_its_weights_are_there(config, tmp_path, capsys):
    """The file was made anew with another tokenizer, in the meantime."""
    words = from_cache("train", tmp_path / "x.tcc")
    run(config, "-o", tmp_path / "x.tcc")
    words.append("data.params.validation=null")
    codes = train(config, tmp_path / "logs", "codes", "--max_epochs", 1, *words)
    (tmp_path / "x.tcc").unlink()
    other = train(write_vqgan(tmp_path), tmp_path / "logs_vq", "other", "--max_steps", 3, "--seed", 7)
    run(other, "-o", tmp_path / "x.tcc")
    last = codes / "checkpoints" / "last.ckpt"
    before, _ = read_checkpoint(last), capsys.readouterr()
    assert main(["-t", "-r", str(codes), "--max_epochs", "2"]) == 1
    assert "error: the code cache is of the tokenizer" in capsys.readouterr().err
    after = read_checkpoint(last)
    assert before["batches_seen"] == after["batches_seen"] == 4
    weights = before["state_dict"], after["state_dict"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] | weights[1])


# ---- the file


def test_a_run_is_continued_and_gives_the_same_bytes(vqgan, tmp_path, small_parts, monkeypatch, capsys):
    words = [vqgan, "--batch-size", 2, "--views", 2, *CROPS]
    run(*words, "-o", tmp_path / "one.tcc")
    calls = []

    def stopping(model, batch, own=encode.encode_dataset.__globals__["encode"]):
        calls.append(1)
        if len(calls) == 6:  # the header takes one, each part two
            raise KeyboardInterrupt
        return own(model, batch)

    monkeypatch.setattr("taming.inference.encode.encode", stopping)
    run(*words, "-o", tmp_path / "two.tcc", status=130)
    assert not (tmp_path / "two.tcc").exists()
    parts = sorted(path.name for path in (tmp_path / "two.tcc.parts").iterdir())
    assert parts == ["000000.part", "000001.part"]
    calls[:] = [0] * 10  # past the stop
    run(*words, "-o", tmp_path / "two.tcc")
    assert len(calls) == 10 + 1 + 4  # of 8 batches 4 were there
    assert (tmp_path / "one.tcc").read_bytes() == (tmp_path / "two.tcc").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.tcc", "two.tcc"]
    capsys.readouterr()
    run(*words, "-o", tmp_path / "two.tcc")
    assert "is there already" in capsys.readouterr().out


def test_several_processes_write_the_same_bytes(config, tmp_path, small_parts, process):
    words = [config, "--batch-size", 2, "--views", 2, *CROPS]
    run(*words, "-o", tmp_path / "one.tcc")
    for rank in (2, 1, 0):
        process(rank, 3)
        run(*words, "-o", tmp_path / "three.tcc")
        assert (tmp_path / "three.tcc").exists() == (rank == 0)
    assert (tmp_path / "one.tcc").read_bytes() == (tmp_path / "three.tcc").read_bytes()
    process(1, 3)
    run(*words, "-o", tmp_path / "three.tcc")  # a process that comes late
    assert not (tmp_path / "three.tcc.parts").exists()


@pytest.mark.slow
def test_torchrun(vqgan, tmp_path):
    words = [str(vqgan), "--batch-size", "1", "--views", "12", "--device", "cpu", *CROPS]
    assert command("encode")([*words, "-o", str(tmp_path / "one.tcc")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "taming"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, "encode", *words, "-o", str(tmp_path / "two.tcc")], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.tcc").read_bytes() == (tmp_path / "two.tcc").read_bytes()


@pytest.mark.parametrize("when", ["a part", "the file"])
def test_a_full_disk_leaves_no_half_file(vqgan, tmp_path, small_parts, monkeypatch, capsys, when):
    words = [vqgan, "-o", tmp_path / "x.tcc", "--batch-size", 2]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if when == "a part":
            patch.setattr(Path, "write_bytes", full)
        else:
            patch.setattr(writer, "checksums", full)
        run(*words, status=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"(part|x\.tcc): No space left on device; make room, then start the command", error)
    assert not (tmp_path / "x.tcc").exists()
    assert not [path for path in tmp_path.rglob(".*")]
    run(*words)
    CodeDataset(tmp_path / "x.tcc").check_all()


def test_parts_that_are_damaged_or_of_other_codes(vqgan, tmp_path, small_parts, capsys):
    run(vqgan, "-o", tmp_path / "x.tcc", "--batch-size", 2)
    whole, cached = (tmp_path / "x.tcc").read_bytes(), CodeDataset(tmp_path / "x.tcc")
    arrays = {name: value.numpy() for name, value in cached.read(np.arange(8)).items()}
    records = pack(cached.code_header.fields, arrays)
    (tmp_path / "x.tcc").unlink()
    own = writer.CodeWriter(tmp_path / "x.tcc", cached.code_header, 2)
    own.write_part(0, records[:4])
    part = tmp_path / "x.tcc.parts" / "000000.part"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert not own.has_part(0)
    with pytest.raises(ValueError, match="000000.part is missing or damaged: start the command again"):
        own.merge()
    assert not (tmp_path / "x.tcc").exists()
    capsys.readouterr()
    run(vqgan, "-o", tmp_path / "x.tcc", "--batch-size", 2, "--split", "validation", status=1)
    assert "x.tcc.parts holds parts of other codes" in capsys.readouterr().err
    for left in (tmp_path / ".x.tcc.99.part", part.with_name(".000001.part.99.part")):  # of a process killed
        left.write_bytes(whole[:100])
    run(vqgan, "-o", tmp_path / "x.tcc", "--batch-size", 2)
    assert (tmp_path / "x.tcc").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["x.tcc"]


def test_no_other_file_is_replaced(vqgan, tmp_path, capsys):
    (tmp_path / "x.tcc").write_text("mine")
    run(vqgan, "-o", tmp_path / "x.tcc", status=1)
    assert "x.tcc is not a code cache" in capsys.readouterr().err
    run(vqgan, "-o", tmp_path / "y.tcc")
    run(vqgan, "-o", tmp_path / "y.tcc", "--split", "validation", status=1)
    assert "y.tcc holds other codes (images, about differ): delete it, or choose" in capsys.readouterr().err
    assert (tmp_path / "x.tcc").read_text() == "mine"


def test_info(vqgan, tmp_path, capsys):
    run(vqgan, "-o", tmp_path / "x.tcc", "--views", 2, *CROPS)
    written = capsys.readouterr().out
    assert command("encode")(["--info", str(tmp_path / "x.tcc")]) == 0
    text = capsys.readouterr().out
    assert written.strip() in text and text.endswith("all records agree with their checksums\n")
    for fact in ("8 images, each in 2 views", '"codes": 8x8 codes, 8 different ones in 3 bits',
                 '"class_label": 1 label, 16 different ones in 4 bits', "seed: 23", "split: \"train\"",
                 '"target": "taming.data.landscapes.Landscapes"', '16 classes, such as "mountains at dawn"',
                 content_hash(load_model(vqgan)[0])):
        assert fact in text, fact
    data = bytearray((tmp_path / "x.tcc").read_bytes())
    data[-10] ^= 1
    (tmp_path / "x.tcc").write_bytes(data)
    assert command("encode")(["--info", str(tmp_path / "x.tcc")]) == 1
    assert "is damaged at record 0" in capsys.readouterr().err


def test_values_of_the_configuration_may_be_variables(config, tmp_path, monkeypatch):
    """`size: ${size}`, as in most configurations; those of the environment are not stored."""
    own = load_config(config, ["size=32", "data.params.train.params.size=${size}"])
    OmegaConf.save(own, tmp_path / "own.yaml")
    run(tmp_path / "own.yaml", "-o", tmp_path / "x.tcc")
    source = CodeDataset(tmp_path / "x.tcc").code_header.about["source"]
    assert source["params"] == {"size": 32, "length": 8, "split": "train"}
    monkeypatch.setenv("PART", "validation")
    words = ["--allow", "oc.env", "data.params.train.params.split=${oc.env:PART}"]
    run(tmp_path / "own.yaml", "-o", tmp_path / "y.tcc", *words)
    other = CodeDataset(tmp_path / "y.tcc")
    assert other.code_header.about["source"]["params"]["split"] == "${oc.env:PART}"
    assert not torch.equal(other[0]["codes"], CodeDataset(tmp_path / "x.tcc")[0]["codes"])


def test_no_path_of_the_machine_is_in_a_file(vqgan, tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i * 50, 0, 0)).save(folder / f"{i}.png")
    data = ("data={target: main.DataModuleFromConfig, params: {batch_size: 1, train: {target: "
            f"taming.data.custom.CustomTrain, params: {{size: 32, folder: '{folder}'}}}}}}}}")
    run(vqgan, "-o", tmp_path / "x.tcc", "--ignore-base-data", data)
    content = (tmp_path / "x.tcc").read_bytes()
    assert str(tmp_path).encode() not in content and b"my photos" in content


# ---- what cannot be


@pytest.mark.parametrize(("words", "message"), [
    ([], "give a run or a configuration, and the file to write"),
    (["nowhere", "-o", "x.tcc"], "nowhere is not a run, checkpoint or folder, and config file nowhere does"),
    (["demo/vqgan", "-o", "x.tcc"], "demo/vqgan is not trained yet: name its run"),
    (["RUN", "-o", "."], r"--outdir \. is a folder: name a file, train\.tcc"),
    (["RUN", "-o", "x.tcc", "--views", "2"], "--views 2: the data set gives each image the same in every"),
    (["RUN", "-o", "x.tcc", "--split", "test"], "--split test: the data has train, validation"),
    (["RUN", "-o", "x.tcc", "data.params.train.params.size=64"],
     r"grids of \[\(16, 16\)\] codes, but the tokenizer is made for \[\(8, 8\)\]"),
])
def test_errors(vqgan, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    run(*[vqgan if word == "RUN" else word for word in words], status=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert not list(tmp_path.iterdir())


def refusal(capsys, config, file, *words):
    """Try to train from a cache; return the line that says why not."""
    capsys.readouterr()
    logs = file.parent / "logs"
    status = main(["-b", str(config), "-t", "-l", str(logs), *from_cache("train", file), *words])
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1 and not list(logs.glob("*/checkpoints"))
    return error


def test_a_cache_of_another_tokenizer_is_refused(config, tmp_path, capsys):
    """Before the first batch, with both hashes and the remedy, which helps."""
    other = train(write_vqgan(tmp_path), tmp_path / "logs_vq", "other", "--max_steps", 3, "--seed", 7)
    run(other, "-o", tmp_path / "x.tcc")
    error = refusal(capsys, config, tmp_path / "x.tcc")
    ours = content_hash(encode.load(str(config), "cpu")[0].first_stage_model)
    theirs = CodeDataset(tmp_path / "x.tcc").code_header.tokenizer
    assert ours[:16] in error and theirs[:16] in error and "`taming encode`" in error
    assert "error: the train data: the code cache is of the tokenizer" in error
    word = f"model.params.first_stage_config.params.ckpt_path={other}"
    train(config, tmp_path / "logs", "cured", "--max_steps", 1, word,
          *from_cache("train", tmp_path / "x.tcc"), "data.params.validation=null")


def test_a_cache_of_another_condition_or_grid_is_refused(vqgan, config, tmp_path, capsys):
    run(vqgan, "-o", tmp_path / "x.tcc")
    keys = ["data.params.train.params.keys=[image,segmentation]"]
    own = load_config(config, keys)
    own.model.params.cond_stage_key = "segmentation"
    own.model.params.cond_stage_config = {
        "target": "taming.modules.conditioners.label_grid.LabelGrid",
        "params": {"n_labels": 10, "down_factor": 8},
    }
    own.model.params.transformer_config.params.block_size = 79
    OmegaConf.save(own, tmp_path / "grid.yaml")
    error = refusal(capsys, tmp_path / "grid.yaml", tmp_path / "x.tcc")
    assert "the code cache has no condition segmentation, only codes, class_label: encode" in error
    run(tmp_path / "grid.yaml", "-o", tmp_path / "grid.tcc")
    fields = {field.name: field for field in CodeDataset(tmp_path / "grid.tcc").code_header.fields}
    assert fields["tokens/segmentation"][1:4] == ((4, 4), 10, 4)
    error = refusal(capsys, tmp_path / "grid.yaml", tmp_path / "grid.tcc",
                    "model.params.cond_stage_config.params.n_labels=11")
    assert re.search(r"tokens of segmentation of the condition stage \w{16}, but that of the tra", error)
    error = refusal(capsys, tmp_path / "grid.yaml", tmp_path / "grid.tcc", "model.params.cond_size=64",
                    "model.params.transformer_config.params.block_size=200")
    assert "tokens of segmentation of the shape (4, 4), but the transformer was laid out for (8, 8)" in error
    error = refusal(capsys, config, tmp_path / "grid.tcc")
    assert "the code cache has no condition class_label, only codes, tokens/segmentation" in error
    word = "model.params.first_stage_config.params.ddconfig.resolution=64"
    error = refusal(capsys, config, tmp_path / "x.tcc", word, *_whole_stage(vqgan),
                    "model.params.transformer_config.params.block_size=300")
    assert "the code cache has grids of 8x8 codes (height x width), but the transformer models 16x16" in error


def _whole_stage(vqgan):
    """The first stage spelled out, so that its parameters can be changed."""
    params = load_model(vqgan)[1].model.params
    words = {"embed_dim": params.embed_dim, "n_embed": params.n_embed}
    ddconfig = {**OmegaConf.to_container(params.ddconfig), "resolution": 64}
    stage = {"target": "taming.models.vqgan.VQModel", "params": {
        **words, "ddconfig": ddconfig, "ckpt_path": str(vqgan),
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"}}}
    return [f"model.params.first_stage_config={stage}"]


def test_headers_that_do_not_agree_with_the_stages(config, tmp_path):
    """Of the right tokenizer, as they say."""
    run(config, "-o", tmp_path / "x.tcc")
    header, model = CodeDataset(tmp_path / "x.tcc").code_header, encode.load(str(config), "cpu")[0]
    model.check_cache(header)
    codes, label = header.fields
    for fields, message in (
        ([codes._replace(shape=(8, 4)), label], "grids of 8x4 codes .*, but the transformer models 8x8"),
        ([codes._replace(name="codes/0"), codes._replace(name="codes/1")], "grids of 8x8 and 8x8 codes"),
        ([codes._replace(values=9, bits=4), label], "has 9 different codes, but the first stage 8"),
        ([codes], "has no condition class_label, only codes"),
        ([codes, label._replace(name="tokens/class_label", shape=(1,))], "condition stage .*, but that of"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check_cache(dataclasses.replace(header, fields=tuple(fields)))
    tokens = Field.of("tokens/class_label", (1,), 17, stage_hash(model.cond_stage_model))
    with pytest.raises(ValueError, match="17 different tokens of class_label, but vocab_size: 16 .*size=17"):
        model.check_cache(dataclasses.replace(header, fields=(codes, tokens)))


def test_a_loader_of_ones_own_is_checked_too(config, tmp_path):
    model = encode.load(str(config), "cpu")[0]
    run(config, "-o", tmp_path / "x.tcc")
    dataset = CodeDataset(tmp_path / "x.tcc")
    model.first_stage_model.quant_conv.bias.data += 1
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    model.learning_rate = 1e-3
    with pytest.raises(ValueError, match="the code cache is of the tokenizer"):
        trainer.fit(model, DataLoader(dataset, batch_size=2))
    model.first_stage_model.quant_conv.bias.data -= 1
    model.check_batch(batch_of(build_dataset(load_config(config).data, "train", 0), [0]))
