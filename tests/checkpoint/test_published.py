"""Published checkpoints in use: every form of file, a prior over one, commands that take one, and errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from taming.checkpoint import find_checkpoint, load_model, read_checkpoint
from taming.checkpoint import load as loading
from taming.checkpoint.convert import convert, extract
from taming.checkpoint.families import FAMILIES, identify
from taming.cli import main
from taming.models.autoencoder_kl import AutoencoderKL
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import build_first_stage
from taming.models.vqgan import VQModel
from taming.training.stages import complete_stage
from tests.checkpoint.published import LAYOUTS, golden, meta, pack, shard

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}


@pytest.fixture(scope="module")
def llamagen():
    return golden("llamagen_vq")


@pytest.fixture
def published(tmp_path, llamagen):
    """A file as LlamaGen publishes it."""
    torch.save({"model": llamagen[0]}, tmp_path / "vq_ds16_c2i.pt")
    return tmp_path / "vq_ds16_c2i.pt"


def codes_of(model, llamagen):
    return model.encode_codes(llamagen[1]["x"])


# ---- forms of files


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("mmap", [False, True])
def test_checkpoints_in_several_files(tmp_path, llamagen, name, mmap):
    folder = shard({f"gen_vision_model.{key}": value for key, value in llamagen[0].items()}, tmp_path, name)
    assert find_checkpoint(folder).name == f"{name}.index.json"
    model, _, _ = load_model(folder, mmap=mmap)
    assert torch.equal(codes_of(model, llamagen), llamagen[2]["l2_true.indices"])
    (tmp_path / f"{name.rpartition('.')[0]}-00002-of-00003.{name.rpartition('.')[2]}").unlink()
    with pytest.raises(ValueError, match="a piece of it is missing, .*-00002-of-00003.*: get all 3 files"):
        load_model(folder)


@pytest.mark.parametrize("content, message", [
    ({"weight_map": {"a": "../other.bin"}}, "which lie beside it"),
    ({"weight_map": {"a": "/etc/passwd"}}, "which lie beside it"),
    ({"weight_map": {}}, "1 to 1000 files"),
    ({"weight_map": {str(i): f"{i}.bin" for i in range(1001)}}, "1 to 1000 files"),
    ({"weight_map": {"a": "x.bin"}}, r"do not hold 1 \(a\)"),
    ({"weight_map": ["x.bin"]}, "damaged or not a checkpoint"), ({}, "damaged or not a checkpoint"),
])
def test_an_index_names_files_beside_it(tmp_path, content, message):
    torch.save({"b": torch.ones(1)}, tmp_path / "x.bin")
    torch.save({"b": torch.ones(1)}, tmp_path.parent / "other.bin")
    file = tmp_path / "pytorch_model.bin.index.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(file)
    assert file.name in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("place", [
    "diffusion_pytorch_model.safetensors", "movq/diffusion_pytorch_model.safetensors",
    "vqvae/diffusion_pytorch_model.bin", "vae/pytorch_model.bin", "model.ckpt", "model.safetensors",
])
@pytest.mark.parametrize("config", ["config.json", "config.yaml", "model.yaml"])
def test_folders_of_other_projects(tmp_path, llamagen, place, config):
    """A foreign configuration beside the file is left alone, whatever is in it."""
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in llamagen[0].items()}, file)
    else:
        torch.save(llamagen[0], file)
    for text in (
        "{model: {class_path: src.IBQ.models.ibqgan.IBQ, init_args: {n_embed: 3}}}", "[1, 2", "model: vqgan",
        "{model: {target: src.models.VQ, params: {}}}", "{_class_name: VQModel}", "a: !!python/x 1",
    ):
        (file.parent / config).write_text(text)
        model, found, _ = load_model(tmp_path)
        assert torch.equal(codes_of(model, llamagen), llamagen[2]["l2_true.indices"])
        assert found.model.target == "taming.models.vqgan.VQModel"


def test_the_config_of_another_file_in_the_folder_is_not_taken(published, llamagen, caplog):
    other = {"ddconfig": dict(double_z=False, z_channels=4, resolution=8, in_channels=3, out_ch=3, ch=32,
                              ch_mult=[1], num_res_blocks=1, attn_resolutions=[]), "lossconfig": NO_LOSS,
             "n_embed": 4, "embed_dim": 4}
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": other}}
    OmegaConf.save(OmegaConf.create(config), published.with_name("config.yaml"))
    model, _, _ = load_model(published)
    assert torch.equal(codes_of(model, llamagen), llamagen[2]["l2_true.indices"])
    assert "the config beside" in caplog.text and "is not used" in caplog.text
    with pytest.raises(ValueError, match="LlamaGen VQ, which these arguments fit: .*n_embed=64"):
        load_model(published, config=config)  # one that is given is


def test_a_run_of_this_package_keeps_its_config(tmp_path, llamagen):
    """Names that are ours are not guessed at where a config says what they are."""
    model = VQModel(**identify(golden("ldm_vq")[0]).model["params"])
    content = {"state_dict": model.state_dict(), "config": model.pretrained_config(), "batches_seen": 5}
    torch.save(content, tmp_path / "last.ckpt")
    found, _, step = load_model(tmp_path / "last.ckpt")
    assert type(found) is VQModel and step == 5  # not latent diffusion's, which its names would be
    content["config"]["model"]["target"] = "taming.models.vqgan.VQModle"
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="did you mean VQModel"):
        load_model(tmp_path / "last.ckpt")


def test_half_precision_becomes_float32(tmp_path, llamagen):
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({"model": {key: value.to(dtype) for key, value in llamagen[0].items()}}, tmp_path / "x.pt")
        model, _, _ = load_model(tmp_path / "x.pt")
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        rounded = llamagen[0]["quantize.embedding.weight"].to(dtype).float()
        assert torch.equal(model.quantize.embedding.weight, rounded)


def test_only_the_tokenizer_of_a_larger_model_is_read(tmp_path, llamagen, monkeypatch):
    state = {f"gen_vision_model.{key}": value for key, value in llamagen[0].items()}
    torch.save(state | {"language_model.weight": torch.ones(10)}, tmp_path / "pytorch_model.bin")
    read = []
    build = loading.build_model

    def build_model(config, state, *rest):
        read.extend(state)
        return build(config, state, *rest)

    monkeypatch.setattr(loading, "build_model", build_model)
    load_model(tmp_path)
    assert len(read) == len(llamagen[0]) and all(key.startswith("gen_vision_model.") for key in read)


# ---- flax


TREE = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2, np.int64), "step": 3}


def test_arrays_of_flax(tmp_path):
    (tmp_path / "x.msgpack").write_bytes(pack(TREE))
    found = read_checkpoint(tmp_path / "x.msgpack")["state_dict"]
    assert found.keys() == {"a.kernel", "b"} and found["a.kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].dtype == torch.int64


def array(shape, name, data):
    content = pack([shape, name, data])
    return b"\xc8" + len(content).to_bytes(2) + b"\x01" + content


@pytest.mark.parametrize("data, message", [
    (b"", "is empty"), (b"\xc1", "0xc1"), (pack({}), "no arrays"), (pack(TREE)[:-1], "ends within"),
    (pack(TREE) + b"\x00", "1 bytes follow"), (b"\x91" * 60 + b"\x00", "50 levels"),
    (b"\xdf\xff\xff\xff\xff" + b"\xa1a\x00" * 3, "there twice"),
    (b"\xdb\x7f\xff\xff\xff", "2147483647 bytes"),
    (b"\xdd\xff\xff\xff\xff" + b"\x00" * 300_000, "more than 200,000 values"),
    (b"\x81\xa1a" + array([3], "float32", b"1234"), "do not fit its shape"),
    (b"\x81\xa1a" + array([1], "object", b"1234"), "type unknown here, 'object'"),
    (b"\x81\xa1a" + array([1] * 90, "uint8", b"1"), "type unknown here"),
    (b"\x81\xa1a" + array(["x"], "uint8", b"1"), "not whole numbers"),
    (b"\x81\x01\x02", "1 in it is not a name"), (b"\x92\x01\x02", "no arrays"),
    (pack({"x": {"__msgpack_chunked_array__": 1}}), "the array x is in pieces"),
])
def test_damaged_and_hostile_files_of_flax_are_one_line(tmp_path, data, message):
    (tmp_path / "x.msgpack").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "x.msgpack")
    assert len(str(caught.value).splitlines()) == 1 and "x.msgpack" in str(caught.value)


# ---- errors


def test_torchscript_is_explained_and_not_run(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "encoder.jit")
    with pytest.raises(ValueError, match="TorchScript program, as Cosmos'.*torch.jit.load"):
        load_model(tmp_path / "encoder.jit")


def test_a_checkpoint_of_the_wrong_family_says_which_it_is(published, tmp_path):
    with pytest.raises(ValueError, match=r"names and shapes LlamaGen VQ\) holds a .*VQModel, not a .*KL"):
        load_model(published, AutoencoderKL)
    ddconfig = dict(double_z=True, z_channels=4, resolution=8, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1],
                    num_res_blocks=1, attn_resolutions=[])
    model = AutoencoderKL(ddconfig, NO_LOSS, 4)
    with pytest.raises(ValueError, match="it is LlamaGen VQ, a VQModel: load_model builds it"):
        model.init_from_ckpt(published)
    vqgan = VQModel(**identify(golden("ldm_vq")[0]).model["params"])
    for case, name, cls in (
        ("transgan_generator", "TransGAN generator", "TransGANGenerator"),
        ("llamagen_gpt", "LlamaGen GPT", "Llama"),
    ):
        torch.save({"model": golden(case)[0]}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"it is {name}, a {cls}: load_model builds it"):
            vqgan.init_from_ckpt(tmp_path / "x.pt")
        with pytest.raises(ValueError, match=rf"names and shapes {name}\) holds a .*\.{cls}, not a"):
            load_model(tmp_path / "x.pt", VQModel)


def test_another_size_says_which_arguments_fit(published, tmp_path):
    params = identify(read_checkpoint(published)["state_dict"]).model["params"]
    ddconfig = params["ddconfig"] | {"ch": 64, "ch_mult": [1, 1, 2]}
    model = VQModel(ddconfig, NO_LOSS, 32, 8)
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        model.init_from_ckpt(published)
    text = str(caught.value)
    assert "ddconfig.ch=32" in text and "ddconfig.ch_mult=[1, 1, 1, 2, 1]" in text and "n_embed=64" in text
    assert "embed_dim" not in text.split("which these arguments fit")[1]


def test_what_no_model_can_be_says_what_was_found(tmp_path):
    torch.save({f"layer.{i}.weight": torch.ones(2, i) for i in range(9)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"no published model .*9 \(layer\.0\.weight \(2, 0\); layer\.1"):
        load_model(tmp_path / "x.pt")


def test_families_are_all_different():
    """Each layout is of one family, whatever the order in which they are tried."""
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    mine = {"taming VQGAN": "vqgan_imagenet_f16_1024", "taming GumbelVQ": "vqgan_gumbel_f8"}
    for name, layout in mine.items():
        assert identify(meta(LAYOUTS[layout])).family.name == name
    for layout in LAYOUTS:
        state = meta(LAYOUTS[layout])
        found = [family.name for family in FAMILIES if family.part is None and family.matches(state)]
        others = {"taming VQGAN"} if "ibq" in layout else set()  # the same names: the order decides
        assert len(set(found) - others) == 1, (layout, found)


# ---- in use


def test_convert_and_extract(published, tmp_path, llamagen):
    convert(published, tmp_path / "tokenizer")
    model = VQModel.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(codes_of(model, llamagen), llamagen[2]["l2_true.indices"])
    state = golden("ldm_vq")[0]
    whole = {f"first_stage_model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": whole | {"betas": torch.ones(3)}}, tmp_path / "sd.ckpt")
    extract(tmp_path / "sd.ckpt", tmp_path / "stage", "first_stage_model")
    model, _, _ = load_model(tmp_path / "stage")
    assert torch.equal(model.quant_conv.bias, state["quant_conv.bias"])


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of photos, and the folder that holds them as the current one."""
    numbers = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 256)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", [
    "vq_ds16_c2i.pt", {"ckpt_path": "vq_ds16_c2i.pt"}, {"params": {"ckpt_path": "vq_ds16_c2i.pt"}},
])
def test_a_stage_is_named_by_a_published_file(published, monkeypatch, stage):
    monkeypatch.chdir(published.parent)
    expected = identify(read_checkpoint(published)["state_dict"]).model
    expected["params"]["ckpt_path"] = "vq_ds16_c2i.pt"
    config = OmegaConf.create({"stage": stage})
    assert complete_stage("first_stage_config", config.stage, config) == expected
    model = build_first_stage(expected)
    assert not model.training and model.quantize.l2_normalize


@pytest.mark.slow
@pytest.mark.parametrize("size, stage", [
    (256, "vq_ds16_c2i.pt"),
    (64, {"params": {
        "ckpt_path": "vq_ds16_c2i.pt", "ddconfig": {"resolution": 64, "attn_resolutions": [4]}}}),
], ids=["as it stands", "another size"])
def test_the_prior_of_the_page_trains_and_samples(photos, published, size, stage):
    """Our GPT on the codes of a tokenizer as LlamaGen publishes it, at toy size."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    config = OmegaConf.create(text)
    assert config.size == 256 and config.model.params.first_stage_config == "vq_ds16_c2i.pt"
    config.size, config.model.params.first_stage_config = size, stage
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 65}
    config.model.params.transformer_config.params.update(small)
    config.data.params.update(batch_size=1, num_workers=0)
    OmegaConf.save(config, "my_prior.yaml")
    quiet = ["--max_steps", "2", "--limit_val_batches", "1", "--num_sanity_val_steps", "0"]
    assert main(["train", "--base", "my_prior.yaml", "-t", *quiet]) == 0
    run = next(Path("logs").glob("*_my_prior"))
    published.unlink()  # the run holds the tokenizer
    model, _, step = load_model(run, Net2NetTransformer)
    assert step == 2 and model.first_stage_model.quantize.l2_normalize
    codes = model.sample_codes(model.encode_conditions(torch.tensor([[1]])), size=(size, size), seed=3)
    assert codes.shape == (1, size // 16, size // 16)
    assert model.decode_codes(codes).shape == (1, 3, size, size)


@pytest.mark.slow
def test_commands_take_a_published_file(photos, published, llamagen, capsys):
    photos_of = {"folder": "photos", "split": 0.25, "size": 256}
    train = {"target": "taming.data.custom.CustomClassTrain", "params": photos_of}
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": train}}
    OmegaConf.save(OmegaConf.create({"data": data}), "data.yaml")
    assert main(["encode", str(published), "-o", "train.tcc", "--base", "data.yaml"]) == 0
    assert main(["encode", "--info", "train.tcc"]) == 0
    assert "64" in capsys.readouterr().out
    photo = str(next((photos / "photos" / "a").glob("*.png")))
    assert main(["reconstruct", photo, "-r", str(published), "-o", "reconstructions"]) == 0
    assert main(["evaluate", str(published), "--protocol", "reconstruction", "--images", "photos/a", "--size",
                 "64", "--device", "cpu"]) == 0
