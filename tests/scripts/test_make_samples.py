"""Pictures for the conditions of a data set: kinds, sizes, completion, resumption, errors."""

import pytest
import torch
from PIL import Image

from scripts.make_samples import build_dataset, main, parse
from scripts.make_samples import draw as draw_batch
from taming.checkpoint import save_exported
from taming.config import instantiate_from_config
from taming.data.base import read_image
from taming.drawing.options import load_transformer
from taming.drawing.shares import TokenBar

DUMMY = {"target": "taming.modules.losses.DummyLoss"}


def stage(kind, channels, **more):
    ddconfig = dict(
        double_z=False, z_channels=8, resolution=32, in_channels=channels, out_ch=channels, ch=32,
        ch_mult=[1, 1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0,
    )
    params = dict(ddconfig=ddconfig, lossconfig=DUMMY, n_embed=16, embed_dim=4) | more
    return {"target": f"taming.models.vqgan.{kind}", "params": params}


CONDITIONS = {
    "segmentation": stage("VQSegmentationModel", 10, n_labels=10, image_key="segmentation"),
    "depth": stage("VQModel", 1, image_key="depth"),
    "class_label": {"target": "taming.modules.util.Labelator", "params": {"n_classes": 16}},
}


def landscapes(key, size=32):
    split = {
        "target": "taming.data.landscapes.Landscapes",
        "params": dict(size=size, length=6, split="validation", keys=["image", "class_label", key]),
    }
    params = dict(batch_size=2, num_workers=0, validation=split)
    return {"target": "main.DataModuleFromConfig", "params": params}


def export(folder, key):
    gpt = {"vocab_size": 16, "block_size": 31, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": key, "first_stage_config": stage("VQModel", 3),
            "cond_stage_config": CONDITIONS[key],
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        },
    }
    torch.manual_seed(0)
    built = instantiate_from_config(model)
    built.first_stage_model.quantize.embedding.weight.data.mul_(50.0)  # other codes, other pictures
    built.first_stage_model.decoder.conv_out.weight.data.mul_(10.0)
    return str(save_exported(built, {"model": model, "data": landscapes(key)}, folder))


def draw(run, folder, *arguments):
    return main(["-r", run, "-o", str(folder), "--device", "cpu", *map(str, arguments)])


def pixels(folder, kind, number=0):
    return read_image(folder / kind / f"{number:06d}.png").astype(int)


@pytest.mark.parametrize("key", ["segmentation", "depth", "class_label"])
def test_each_condition(key, tmp_path):
    run, out = export(tmp_path / "run", key), tmp_path / "out"
    assert draw(run, out, "-n", 3, "--batch_size", 2) == 0
    kinds = {"originals", "reconstructions", "samples"} | ({"conditions"} if key != "class_label" else set())
    assert {path.name for path in out.iterdir()} == kinds
    for kind in kinds:
        assert [path.name for path in sorted((out / kind).iterdir())] == [f"{i:06d}.png" for i in range(3)]
        assert pixels(out, kind).shape == (32, 32, 3)
    assert (pixels(out, "samples", 0) != pixels(out, "samples", 2)).any()
    assert Image.open(out / "samples" / "000001.png").info["seed"] == "0"
    assert draw(run, tmp_path / "one", "-n", 2, "--batch_size", 1) == 0
    assert abs(pixels(out, "samples", 1) - pixels(tmp_path / "one", "samples", 1)).max() <= 1


def test_larger_than_trained(tmp_path):
    run = export(tmp_path / "run", "depth")
    assert draw(run, tmp_path / "out", "-n", 1, "--scale", 1.5, "--stride", 2) == 0
    for kind in ("samples", "conditions", "originals", "reconstructions"):
        assert pixels(tmp_path / "out", kind).shape == (48, 48, 3)


def test_completion_keeps_the_upper_codes(tmp_path):
    options = parse(["-r", export(tmp_path / "run", "depth"), "-o", str(tmp_path), "--known", "0.5"])
    model, config, _ = load_transformer(options)
    decoded, decode = [], model.first_stage_model.decode_code
    model.first_stage_model.decode_code = lambda codes: (decoded.append(codes), decode(codes))[1]
    dataset = build_dataset(config, options)
    for known in (0.5, 0.0):
        options.known = known
        draw_batch(model, dataset, [0, 1], options, TokenBar(2))
        reconstructed, sampled = decoded[-2:]
        same = (reconstructed == sampled).float().mean((0, 2))  # share of each of the 4 rows
        assert (same[:2] == 1).all() == (known == 0.5) and same[2:].mean() < 0.5


def test_what_is_there_is_not_drawn_again(tmp_path, capsys):
    run = export(tmp_path / "run", "class_label")
    draw(run, tmp_path / "out", "-n", 2)
    before = (tmp_path / "out" / "samples" / "000000.png").stat().st_mtime_ns
    draw(run, tmp_path / "out", "-n", 3)
    assert "2 of them there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples" / "000000.png").stat().st_mtime_ns == before


def test_other_data_as_in_2021(tmp_path, capsys):
    run = export(tmp_path / "run", "class_label")
    data = "data={target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: "
    data += "taming.data.landscapes.Landscapes, params: {size: 32, length: 1, split: train}}}}"
    assert draw(run, tmp_path / "out", "--ignore_base_data", data) == 0
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 1
    assert draw(run, tmp_path / "other", "data.params.validation.params.length=2") == 0
    assert len(list((tmp_path / "other" / "samples").iterdir())) == 2
    for arguments, message in (
        (["--ignore_base_data"], "no section `data`"), (["--split", "test"], "the data has validation"),
        (["--known", "1.5"], "--known 1.5 is outside [0, 1)"),
    ):
        assert draw(run, tmp_path / "no", *arguments) == 1
        assert message in capsys.readouterr().err
