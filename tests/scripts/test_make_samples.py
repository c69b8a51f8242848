"""Pictures for the conditions of a data set: kinds, sizes, completion, resumption, errors."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from taming.checkpoint import save_exported
from taming.cli import command, sample_dataset
from taming.cli.dataset_options import load_dataset
from taming.cli.options import sampling_options
from taming.cli.parser import build_parser
from taming.cli.sample_dataset import generate
from taming.config import instantiate_from_config
from taming.data.files.images import read_image
from taming.images import save_png
from taming.inference.distributed import TokenBar
from taming.inference.loading import load_transformer

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


CONDITIONS["objects_bbox"] = {
    "target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": "objects_bbox"},
}
CONDITIONS["grid"] = {
    "target": "taming.modules.conditioners.label_grid.LabelGrid",
    "params": {"n_labels": 10, "down_factor": 16},
}
CONDITIONS["coord"] = {
    "target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 16, "down_factor": 8},
}
PERMUTER = {"target": "taming.modules.transformer.permuter.ZCurve", "params": {"H": 4, "W": 4}}


def landscapes(keys, size=32):
    split = {
        "target": "taming.data.landscapes.Landscapes",
        "params": dict(size=size, length=6, split="validation", keys=["image", "class_label", *keys]),
    }
    params = dict(batch_size=2, num_workers=0, validation=split)
    return {"target": "main.DataModuleFromConfig", "params": params}


def export(folder, key, stages=None, size=32, bias=0.0, **more):
    """An exported run over 4x4 codes of 32 pixels, and data of `size` pixels; `bias` is in the weights."""
    keys = [key] if isinstance(key, str) else key
    stages = CONDITIONS[key] if stages is None else stages
    gpt = {"vocab_size": 512, "block_size": 63, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": key, "first_stage_config": stage("VQModel", 3), **more,
            "cond_stage_config": stages,
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        },
    }
    torch.manual_seed(0)
    built = instantiate_from_config(model)
    built.first_stage_model.quantize.embedding.weight.data.mul_(50.0)  # other codes, other pictures
    built.first_stage_model.decoder.conv_out.weight.data.mul_(10.0)
    built.first_stage_model.decoder.conv_out.bias.data.add_(bias)
    return str(save_exported(built, {"model": model, "data": landscapes(keys, size)}, folder))


def parse(words):
    return build_parser(sample_dataset).read(words)


def draw(run, folder, *arguments):
    return command("sample-dataset")(["-r", run, "-o", str(folder), "--device", "cpu", *map(str, arguments)])


def pixels(folder, kind, number=0):
    return read_image(folder / kind / f"{number:06d}.png").astype(int)


@pytest.mark.parametrize("key", ["segmentation", "depth", "class_label"])
def test_each_condition(key, tmp_path):
    run, out = export(tmp_path / "run", key), tmp_path / "out"
    assert draw(run, out, "-n", 3, "--batch_size", 2) == 0
    kinds = {"originals", "reconstructions", "samples", "conditions"}
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
    model, config, _ = load_transformer(options.run, sampling_options(options), device=options.device)
    decoded, decode = [], model.first_stage_model.decode_code
    model.first_stage_model.decode_code = lambda codes: (decoded.append(codes), decode(codes))[1]
    dataset = load_dataset(config, options)[0]
    for known in (0.5, 0.0):
        options.known = known
        generate(model, dataset, [0, 1], options, TokenBar(2))
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


def test_pictures_of_others_are_not_taken_for_these(tmp_path, capsys):
    run, out = export(tmp_path / "run", "depth"), tmp_path / "out"
    other = export(tmp_path / "other", "depth", bias=1e-3)
    yaml = tmp_path / "data.yaml"
    yaml.write_text("data: {params: {validation: {params: {figures: 0.5}}}}")
    for name, size in (("a", 9), ("b", 9), ("c", 10)):
        paint(tmp_path / f"{name}.png", (32, 32), (0, 0, size, size))
    assert draw(run, out, "-n", 1, "--mask", tmp_path / "a.png") == 0
    speed = ["data.params.num_workers=1", "--batch_size", 2, "--mask", tmp_path / "b.png"]
    assert draw(str(Path(run) / "model.safetensors"), out, "-n", 1, *speed) == 0
    assert "1 of them there already" in capsys.readouterr().out
    same = ["--mask", tmp_path / "a.png"]
    for model, words, key in (
        (other, same, "model"), (run, [*same, "data.params.validation.params.seed=5"], "data"),
        (run, [*same, "-b", yaml], "data"), (run, ["--mask", tmp_path / "c.png"], "mask"),
    ):
        assert draw(model, out, "-n", 1, *words) == 1
        assert f"000000.png was generated with {key} " in capsys.readouterr().err


def test_pictures_with_notes_of_old_are_refused(tmp_path, capsys):
    run, file = export(tmp_path / "run", "class_label"), tmp_path / "out" / "samples" / "000000.png"
    assert draw(run, tmp_path / "out", "-n", 1) == 0
    note = Image.open(file).info
    save_png(torch.zeros(3, 32, 32), file, {key: note[key] for key in note if key not in ("model", "data")})
    assert draw(run, tmp_path / "out", "-n", 1) == 1
    message = "was generated with model unknown, data unknown: delete it, or choose another --outdir"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["model.params.cond_stage_key=depth"], "model.params.cond_stage_key=depth would change nothing"),
    (["dta.params.x=5"], "dta.params.x=5 would change nothing: the data alone can be set here"),
    (["--scale", "nan"], "argument --scale: nan is not a number above 0"),
    (["--scale", "-1"], "argument --scale: -1 is not a number above 0"),
    (["--scale", "inf"], "argument --scale: inf is not a number above 0"),
    (["-n", "0"], "argument -n/--num-samples: 0 is not a whole number of at least 1"),
    (["--seed", "-1"], "argument --seed: -1 is not a whole number of at least 0"),
])
def test_options_that_will_not_do(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(["-r", "run", "-o", "out", *words])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_packages_are_allowed(tmp_path, monkeypatch, capsys):
    (tmp_path / "package_of_mine.py").write_text("from taming.data.landscapes import Landscapes as Base\n"
                                                 "class Mine(Base): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = [export(tmp_path / "run", "class_label"), tmp_path / "out", "-n", 1,
             "data.params.validation.target=package_of_mine.Mine"]
    assert draw(*words) == 1
    assert "--allow package_of_mine" in capsys.readouterr().err
    assert draw(*words, "--allow", "package_of_mine") == 0


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
        (["--known", "1.5"], "--known 1.5 is outside [0, 1)"), (["--scale", "0.5"], "the nearest is 32x32"),
        (["--guidance", "2"], "has no null token"), (["-k", "17"], "top_k is 17: give 1 to 16"),
    ):
        assert draw(run, tmp_path / "no", *arguments) == 1
        assert message in capsys.readouterr().err


def paint(file, size, white):
    """A mask of that size (height, width), white in a box left, top, right, bottom."""
    picture = Image.new("L", size[::-1])
    picture.paste(255, white)
    picture.save(file)
    return file


def test_a_mask_says_what_is_drawn(tmp_path):
    mask = paint(tmp_path / "mask.png", (64, 64), (15, 32, 17, 33))  # touches the first two codes of row 2
    options = parse(["-r", export(tmp_path / "run", "depth"), "-o", str(tmp_path), "--mask", str(mask)])
    model, config, _ = load_transformer(options.run, sampling_options(options), device=options.device)
    decoded, decode = [], model.first_stage_model.decode_code
    model.first_stage_model.decode_code = lambda codes: (decoded.append(codes), decode(codes))[1]
    bar = TokenBar(4)
    dataset = load_dataset(config, options)[0]
    generate(model, dataset, [0, 1, 2, 3], options, bar)
    changed = (decoded[0] != decoded[1]).any(0)
    assert changed.nonzero().tolist() == [[2, 0], [2, 1]] and bar.n == bar.total == 8
    assert draw(str(options.run), tmp_path / "out", "-n", 1, "--mask", mask, "--scale", 2) == 0
    assert pixels(tmp_path / "out", "samples").shape == (64, 64, 3)


def test_masks_that_will_not_do(tmp_path, capsys):
    run = export(tmp_path / "run", "depth")
    (tmp_path / "no.png").write_bytes(b"no picture")
    black = paint(tmp_path / "black.png", (32, 32), (0, 0, 0, 0))
    wide = paint(tmp_path / "wide.png", (32, 64), (0, 0, 9, 9))
    for arguments, message in (
        (["--mask", black], "leaves nothing to generate, values are 0"),
        (["--mask", wide], "has 32x64 pixels (height x width), but the images 32x32"),
        (["--mask", tmp_path / "no.png"], "cannot read image"),
        (["--mask", black, "--known", 0.5], "give one of them"),
    ):
        assert draw(run, tmp_path / "out", "-n", 1, *arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_several_conditions(tmp_path):
    keys = ["class_label", "segmentation", "depth"]
    run = export(tmp_path / "run", keys, [CONDITIONS["class_label"], CONDITIONS["grid"], CONDITIONS["depth"]])
    assert draw(run, tmp_path / "out", "-n", 1, "--scale", 2) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "originals", "reconstructions", "samples", "conditions_class_label", "conditions_segmentation",
        "conditions_depth",
    }
    for kind in ("conditions_segmentation", "conditions_depth", "samples"):
        assert pixels(tmp_path / "out", kind).shape == (64, 64, 3)


@pytest.mark.parametrize("key", ["coord", "objects_bbox"])
def test_coordinates_and_layouts(key, tmp_path):
    run = export(tmp_path / "run", key)
    assert draw(run, tmp_path / "out", "-n", 2, "--scale", 1.5) == 0
    for kind in ("conditions", "samples"):
        assert pixels(tmp_path / "out", kind).shape == (48, 48, 3)


def test_a_condition_of_another_resolution(tmp_path):
    small = export(tmp_path / "small", "lr_image", stage("VQModel", 3), cond_size=16)
    data = "data.params.validation.params.lr_factor=2"
    assert draw(small, tmp_path / "out", "-n", 1, "--scale", 2, data) == 0
    assert pixels(tmp_path / "out", "conditions").shape == (32, 32, 3)
    assert pixels(tmp_path / "out", "samples").shape == (64, 64, 3)
    half = export(tmp_path / "half", "upper_half", "__is_first_stage__")
    assert draw(half, tmp_path / "halves", "-n", 1) == 0
    assert pixels(tmp_path / "halves", "conditions").shape == (16, 32, 3)


def test_conditions_that_do_not_fit(tmp_path, capsys):
    run = export(tmp_path / "run", "lr_image", stage("VQModel", 3), cond_size=8)
    assert draw(run, tmp_path / "out", "-n", 1, "data.params.validation.params.lr_factor=2") == 1
    message = "the condition lr_image has 16x16 pixels (height x width), but must have 8x8 beside images of"
    assert message in capsys.readouterr().err


def test_another_order_of_codes(tmp_path, capsys):
    run = export(tmp_path / "run", "class_label", permuter_config=PERMUTER)
    assert draw(run, tmp_path / "out", "-n", 1) == 0
    assert pixels(tmp_path / "out", "samples").shape == (32, 32, 3)
    for words in (["--known", 0.5], ["--scale", 2]):
        assert draw(run, tmp_path / "no", "-n", 1, *words) == 1
        assert "the order of ZCurve" in capsys.readouterr().err


def test_pictures_of_conditions_do_not_depend_on_the_batch(tmp_path):
    run = export(tmp_path / "run", "segmentation", CONDITIONS["grid"])
    for size in (1, 3):
        assert draw(run, tmp_path / str(size), "-n", 3, "--batch_size", size) == 0
    assert (pixels(tmp_path / "1", "conditions", 2) == pixels(tmp_path / "3", "conditions", 2)).all()
